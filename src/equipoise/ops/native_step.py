"""One step of decoding in one call of compiled C, where it was built; see `native/step.c`.

Takes over from `equipoise.ops.step` for float32 and bfloat16 on CPU when the caller hands its state over,
which is then updated in place: the returned state shares its memory.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
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


def supports(call: Call) -> bool:
    """Whether a call that `equipoise.ops.step` supports can run here."""
    state = call.state
    if NATIVE is None or state is None or not call.reuse_state or call.q.device.type != "cpu":
        return False
    total, normalizer = state.linear_state, state.linear_normalizer
    if total is None or normalizer is None or state.folded is None or state.features is not None:
        return False
    kinds = (torch.float32, torch.bfloat16)
    tensors = (state.keys, state.values, state.valid, total, normalizer)
    return (
        call.q.dtype in kinds
        and call.q.dtype == call.k.dtype == call.v.dtype == state.keys.dtype == state.values.dtype
        and total.dtype == normalizer.dtype == torch.float32
        and all(tensor.is_contiguous() for tensor in tensors)
        and (torch.get_num_threads() == 1 or total.numel() <= LARGEST)
        and (torch.is_inference_mode_enabled() or not total.is_inference())
    )


def run(call: Call) -> tuple[Tensor, AttentionState]:
    """The output [B, H, 1, E] in q's dtype, and the state after the token, in the earlier one's memory."""
    state = call.state
    assert state is not None
    total, normalizer, folded = state.linear_state, state.linear_normalizer, state.folded
    assert total is not None
    assert normalizer is not None
    assert folded is not None
    batch, heads, _, size = call.q.shape
    kv_heads, value_size = call.k.shape[1], call.v.shape[3]
    memories, features = total.shape[1], total.shape[2]
    q, k, v = _plain(call.q), call.k.contiguous(), call.v.contiguous()
    phi_q = _map(call.phi_q, call.q)
    count: int | Tensor = 1
    if call.lagging:
        fold_phi, fold_v = _map(call.phi_k, state.keys[:, :, :1]), _plain(state.values[:, :, :1])
        fold_phi = fold_phi * state.valid[:, None, :1, None]
        count = state.valid[:, 0].long()
    else:
        fold_phi, fold_v = _map(call.phi_k, call.k), _plain(call.v)
    gate = torch.as_tensor(call.gate, dtype=torch.float32).expand(batch, heads, 1).contiguous()
    sees = (folded > 0).contiguous() if call.lagging else None
    history = state.keys.shape[2]
    out = torch.empty(batch, heads, 1, value_size)
    scratch = torch.empty(history + 1 + 2 * value_size)
    sizes = (batch, kv_heads, heads // kv_heads, memories, history, size, value_size, features)
    tensors = (
        q, k, v, phi_q, fold_phi, fold_v, gate, state.keys, state.values, state.valid, total, normalizer, out,
        scratch,
    )  # fmt: skip
    NATIVE.step(
        sizes,
        (*(tensor.data_ptr() for tensor in tensors), 0 if sees is None else sees.data_ptr()),
        (call.scale, call.softcap or 0.0, EPSILON),
        (call.q.dtype == torch.bfloat16, call.lagging, call.mixing == "shared"),
    )
    return out.to(call.q.dtype), replace(state, folded=folded + count)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _map(phi: Tensor | FeatureMapLike | None, tokens: Tensor) -> Tensor:
    assert phi is not None
    return _plain(phi if isinstance(phi, Tensor) else phi(tokens.to(torch.float32)))
