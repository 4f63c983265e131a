"""The delta rule: linear attention whose state forgets what it says of a key before it takes in the value.

Shapes follow the legend in `equipoise.ops.types`; h heads of q, and N of k and v, which divide h: each of
them, and its state, is shared by h / N consecutive query heads.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.ops import delta_kernels, dispatch
from equipoise.ops.checks import check_delta
from equipoise.ops.types import AttentionState, FeatureMapLike, accumulation_dtype

CHUNK = 64
"""Tokens that are solved for at once: one triangular system of so many rows a head."""
FEWEST = 16
"""Tokens that kernels are worth starting for; decoding has one."""
SHORTEST = 1e-12
"""Least length by which a key's features are divided; shorter ones write next to nothing anyway."""


def delta_attention(
    q: Float[Tensor, "B h T D"],
    k: Float[Tensor, "B N T D"],
    v: Float[Tensor, "B N T E"],
    phi_q: Float[Tensor, "B h T F"] | FeatureMapLike,
    phi_k: Float[Tensor, "B N T F"] | FeatureMapLike,
    *,
    key_mask: Bool[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    chunk_size: int = CHUNK,
) -> tuple[Float[Tensor, "B h T E"], AttentionState | None]:
    """o_t = S_t^T phi(q_t), where S_t = S_{t-1} + b_t u_t (v_t - S_{t-1}^T u_t)^T and b_t u_t = phi(k_t).

    u_t has length 1 and b_t, the length of phi(k_t), says how much of what S answers to the key is replaced
    by the value: 1 all of it, 0 nothing. There is no normaliser: S alone is the state, F x E numbers for each
    head of k. Where additive states mix the values of keys that look alike, this one holds as many keys
    exactly as it has features. Chunks of tokens are one triangular system each, so that only chunks follow
    one another. On a GPU and in 16 bits, calls of `FEWEST` tokens or more go to flash-linear-attention's
    kernels where it is installed (`equipoise.ops.delta_kernels`), which round more.

    Args:
        q, k, v: after rotary embedding.
        phi_q, phi_k: features, or maps. phi(k) no longer than 1; beyond 2 the state grows without bound.
        key_mask: True for real tokens; others write nothing, and their output is 0.
        segment_ids: id >= 0 of the sequence of each token, one run of tokens per id; no query looks across.
        initial_state: where an earlier call stopped.
        output_final_state: whether to return a state to resume from.
        chunk_size: of our own chunks; changes speed, not results.

    Returns:
        The output in q's dtype, and the state: S as ``linear_state``, no normaliser.

    Raises:
        ValueError: arguments that do not fit together.

    Source: arXiv 2102.11174 (the rule), arXiv 2406.06484 equations 8 to 11 (chunks).
    """
    check_delta(q, k, v, key_mask, segment_ids, initial_state)
    with torch.autocast(q.device.type, enabled=False):
        return _run(
            q, k, v, phi_q, phi_k, key_mask, segment_ids, initial_state, output_final_state, chunk_size
        )


def _run(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Any, phi_k: Any, key_mask: Tensor | None,
    segment_ids: Tensor | None, state: AttentionState | None, keep: bool, chunk_size: int,
) -> tuple[Tensor, AttentionState | None]:  # fmt: skip
    dtype = accumulation_dtype(q.dtype)
    k, v = (_clean(x, key_mask) for x in (k, v))
    queries, keys = (
        phi.to(dtype) if isinstance(phi, Tensor) else phi(x.to(dtype)) for phi, x in ((phi_q, q), (phi_k, k))
    )
    shared = queries.shape[1] // k.shape[1]
    queries = queries.unflatten(1, (-1, shared))  # [B, N, h / N, T, F]
    keys, values = _clean(keys, key_mask), v.to(dtype)
    units = keys / keys.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)
    segments, last = _segments(key_mask, segment_ids, state, q)
    sums = None if state is None else state.linear_state
    if sums is None:
        sums = keys.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1])
    if _by_kernels(q, keys, values):
        strength = (keys * units).sum(-1, keepdim=True)
        rows = delta_kernels.Rows(queries, units, strength, values, segments)
        out, sums = delta_kernels.run(rows, sums, last, q.dtype)
        last = last if segments is None else segments[:, -1]
    else:
        out, sums, last = _chunks(queries, keys, units, values, sums, segments, last, chunk_size)
    out = _clean(out.flatten(1, 2).to(q.dtype), key_mask)
    if not keep:
        return out, None
    valid = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    folded = valid.sum(1) + (0 if state is None or state.folded is None else state.folded)
    return out, AttentionState(
        keys=k[:, :, -1:].clone(), values=v[:, :, -1:].clone(), valid=valid[:, -1:].clone(),
        segments=None if segment_ids is None else segment_ids[:, -1:].clone(), linear_state=sums,
        folded=folded, folded_segment=last,
    )  # fmt: skip


