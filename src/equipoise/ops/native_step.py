"""One step of decoding in one call of compiled C, where it was built; see `native/step.c`.

Takes over from `equipoise.ops.step` for float32 and bfloat16 on CPU when the caller hands its state over:
all of it is then updated in place, and comes back as the new one.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from equipoise.ops.mix import EPSILON
from equipoise.ops.types import AttentionState, Call, FeatureMapLike

LARGEST = 1 << 21
"""Elements of S, all rows together, beyond which PyTorch's own threads win over one."""


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("equipoise.ops._native")
    except ImportError:  # no compiler at installation
        return None


NATIVE: Any = _load()
MIXINGS = ("convex", "shared", "calibrated")
"""In the order of the numbers they have in C."""


def supports(call: Call) -> bool:
    """Whether a call that `equipoise.ops.step` supports can run here."""
    state = call.state
    if NATIVE is None or state is None or not call.reuse_state or call.q.device.type != "cpu":
        return False
    dtype = call.q.dtype
    return (
        (dtype is torch.float32 or dtype is torch.bfloat16)
        and call.k.dtype is call.v.dtype is state.keys.dtype is state.values.dtype is dtype
        and (torch.is_inference_mode_enabled() or not state.keys.is_inference())
        and (not call.sinks or _has_sinks(state))
        and (call.phi_k is None or _has_sums(state))
    )


def _has_sinks(state: AttentionState) -> bool:
    """Whether the sinks are there, of types that C takes."""
    keys, values, valid, ranks = state.sink_keys, state.sink_values, state.sink_valid, state.ranks
    return (
        keys is not None
        and values is not None
        and valid is not None
        and ranks is not None
        and keys.dtype is values.dtype is state.keys.dtype
        and ranks.dtype is torch.int64
        and (torch.is_inference_mode_enabled() or not keys.is_inference())
    )


def _has_sums(state: AttentionState) -> bool:
    """Whether S and z are there, of types and a size that C takes."""
    total, normalizer, folded = state.linear_state, state.linear_normalizer, state.folded
    if total is None or normalizer is None or folded is None or state.features is not None:
        return False
    return (
        total.dtype is normalizer.dtype is torch.float32
        and folded.dtype is torch.int64
        and (torch.get_num_threads() == 1 or total.numel() <= LARGEST)
        and (torch.is_inference_mode_enabled() or not total.is_inference())
    )


def run(call: Call) -> tuple[Tensor, AttentionState]:
    """The output [B, H, 1, E] in q's dtype, and the state after the token.

    It is the one before it, changed, unless that had to be laid out in order first.
    """
    assert call.state is not None
    state = _contiguous(call.state)
    batch, heads, _, size = call.q.shape
    _, kv_heads, history, value_size = state.values.shape
    q, k, v = _plain(call.q), call.k.contiguous(), call.v.contiguous()
    linear = _linear(call, state, v)
    memories, features = (0, 0) if linear is None else linear[3].shape[1:3]
    far = (0,) * 6 if linear is None else tuple(tensor.data_ptr() for tensor in linear)
    gate, weight = (None, 1.0) if linear is None else _gate(call)
    out = torch.empty(batch, heads, 1, value_size)
    behind = (state.sink_keys, state.sink_values, state.sink_valid, state.ranks) if call.sinks else ()
    pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in behind) or (0,) * 4
    sink = None if call.sink_logits is None else _plain(call.sink_logits)
    NATIVE.step(
        (batch, kv_heads, heads // kv_heads, memories, history, size, value_size, features, call.sinks),
        (
            q.data_ptr(), k.data_ptr(), v.data_ptr(), *far[:3], 0 if gate is None else gate.data_ptr(),
            state.keys.data_ptr(), state.values.data_ptr(), state.valid.data_ptr(), *far[3:], out.data_ptr(),
            *pointers,
        ),
        (call.scale, call.softcap or 0.0, EPSILON, weight),
        (call.q.dtype is torch.bfloat16, call.lagging, MIXINGS.index(call.mixing)),
        0 if sink is None else sink.data_ptr(),
    )  # fmt: skip
    return (out if call.q.dtype is torch.float32 else out.to(call.q.dtype)), state


def _linear(call: Call, state: AttentionState, v: Tensor) -> tuple[Tensor, ...] | None:
    """phi(q), phi(k) and v of the key to be folded, S, z and the count of keys; None for a window alone."""
    if call.phi_k is None:
        return None
    total, normalizer, folded = state.linear_state, state.linear_normalizer, state.folded
    assert total is not None
    assert normalizer is not None
    assert folded is not None
    if call.lagging:
        fold_phi, fold_v = (
            _map(call.phi_k, state.keys[:, :, :1]) * state.valid[:, None, :1, None],
            state.values[:, :, :1].to(torch.float32, copy=True).contiguous(),
        )
    else:
        fold_phi, fold_v = _map(call.phi_k, call.k), _plain(v)
    return _map(call.phi_q, call.q), fold_phi, fold_v, total, normalizer, folded


def _contiguous(state: AttentionState) -> AttentionState:
    """The state itself; a copy laid out in order where a prefill or another path's step left views."""
    tensors = (
        state.keys, state.values, state.valid, state.linear_state, state.linear_normalizer, state.folded,
        state.sink_keys, state.sink_values, state.sink_valid, state.ranks,
    )  # fmt: skip
    if all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return state
    return state.map(torch.Tensor.contiguous)


def _gate(call: Call) -> tuple[Tensor | None, float]:
    """The window's weight per head and row [B, H, 1], or one number for all."""
    if not isinstance(call.gate, Tensor):
        return None, call.gate
    return call.gate.to(torch.float32).expand(*call.q.shape[:2], 1).contiguous(), 0.0


def _plain(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _map(phi: Tensor | FeatureMapLike | None, tokens: Tensor) -> Tensor:
    assert phi is not None
    return _plain(phi if isinstance(phi, Tensor) else phi(tokens.to(torch.float32)))
