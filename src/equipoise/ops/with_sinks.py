"""Sinks beside the fast paths, which know none: attention to them by itself, merged into their softmax.

A softmax over two sets of keys is the mean of the softmax over each, weighted by their denominators; the
fast paths give the logarithm of theirs. Of the sinks, a window holds those that it reaches itself; what is
computed here are the others. Shapes follow the legend in `equipoise.ops.types`; P is the number of sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equipoise.ops.sinks import Sinks
from equipoise.ops.stream import HIDDEN
from equipoise.ops.tokens import Tokens, index_tokens, last_slots
from equipoise.ops.types import AttentionState, Call, accumulation_dtype, needs_gradient

Attend = Callable[[Call, bool], tuple[Tensor, Tensor | None, AttentionState | None]]
"""A fast path: given a call without sinks, and whether the logarithms of the denominators are wanted, it
returns the output, those, and the state where that is."""


def run(
    call: Call, forward: Any, backward: Any, output_final_state: bool
) -> tuple[Tensor, AttentionState | None]:
    """The output [B, H, T, E] in q's dtype, and the state after the last token if asked for.

    For a sliding window over keys that linear attention sees too. ``forward`` and ``backward`` are modules of
    a fast path that have `run_with_totals`, the second for calls that want gradients.
    """

    def attend(part: Call, totals: bool) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        if needs_gradient(part):
            return *backward.run_with_totals(part, wanted=totals), None
        return forward.run_with_totals(part, output_final_state, wanted=totals)

    tokens = index_tokens(
        batch=call.q.shape[0], length=call.q.shape[2], device=call.q.device, key_mask=call.key_mask,
        segment_ids=call.segment_ids, state=call.state, sinks=call.sinks, layout=call.layout,
    )  # fmt: skip
    if call.phi_k is None or call.mixing == "calibrated":
        out, state = _merged(call, tokens, attend)
    else:
        out, state = _convex(call, tokens, attend)
    if call.key_mask is not None:
        out = out.masked_fill(~call.key_mask[:, None, :, None], 0)
    return out.to(call.q.dtype), None if state is None else _with_sinks(call, tokens, state)


def _convex(call: Call, tokens: Tokens, attend: Attend) -> tuple[Tensor, AttentionState | None]:
    """Each branch by itself, and their mean."""
    near, state = _merged(replace(call, phi_q=None, phi_k=None), tokens, attend)
    before = None if call.state is None else _last_token(call.state)
    linear = replace(call, window=None, sinks=0, sink_logits=None, softcap=None, state=before)
    far, _, sums = attend(linear, False)
    gate = torch.as_tensor(call.gate, dtype=near.dtype, device=near.device)
    out = torch.lerp(far.to(near.dtype), near, gate.expand(near.shape[:3])[..., None])
    if state is not None and sums is not None:
        state = replace(
            state, linear_state=sums.linear_state, linear_normalizer=sums.linear_normalizer,
            folded=sums.folded, folded_segment=sums.folded_segment,
        )  # fmt: skip
    return out, state


def _merged(call: Call, tokens: Tokens, attend: Attend) -> tuple[Tensor, AttentionState | None]:
    """The output of the fast path with what its windows have left behind, in the dtype of sums."""
    out, total, state = attend(replace(call, sinks=0), True)
    assert total is not None
    places, seen = _left_behind(call, tokens)
    queries = call.q if call.key_mask is None else _zeroed(call.q, call.key_mask)
    clean = (queries, *_held(call, sinks=True))
    if tokens.segments is None:
        return _joined(call, out, total, clean, places[:, -1:], seen), state
    if not torch.is_grad_enabled():
        return _joined(call, out, total, clean, places, seen), state
    # every row has sinks of its own: made again on the way back rather than kept
    found = checkpoint(
        _joined, call, out, total, clean, places, seen, use_reentrant=False, preserve_rng_state=False
    )
    assert isinstance(found, Tensor)
    return found, state


def _zeroed(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.masked_fill(~mask[:, None, :, None], 0)


def _held(call: Call, *, sinks: bool) -> list[Tensor]:
    """Keys and values on one axis: the sinks of the state if wanted, its other tokens, the new ones."""
    found = [x if call.key_mask is None else _zeroed(x, call.key_mask) for x in (call.k, call.v)]
    state = call.state
    if state is None:
        return found
    found = [torch.cat(pair, 2) for pair in zip((state.keys, state.values), found, strict=True)]
    if sinks and state.sink_keys is not None and state.sink_values is not None:
        found = [torch.cat(pair, 2) for pair in zip((state.sink_keys, state.sink_values), found, strict=True)]
    return found


def _last_token(state: AttentionState) -> AttentionState:
    """What linear attention goes on from, which looks back at no window."""
    last = slice(-1, None)
    return AttentionState(
        keys=state.keys[:, :, last], values=state.values[:, :, last], valid=state.valid[:, last],
        segments=None if state.segments is None else state.segments[:, last],
        linear_state=state.linear_state, linear_normalizer=state.linear_normalizer, folded=state.folded,
        folded_segment=state.folded_segment,
    )  # fmt: skip


def _left_behind(call: Call, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Where each new token's sinks are on the axis of `_held` [B, T, P], and which of them its window does
    not reach [B, T, P]."""
    assert tokens.ranks is not None
    assert call.window is not None
    rows = torch.arange(tokens.length, device=call.q.device)[None, :, None]
    chosen = tokens.ranks[..., None] == torch.arange(call.sinks, device=rows.device)
    if tokens.valid is not None:
        chosen = chosen & tokens.valid[..., None]
    # ranks start again with every segment, so that the last place of a rank is the row's own, or too early
    places = torch.where(chosen, rows, -1).cummax(1).values[:, tokens.history :]
    rows, there = rows[:, tokens.history :], places >= 0
    places = places.clamp_min(0)
    segments = None if tokens.segments is None else tokens.segments[:, tokens.history :, None]
    if tokens.segments is not None:
        own = tokens.segments.gather(1, places.flatten(1)).view_as(places)
        there = there & (own == segments)
    seen = there & (rows - places >= call.window)
    state = call.state
    if state is None or state.sink_valid is None:
        return places, seen
    kept = state.sink_valid[:, None]
    if segments is not None and state.sink_segment is not None:
        kept = kept & (segments == state.sink_segment[:, None, None])
    slots = torch.arange(call.sinks, device=rows.device)
    return torch.where(kept, slots, places + call.sinks), seen | kept


