"""The public operators. Shapes follow the legend in `equipoise.ops.types`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.ops import dispatch
from equipoise.ops.checks import check_arguments
from equipoise.ops.types import AttentionState, Branches, Call, FeatureMapLike, Layout

_BOTH = Branches()
CHUNK = 64
"""Queries a block. On CPU blocks of 64 keep the scratch memory in cache."""


def hybrid_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B N T D"],
    v: Float[Tensor, "B N T E"],
    phi_q: Float[Tensor, "B H T F"] | FeatureMapLike | None,
    phi_k: Float[Tensor, "B M T F"] | FeatureMapLike | None,
    *,
    window: int | None,
    layout: Layout = "sliding",
    mixing: str = "convex",
    gate: float | Tensor = 0.5,
    overlap: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    key_mask: Bool[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
    branches: Branches | None = None,
    sinks: int = 0,
    sink_logits: Float[Tensor, " H"] | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    reuse_state: bool = False,
    chunk_size: int = CHUNK,
) -> tuple[Float[Tensor, "B H T E"], AttentionState | None]:
    """Sliding-window softmax attention and linear attention over the same q, k, v, mixed.

    Exact for any T, for padding on either side, for packed segments and for a sequence split anywhere and
    resumed from its state. Sums run in float32 (float64 for float64 inputs), whatever autocast says.

    Args:
        q, k, v: queries, keys and values after rotary embedding; H is a multiple of N (grouped-query
            attention).
        phi_q, phi_k: features, or feature maps applied block by block; None for no linear branch. phi(k) has
            N heads or H, phi(q) has H. Keep to one of the two forms when resuming from a state.
        window: w, the number of last tokens the softmax sees; None for no window branch; 0 leaves only sinks.
        layout: ``sliding`` (keys i-w+1..i) or ``terraced`` (own block of w and the one before, blocks counted
            from each segment's first real token).
        mixing: name of a rule: ``convex``, ``competing``, ``calibrated``, ``shared`` or ``shared-affine``.
        gate: the window's weight g, gamma for ``shared``, linear attention's score l for ``competing`` and
            ``calibrated``; a number, or a tensor that broadcasts to [B, H, T].
        overlap: whether linear attention also covers the keys in the window.
        scale: factor on the scores; D ** -0.5 where None.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2; window branch only.
        key_mask: True for real tokens; what stands at the others does not matter, and their output is 0.
        segment_ids: id >= 0 of the sequence each token belongs to, one run of tokens per id; no branch looks
            across. `segment_ids_from_cu_seqlens` makes them from bounds.
        branches: which branches run, see `Branches`; both where None.
        sinks: the first so many real tokens of a segment join every window (and leave the linear branch's key
            set when disjoint).
        sink_logits: a learned score per head of attending to nothing (GPT-OSS): one more key in each window's
            softmax, of this score and value 0. Neither scaled nor soft-capped; no key of the linear branch.
        initial_state: where an earlier call with the same settings stopped.
        output_final_state: whether to return a state to resume from.
        reuse_state: the caller gives ``initial_state`` away: its sums may be updated in place. Only without
            gradients.
        chunk_size: queries per block; changes speed, not results.

    Returns:
        The output in q's dtype, and the state (None unless asked for).

    Raises:
        ValueError: arguments whose shapes or values do not fit together; the message says which and how.

    Source: arXiv 2510.05901 section 2 (convex), arXiv 2410.10254 (shared, terraced).
    """
    call = Call(
        q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, window=window, layout=layout, mixing=mixing, gate=gate,
        lagging=window is not None and not overlap, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap, key_mask=key_mask, segment_ids=segment_ids, branches=branches or _BOTH,
        sinks=sinks, state=initial_state, chunk_size=chunk_size, reuse_state=reuse_state,
        sink_logits=sink_logits,
    )  # fmt: skip
    check_arguments(call)
    # Entering a context costs as much as half a step of decoding.
    if not torch.is_autocast_enabled(q.device.type):
        return dispatch.run(call, output_final_state)
    with torch.autocast(q.device.type, enabled=False):
        return dispatch.run(call, output_final_state)


def window_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B N T D"],
    v: Float[Tensor, "B N T E"],
    *,
    window: int,
    layout: Layout = "sliding",
    scale: float | None = None,
    softcap: float | None = None,
    key_mask: Bool[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
    sinks: int = 0,
    sink_logits: Float[Tensor, " H"] | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    reuse_state: bool = False,
) -> tuple[Float[Tensor, "B H T E"], AttentionState | None]:
    """Softmax attention over the last ``window`` tokens and the sinks; arguments as in `hybrid_attention`."""
    return hybrid_attention(
        q, k, v, None, None, window=window, layout=layout, scale=scale, softcap=softcap, key_mask=key_mask,
        segment_ids=segment_ids, sinks=sinks, sink_logits=sink_logits, initial_state=initial_state,
        output_final_state=output_final_state, reuse_state=reuse_state,
    )  # fmt: skip


def linear_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B N T D"],
    v: Float[Tensor, "B N T E"],
    phi_q: Float[Tensor, "B H T F"] | FeatureMapLike,
    phi_k: Float[Tensor, "B M T F"] | FeatureMapLike,
    *,
    key_mask: Bool[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "B H T E"], AttentionState | None]:
    """Causal linear attention over all keys; arguments as in `hybrid_attention`."""
    return hybrid_attention(
        q, k, v, phi_q, phi_k, window=None, key_mask=key_mask, segment_ids=segment_ids,
        initial_state=initial_state, output_final_state=output_final_state,
    )  # fmt: skip