def _by_kernels(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether flash-linear-attention's kernels can run a call; says once why not, on a GPU."""
    if q.shape[2] < FEWEST or not dispatch.may_use_kernels():
        return False
    reason = delta_kernels.unsupported(q.device, q.dtype, keys.shape[-1], values.shape[-1])
    if reason is not None and q.device.type == "cuda":
        dispatch.say(reason)
    return reason is None


def _chunks(
    queries: Tensor, keys: Tensor, units: Tensor, values: Tensor, sums: Tensor, segments: Tensor | None,
    last: Tensor | None, size: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Output [B, N, h / N, T, E], S after it, and the segment that S is of, chunk by chunk."""
    outs: list[Tensor] = []
    for start in range(0, keys.shape[2], size):
        part = slice(start, start + size)
        own = None if segments is None else segments[:, part]
        out, sums = _chunk(
            queries[:, :, :, part], keys[:, :, part], units[:, :, part], values[:, :, part], sums, own, last
        )
        last = None if own is None else own[:, -1]
        outs.append(out)
    return torch.cat(outs, 3), sums, last


def _chunk(
    queries: Tensor, keys: Tensor, units: Tensor, values: Tensor, sums: Tensor, segments: Tensor | None,
    last: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and S after a chunk. With X the rows that S takes in, (I + tril(K U^T, -1)) X = |K| V - K S."""
    overlaps, scores = (keys @ units.mT).tril(-1), (queries @ units.mT[:, :, None]).tril()
    known, read, carried, held = keys, queries, sums, units
    if segments is not None:
        assert last is not None
        same = (segments[:, :, None] == segments[:, None])[:, None]
        earlier = (segments == last[:, None])[:, None, :, None].to(keys.dtype)  # may see what S holds
        overlaps, scores = overlaps * same, scores * same[:, None]
        known, read = keys * earlier, queries * earlier[:, None]
        carried = sums * (segments[:, -1] == last)[:, None, None, None]
        held = units * (segments == segments[:, -1:])[:, None, :, None]
    strength = (keys * units).sum(-1, keepdim=True)  # |K|, with a gradient where it is 0
    taken = torch.linalg.solve_triangular(
        overlaps + torch.eye(keys.shape[2], dtype=keys.dtype, device=keys.device),
        strength * values - known @ sums, upper=False, unitriangular=True,
    )  # fmt: skip
    out = read @ sums[:, :, None] + scores @ taken[:, :, None]
    return out, carried + held.mT @ taken


def _clean(tensor: Tensor, key_mask: Tensor | None) -> Tensor:
    return tensor if key_mask is None else tensor.masked_fill(~key_mask[:, None, :, None], 0)


def _segments(
    key_mask: Tensor | None, segment_ids: Tensor | None, state: AttentionState | None, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The segment of the latest real token at each token [B, T], and the one that the state is of [B].

    Padding belongs to no segment: what stands before it goes on behind it.
    """
    if segment_ids is None:
        return None, None
    before = None if state is None else state.folded_segment
    before = segment_ids.new_full(segment_ids.shape[:1], -1) if before is None else before
    if key_mask is None:
        return segment_ids, before
    slots = torch.arange(1, q.shape[2] + 1, device=q.device)
    latest = torch.where(key_mask, slots, 0).cummax(1).values
    return torch.cat([before[:, None], segment_ids], 1).gather(1, latest), before
