"""Launches the kernel of one step of decoding. Shapes follow the legend in `equipoise.ops.types`."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import triton
from torch import Tensor

from equipoise.ops.triton.plan import TYPES, mapped, padded
from equipoise.ops.triton.step_kernel import step_kernel
from equipoise.ops.types import AttentionState, Call, accumulation_dtype

VALUES, FEATURES, TOKENS = 32, 32, 64
"""Columns and rows of S, and tokens of the window, that a program holds at a time."""
SLOTS = 16
"""Tokens that wait beside S and are folded at once; products need 16."""


def run(call: Call) -> tuple[Tensor, AttentionState]:
    """The output [B, H, 1, E] in q's dtype, and the state after the token.

    Where the caller gives its state away, S is updated in place, once for `SLOTS` tokens, which wait beside
    it until then; the rest of the state is new memory.
    """
    state, dtype = cast(AttentionState, call.state), accumulation_dtype(call.q.dtype)
    assert state.linear_state is not None
    # a tensor made in inference mode cannot be changed outside of it
    in_place = call.reuse_state and (
        torch.is_inference_mode_enabled() or not state.linear_state.is_inference()
    )
    if not in_place:
        state = state.settled()
    sums, totals, folded = state.linear_state, state.linear_normalizer, state.folded
    assert sums is not None
    assert totals is not None
    assert folded is not None
    batch, heads, _, size = call.q.shape
    memories, features, value_size = sums.shape[1:]
    history = state.keys.shape[2]
    from_state = call.lagging and isinstance(call.phi_k, Tensor)
    phi_q, phi_k = _features(call, state)
    sums = sums.contiguous()
    new_valid = torch.empty_like(state.valid, dtype=torch.int8)
    held = state.features if from_state and state.features is not None else phi_k
    after = {
        "keys": _empty(state.keys), "values": _empty(state.values),
        "linear_state": sums if in_place else _empty(sums), "linear_normalizer": _empty(totals),
        "folded": torch.empty_like(folded),
    }  # fmt: skip
    waiting = _waiting(state, phi_k, call) if in_place else (folded, phi_k, call.v)
    new_waiting = torch.empty_like(waiting[0])
    if in_place:
        after |= {"pending": new_waiting, "pending_features": waiting[1], "pending_values": waiting[2]}
    new_features = _empty(held) if from_state else held
    gate = torch.as_tensor(call.gate, dtype=dtype, device=call.q.device).expand(batch, heads, 1)
    out = torch.empty(batch, heads, 1, value_size, dtype=call.q.dtype, device=call.q.device)
    width = min(VALUES, padded(value_size))
    step_kernel[(batch * memories, triton.cdiv(value_size, width))](
        *(x.contiguous() for x in (call.q, call.k, call.v, phi_q, phi_k)), gate,
        state.keys.contiguous(), state.values.contiguous(), state.valid.contiguous().view(torch.int8),
        held.contiguous(), sums, totals.contiguous(), folded, *waiting, out, after["keys"], after["values"],
        new_valid, new_features, after["linear_state"], after["linear_normalizer"], after["folded"],
        new_waiting, *gate.stride()[:2],
        call.scale, call.softcap or 1.0, heads, call.k.shape[1], memories,
        D=size, E=value_size, F=features, R=history, BLOCK_D=padded(size), BLOCK_E=width,
        BLOCK_F=min(FEATURES, padded(features)), BLOCK_R=min(TOKENS, padded(history + 1)),
        HEADS=padded(heads // memories), SLOTS=SLOTS, BATCHED=in_place, SHARED=call.mixing == "shared",
        CALIBRATED=call.mixing == "calibrated", LAGGING=call.lagging, FROM_STATE=from_state,
        HAS_CAP=call.softcap is not None, SUM=TYPES[dtype], num_warps=4, num_stages=1,
    )  # fmt: skip
    if from_state:
        after["features"] = new_features
    return out, replace(state, valid=new_valid.view(torch.bool), **after)


def _waiting(state: AttentionState, phi_k: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """How many tokens wait beside S, their features and values: the state's, or empty ones."""
    waiting, features, values = state.pending, state.pending_features, state.pending_values
    if waiting is not None and features is not None and values is not None:
        return waiting, features.contiguous(), values.contiguous()
    batch, kv_heads, _, value_size = call.v.shape
    return (
        torch.zeros(batch, dtype=torch.int32, device=call.q.device),
        phi_k.new_empty(batch, phi_k.shape[1], SLOTS, phi_k.shape[3]),
        call.v.new_empty(batch, kv_heads, SLOTS, value_size),
    )


def _features(call: Call, state: AttentionState) -> tuple[Tensor, Tensor]:
    """phi(q), and phi(k) of the new token, or, where that is computed, of the key that is folded now."""
    phi_q, phi_k = call.phi_q, call.phi_k
    assert phi_q is not None
    assert phi_k is not None
    if not isinstance(phi_q, Tensor):
        phi_q = mapped(phi_q, call.q, call)
    if not isinstance(phi_k, Tensor):
        phi_k = mapped(phi_k, state.keys[:, :, :1] if call.lagging else call.k, call)
    return phi_q, phi_k


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
