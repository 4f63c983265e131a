"""The donor's own softmax attention, for teacher runs and for layers that stay as they are.

Shapes follow the legend in `equipoise.ops.types`; S is the number of keys, of which the last T are new.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from equipoise.layers.mixer import LayerInputs
from equipoise.ops import AttentionState, window_attention
from equipoise.ops.types import history_length


def donor_attention(inputs: LayerInputs) -> Tensor:
    """Causal softmax attention of T queries over S >= T keys [B, H, T, E], the donor's own window included.

    ``key_mask`` covers the S keys here. A windowed layer goes block by block; full attention takes PyTorch's
    fused kernel, with a [T, S] mask only where padding or packing needs one, as the donor does.
    """
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    window = inputs.sliding_window
    if window is not None and keys > window and queries > 1:
        return _windowed(inputs, window)
    if inputs.softcap is not None:
        return _softcapped(inputs)
    mask = _mask(inputs)
    return functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, attn_mask=mask, is_causal=mask is None and queries > 1,
        scale=inputs.scale, enable_gqa=inputs.q.shape[1] != inputs.k.shape[1],
    )  # fmt: skip


def _mask(inputs: LayerInputs) -> Tensor | None:
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    window, device = inputs.sliding_window, inputs.q.device
    plain = inputs.key_mask is None and inputs.segment_ids is None and (window is None or keys <= window)
    if plain and queries in (1, keys):
        return None
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)[None]
    mask = (j <= i)[None, None]
    if window is not None:
        mask = mask & (i - j < window)
    if inputs.key_mask is not None:
        # a query of padding sees itself: its output is never read, and an empty row would be NaN
        mask = mask & (inputs.key_mask[:, None, None] | (i == j))
    if inputs.segment_ids is not None:
        segments = inputs.segment_ids
        if segments.shape[1] != keys:
            raise ValueError(
                f"expected segment_ids of all {keys} keys, got {segments.shape[1]}: a layer with softmax "
                "attention does not remember the segments of its cache. Start from past_key_values=None."
            )
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def _softcapped(inputs: LayerInputs) -> Tensor:
    groups = inputs.q.shape[1] // inputs.k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (inputs.k, inputs.v))
    scores = inputs.q @ k.mT * inputs.scale
    assert inputs.softcap is not None
    scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
    mask = _mask(inputs)
    if mask is None and inputs.q.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v


def _windowed(inputs: LayerInputs, window: int) -> Tensor:
    """Keys before the T new ones become the state of the block-local operator."""
    queries, past = inputs.q.shape[2], inputs.k.shape[2] - inputs.q.shape[2]
    state, key_mask = None, inputs.key_mask
    if past:
        count = history_length(window, "sliding")
        cut = slice(max(0, past - count), past)
        fill = count - (cut.stop - cut.start)
        valid = torch.ones(inputs.q.shape[0], past, dtype=torch.bool, device=inputs.q.device)
        valid = valid if key_mask is None else key_mask[:, :past]
        absent = ~valid[:, None, cut, None]
        state = AttentionState(
            keys=functional.pad(inputs.k[:, :, cut].masked_fill(absent, 0), (0, 0, fill, 0)),
            values=functional.pad(inputs.v[:, :, cut].masked_fill(absent, 0), (0, 0, fill, 0)),
            valid=functional.pad(valid[:, cut], (fill, 0), value=False),
        )
        key_mask = None if key_mask is None else key_mask[:, past:]
    out, _ = window_attention(
        inputs.q, inputs.k[:, :, -queries:], inputs.v[:, :, -queries:], window=window, scale=inputs.scale,
        softcap=inputs.softcap, key_mask=key_mask, segment_ids=inputs.segment_ids, initial_state=state,
    )  # fmt: skip
    return out