def _joined(
    call: Call, out: Tensor, total: Tensor, tensors: tuple[Tensor, ...], places: Tensor, seen: Tensor
) -> Tensor:
    """The softmax over both sets of keys. ``places`` [B, T or 1, P]: of every row, or the same for all."""
    dtype = accumulation_dtype(call.q.dtype)
    q, k, v = tensors
    keys, values = (_taken(x, places).to(dtype) for x in (k, v))
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1)) * call.scale  # [B, N, H / N, T, D]
    scores = _by_row(grouped, keys.mT).flatten(1, 2)
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    # not -inf, which no gradient of a row without sinks would survive
    scores = scores.masked_fill(~seen[:, None], HIDDEN)
    joint = torch.logaddexp(total, scores.logsumexp(-1, keepdim=True))
    weights = (scores - joint).exp().unflatten(1, (k.shape[1], -1))
    return out.to(dtype) * (total - joint).exp() + _by_row(weights, values).flatten(1, 2)


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    """[B, N, T, D] at places [B, t, P] -> [B, N, t, P, D]."""
    index = places.flatten(1)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index).unflatten(2, places.shape[1:])


def _by_row(rows: Tensor, matrices: Tensor) -> Tensor:
    """[B, N, G, T, X] times [B, N, T, X, Y], or [B, N, 1, X, Y] for all rows -> [B, N, G, T, Y]."""
    if matrices.shape[2] == 1:
        return rows @ matrices
    return (rows.transpose(2, 3) @ matrices).transpose(2, 3)


def _with_sinks(call: Call, tokens: Tokens, state: AttentionState) -> AttentionState:
    """The state with the sinks that the last window has left behind, as `equipoise.ops.walk` leaves it."""
    assert tokens.ranks is not None
    keys, values = _held(call, sinks=False)
    history = state.keys.shape[2]
    sinks = Sinks.of(call.state).leave(
        max(0, tokens.length - history), call.sinks, keys, values, None, tokens
    )
    sinks = sinks.or_empty(call.sinks, keys, values, None, tokens.segments is not None)
    return replace(
        state, ranks=last_slots(tokens.ranks, history, 1), sink_keys=sinks.keys, sink_values=sinks.values,
        sink_valid=sinks.valid, sink_segment=sinks.segment,
    )  # fmt: skip
