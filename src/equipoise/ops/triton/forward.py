"""Launches the forward kernels. Shapes follow the legend in `equipoise.ops.types`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from equipoise.ops.stream_forward import empty_totals
from equipoise.ops.triton.forward_kernels import attend_kernel, fold_kernel
from equipoise.ops.triton.plan import Plan, plan
from equipoise.ops.types import AttentionState, Call


def run(call: Call, output_final_state: bool) -> tuple[Tensor, AttentionState | None]:
    """The output [B, H, T, E] in q's dtype, and the state after the last token if asked for."""
    out, _, state = run_with_totals(call, output_final_state, wanted=False)
    return out, state


def run_with_totals(
    call: Call, output_final_state: bool, *, wanted: bool = True
) -> tuple[Tensor, Tensor | None, AttentionState | None]:
    """As `equipoise.ops.stream_forward.run_with_totals`."""
    ready = plan(call)
    states, final = fold(ready, final=output_final_state)
    totals = empty_totals(ready.tracked) if wanted else None
    out = attend(ready, states, totals)
    return out, totals, ready.tracked.state(*final) if output_final_state else None


Sums = tuple[Tensor, Tensor]


def fold(ready: Plan, *, final: bool) -> tuple[Sums | None, tuple[Tensor | None, Tensor | None]]:
    """(S, z) before every chunk [B, M, chunks, F, E], [B, M, chunks, F]; and after the last token."""
    phi_k, tracked = ready.phi_k, ready.tracked
    if phi_k is None:
        return None, (None, None)
    state = tracked.call.state
    shape = (tracked.batch, ready.memories)
    sizes = (ready.features, tracked.value_size)
    states = phi_k.new_empty(*shape, ready.chunks, *sizes, dtype=tracked.dtype)
    states_z = phi_k.new_empty(*shape, ready.chunks, sizes[0], dtype=tracked.dtype)
    after, after_z = states, states_z
    if final:
        after, after_z = states.new_empty(*shape, *sizes), states.new_empty(*shape, sizes[0])
    before, before_z = states, states_z
    if state is not None and state.linear_state is not None and state.linear_normalizer is not None:
        before, before_z = state.linear_state.contiguous(), state.linear_normalizer.contiguous()
    blocks = ready.blocks()
    width = min(ready.config.values, blocks["BLOCK_E"])
    grid = (
        tracked.batch * ready.memories,
        ready.feature_blocks,
        triton.cdiv(sizes[1], width),
    )
    fold_kernel[grid](
        phi_k, ready.map_weights()[1], ready.v, *ready.tokens(), before, before_z, states, states_z, after,
        after_z,
        *phi_k.stride()[:3], *ready.v.stride()[:3], tracked.past + tracked.length, tracked.past, tracked.lag,
        ready.phi_shift, ready.chunks, ready.memories, ready.memories // tracked.kv_heads,
        **ready.only(
            "D", "E", "F", "C", "BLOCK_F", "STEP", "BLOCK_K", "CHUNK", "MAPPED", "HAS_VALID", "HAS_SEGMENTS",
            "OPERAND", "SUM",
        ),
        BLOCK_E=width, HAS_INITIAL=state is not None, HAS_FINAL=final, **ready.launch(),
    )  # fmt: skip
    return (states, states_z), (after, after_z) if final else (None, None)


def attend(ready: Plan, states: Sums | None, totals: Tensor | None = None) -> Tensor:
    """The mixed output [B, H, T, E] in q's dtype; ``totals`` ends up with the denominators' logarithms."""
    tracked, call = ready.tracked, ready.tracked.call
    out = torch.empty(
        tracked.batch, tracked.heads, tracked.length, tracked.value_size, dtype=call.q.dtype,
        device=call.q.device,
    )  # fmt: skip
    phi_q, phi_k, weight_window, weight_linear, sums, sums_z = present(ready, states)
    grid = (triton.cdiv(tracked.length, ready.config.queries), tracked.batch * tracked.heads)
    attend_kernel[grid](
        ready.q, ready.k, ready.v, phi_q, phi_k, *ready.map_weights(), weight_window, weight_linear,
        *ready.tokens(), sums, sums_z, out, out if totals is None else totals, *ready.q.stride()[:3],
        *ready.k.stride()[:3],
        *ready.v.stride()[:3], *phi_q.stride()[:3], *phi_k.stride()[:3], *weight_window.stride()[:3],
        *weight_linear.stride()[:3],
        tracked.past + tracked.length, tracked.past, call.window or 0, tracked.lag, ready.phi_shift,
        ready.chunks, call.scale, call.softcap or 1.0, tracked.heads, tracked.kv_heads, ready.memories,
        **ready.blocks(), **ready.flags(), HAS_TOTALS=totals is not None, **ready.launch(),
    )  # fmt: skip
    return out


def present(ready: Plan, states: Sums | None) -> tuple[Tensor, ...]:
    """Features, weights and states; any tensor where there is none: the kernel is compiled without it."""
    found = (
        ready.phi_q, ready.phi_k, ready.weights.window, ready.weights.linear, *(states or (None, None))
    )  # fmt: skip
    return tuple(ready.q if x is None else x for x in found)
