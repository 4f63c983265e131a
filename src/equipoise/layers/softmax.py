"""The donor's own softmax attention, for teacher runs and for layers that stay as they are.

Shapes follow the legend in `equipoise.ops.types`; S is the number of keys, of which the last T are new.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from equipoise.layers.mixer import LayerInputs
from equipoise.ops import AttentionState, window_attention
from equipoise.ops.types import history_length

ROWS = 1024
"""Queries of a layer with sink logits that attend at once; it holds their scores on every key."""


def donor_attention(inputs: LayerInputs) -> Tensor:
    """Causal softmax attention of T queries over S >= T keys [B, H, T, E], the donor's own window included.

    ``key_mask`` covers the S keys here. A windowed layer goes block by block; full attention takes PyTorch's
    fused kernel, with a [T, S] mask only where padding or packing needs one, as the donor does. Sink logits
    take the donor's own operations one by one, on up to `ROWS` queries at once.
    """
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    window = inputs.sliding_window
    if inputs.sink_logits is not None:
        return _with_sink(inputs, inputs.sink_logits)
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
        mask = mask & (segments[:, None, -queries:, None] == segments[:, None, None, :])
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


def _with_sink(inputs: LayerInputs, sink_logits: Tensor) -> Tensor:
    """GPT-OSS's attention, as transformers' eager form of it rounds."""
    queries, past = inputs.q.shape[2], inputs.k.shape[2] - inputs.q.shape[2]
    if queries > ROWS:
        parts: list[Tensor] = []
        for start in range(0, queries, ROWS):
            stop, window = min(start + ROWS, queries), inputs.sliding_window
            seen = slice(0 if window is None else max(0, past + start - window + 1), past + stop)
            part = replace(
                inputs, q=inputs.q[:, :, start:stop], k=inputs.k[:, :, seen], v=inputs.v[:, :, seen],
                key_mask=None if inputs.key_mask is None else inputs.key_mask[:, seen],
                segment_ids=None if inputs.segment_ids is None else inputs.segment_ids[:, seen],
            )  # fmt: skip
            parts.append(_with_sink(part, sink_logits))
        return torch.cat(parts, 2)
    groups = inputs.q.shape[1] // inputs.k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (inputs.k, inputs.v))
    scores = inputs.q @ k.mT * inputs.scale
    mask = _mask(inputs)
    if mask is None and queries > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    column = sink_logits[None, :, None, None].expand(*scores.shape[:3], 1)
    scores = torch.cat([scores, column], -1)
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.softmax(-1, dtype=scores.dtype)[..., :-1].to(v.dtype) @ v


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
