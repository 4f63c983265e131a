"""Outputs with gradients: the forward kernels, and four kernels that compute everything again for the way
back. Memory beyond inputs and gradients: S and its gradient once a chunk, seven numbers a row and the
gradient of v in float32. Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from equipoise.ops.stream import Weights
from equipoise.ops.stream_forward import empty_totals, mixing_weights
from equipoise.ops.triton.backward_kernels import rows_kernel, unfold_kernel
from equipoise.ops.triton.configs import using
from equipoise.ops.triton.forward import Sums, attend, fold, present
from equipoise.ops.triton.key_kernels import linear_keys_kernel, window_keys_kernel
from equipoise.ops.triton.mapped_key_kernels import mapped_keys_kernel
from equipoise.ops.triton.plan import Plan, Tracked, map_weights, mapped, plan
from equipoise.ops.types import Call, FeatureMapLike


def run(call: Call) -> Tensor:
    """The output [B, H, T, E], differentiable in q, k, v, the features and the gate; without states.

    Hedgehog maps are computed inside the kernels, both ways, where the configuration says so; the features of
    others are made here.
    """
    return run_with_totals(call, wanted=False)[0]


def run_with_totals(call: Call, *, wanted: bool = True) -> tuple[Tensor, Any]:
    """The same and, where wanted, `forward.run_with_totals`' logarithms, differentiable too."""
    maps = map_weights(call)
    if maps is None:
        maps = _features(call.phi_q, call.q, call), _features(call.phi_k, call.k, call)
        call = replace(call, phi_q=maps[0], phi_k=maps[1])
    weights = mixing_weights(Tracked(call))
    return _Attend.apply(  # pyright: ignore[reportReturnType]
        call.q, call.k, call.v, *maps, weights.window, weights.linear, call, wanted
    )


def _features(phi: Tensor | FeatureMapLike | None, tokens: Tensor, call: Call) -> Tensor | None:
    """Features of all tokens, so that autograd knows how they came about; of 0 where there is padding."""
    if phi is None or isinstance(phi, Tensor):
        return phi
    clean = tokens if call.key_mask is None else tokens.masked_fill(~call.key_mask[:, None, :, None], 0)
    return mapped(phi, clean, call)


class _Attend(torch.autograd.Function):
    """phi_q and phi_k are features [B, heads, T, F], or weights of maps [heads, D, C]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None, phi_k: Tensor | None,
        weight_window: Tensor | None, weight_linear: Tensor | None, call: Call, totals: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        inputs = q, k, v, phi_q, phi_k, weight_window, weight_linear
        ready = _ready(call, inputs)
        ctx.save_for_backward(*inputs)
        ctx.call = replace(call, q=q.detach(), k=k.detach(), v=v.detach(), gate=0.5)
        if ready.maps is None:
            ctx.call = replace(ctx.call, phi_q=None, phi_k=None)
        ctx.config = ready.config
        logarithms = empty_totals(ready.tracked) if totals else None
        return attend(ready, fold(ready, final=False)[0], logarithms), logarithms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        assert grads[0] is not None
        total = None if grads[1] is None else grads[1].contiguous()
        with using(ctx.config), torch.autocast(grads[0].device.type, enabled=False):
            found = _backward(_ready(ctx.call, inputs), grads[0].contiguous(), total)
        return *(_fit(total, like) for total, like in zip(found, inputs, strict=True)), None, None


def _ready(call: Call, inputs: tuple[Tensor | None, ...]) -> Plan:
    q, k, v, phi_q, phi_k, weight_window, weight_linear = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    call, weights = replace(call, q=q, k=k, v=v), Weights(weight_window, weight_linear)
    if phi_q is not None and phi_k is not None and phi_q.ndim == 3:
        return plan(call, weights, (phi_q, phi_k))
    return plan(replace(call, phi_q=phi_q, phi_k=phi_k), weights)


def _fit(total: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient in the form of its input: weights may be one number for all rows."""
    if total is None or like is None:
        return None
    if like.shape[2] == 1 and total.shape[2] != 1:
        total = total.sum(2, keepdim=True)
    return total.to(like.dtype)


@dataclass(frozen=True)
class _Rows:
    """Numbers of every query [B, H, T] that the kernels of keys need."""

    shift: Tensor
    pull: Tensor
    drift: Tensor
    excess: Tensor
    largest: Tensor
    far_pull: Tensor
    far_drift: Tensor


def _backward(ready: Plan, grad: Tensor, total: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, phi_q, phi_k and the branches' weights; None where one has no part.

    ``grad`` is of the output, ``total`` of the denominators' logarithms where they were given.
    """
    tracked, flags = ready.tracked, ready.flags()
    has_window, has_linear = flags["HAS_WINDOW"], flags["HAS_LINEAR"]
    per_row = (tracked.batch, tracked.heads, tracked.length)
    rows = _Rows(*(grad.new_empty(per_row, dtype=torch.int32 if i == 4 else tracked.dtype) for i in range(7)))
    grad_q = torch.empty(ready.q.shape, dtype=ready.q.dtype, device=grad.device) if has_window else None
    grad_phi_q = _features_like(ready, 0) if has_linear else None
    weights = tuple(grad.new_empty(per_row, dtype=tracked.dtype) for _ in range(2))
    states = fold(ready, final=False)[0] if has_linear else None
    _rows(ready, (grad, total), rows, grad_q, grad_phi_q, weights, states)
    grad_v = torch.empty(ready.v.shape, dtype=tracked.dtype, device=grad.device)
    grad_k = _window_keys(ready, grad, rows, grad_v) if has_window else None
    grad_phi_k = _linear_keys(ready, grad, rows, grad_v) if has_linear else None
    if not has_window and not has_linear:
        grad_v.zero_()
    if ready.maps is not None and grad_phi_q is not None and grad_phi_k is not None:
        grad_q, grad_phi_q = _through_map(ready, ready.q, ready.maps[0], grad_phi_q, grad_q)
        grad_k, grad_phi_k = _through_map(ready, ready.k, ready.maps[1], grad_phi_k, grad_k)
    window = weights[0][..., None] if has_window else None
    linear = weights[1][..., None] if has_linear and not tracked.joint else None
    return grad_q, grad_k, grad_v, grad_phi_q, grad_phi_k, window, linear


def _features_like(ready: Plan, which: int) -> Tensor:
    """Memory for the gradient of phi(q) (0) or phi(k) (1) [B, heads, T, F]; of x W [.., C] where mapped."""
    features = (ready.phi_q, ready.phi_k)[which]
    assert features is not None
    if ready.maps is None:
        return torch.empty(features.shape, dtype=features.dtype, device=features.device)
    weight = ready.maps[which]
    return weight.new_empty(features.shape[0], weight.shape[0], features.shape[2], ready.columns)


def _through_map(
    ready: Plan, tokens: Tensor, weight: Tensor, slopes: Tensor, others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens [B, h, T, D], added to what there is, and of a map's weight, from that of x W."""
    mask = ready.tracked.call.key_mask
    if mask is not None:  # what stands in padding may be anything, NaN included
        tokens = tokens.masked_fill(~mask[:, None, :, None], 0)
    heads = tokens.shape[1]
    slopes = slopes.unflatten(1, (heads, -1))
    found = torch.einsum("bhgtc,hgdc->bhtd", slopes, weight.unflatten(0, (heads, -1)))
    grad_weight = torch.einsum("bhtd,bhgtc->hgdc", tokens.to(slopes.dtype), slopes).flatten(0, 1)
    return found if others is None else found + others, grad_weight


def _rows(
    ready: Plan, grads: tuple[Tensor, Tensor | None], rows: _Rows, grad_q: Tensor | None,
    grad_phi_q: Tensor | None, weights: tuple[Tensor, ...], states: Sums | None,
) -> None:  # fmt: skip
    grad, total = grads
    tracked, call = ready.tracked, ready.tracked.call
    phi_q, phi_k, weight_window, weight_linear, sums, sums_z = present(ready, states)
    grid = (triton.cdiv(tracked.length, ready.config.queries), tracked.batch * tracked.heads)
    rows_kernel[grid](
        ready.q, ready.k, ready.v, phi_q, phi_k, *ready.map_weights(), weight_window, weight_linear,
        *ready.tokens(), sums, sums_z, grad, grad if total is None else total,
        grad if grad_q is None else grad_q,
        grad if grad_phi_q is None else grad_phi_q, *weights,
        rows.shift, rows.pull, rows.drift, rows.excess, rows.largest, rows.far_pull, rows.far_drift,
        *ready.q.stride()[:3], *ready.k.stride()[:3], *ready.v.stride()[:3], *phi_q.stride()[:3],
        *phi_k.stride()[:3], *weight_window.stride()[:3], *weight_linear.stride()[:3], tracked.length,
        call.window or 0, tracked.lag, ready.chunks, call.scale, call.softcap or 1.0, tracked.heads,
        tracked.kv_heads, ready.memories, **ready.blocks(), **ready.flags(), HAS_TOTALS=total is not None,
        **ready.launch(),
    )  # fmt: skip


def _window_keys(ready: Plan, grad: Tensor, rows: _Rows, grad_v: Tensor) -> Tensor:
    """Gradient of k [B, N, T, D]; writes the window's part of that of v."""
    tracked, call = ready.tracked, ready.tracked.call
    grad_k = torch.empty(ready.k.shape, dtype=ready.k.dtype, device=grad.device)
    grid = (triton.cdiv(tracked.length, ready.config.keys), tracked.batch * tracked.kv_heads)
    valid, segments, _ = ready.tokens()
    window_keys_kernel[grid](
        ready.q, ready.k, ready.v, valid, segments, grad, rows.shift, rows.pull, rows.drift, rows.excess,
        rows.largest, grad_k, grad_v, *ready.q.stride()[:3], *ready.k.stride()[:3], *ready.v.stride()[:3],
        tracked.length, call.window, call.scale, call.softcap or 1.0, tracked.heads, tracked.kv_heads,
        **ready.only(
            "D", "E", "BLOCK_D", "BLOCK_E", "BLOCK_Q", "BLOCK_K", "HAS_VALID", "HAS_SEGMENTS",
            "HAS_CAP", "SUM",
        ),
        **ready.launch(),
    )  # fmt: skip
    return grad_k


def _linear_keys(ready: Plan, grad: Tensor, rows: _Rows, grad_v: Tensor) -> Tensor:
    """Gradient of phi(k) [B, M, T, F]; adds linear attention's part to that of v."""
    tracked, phi_q, phi_k = ready.tracked, ready.phi_q, ready.phi_k
    assert phi_q is not None
    assert phi_k is not None
    shape = (tracked.batch, ready.memories, ready.chunks, ready.features)
    grads = grad.new_empty(*shape, tracked.value_size, dtype=tracked.dtype)
    grads_z = grad.new_empty(shape, dtype=tracked.dtype)
    blocks = ready.blocks()
    width = min(ready.config.values, blocks["BLOCK_E"])
    grid = (
        tracked.batch * ready.memories, ready.feature_blocks, triton.cdiv(tracked.value_size, width)
    )  # fmt: skip
    common = ready.only(
        "D",
        "E",
        "F",
        "C",
        "BLOCK_F",
        "STEP",
        "BLOCK_Q",
        "CHUNK",
        "HAS_VALID",
        "HAS_SEGMENTS",
        "OPERAND",
        "SUM",
    )
    unfold_kernel[grid](
        phi_q, ready.map_weights()[0], grad, *ready.tokens(), rows.far_pull, rows.far_drift, grads, grads_z,
        *phi_q.stride()[:3], tracked.length, tracked.lag, ready.chunks, tracked.heads, ready.memories,
        BLOCK_E=width, MAPPED=ready.maps is not None, **common, **ready.launch(),
    )  # fmt: skip
    grad_phi_k = _features_like(ready, 1)
    valid, segments, _ = ready.tokens()
    grid = (triton.cdiv(tracked.length, ready.config.keys), tracked.batch * tracked.kv_heads)
    tensors = (
        ready.v,
        valid,
        segments,
        grad,
        rows.far_pull,
        rows.far_drift,
        grads,
        grads_z,
        grad_phi_k,
        grad_v,
    )
    numbers = (
        *phi_q.stride()[:3], *phi_k.stride()[:3], *ready.v.stride()[:3], tracked.length,
        tracked.call.window or 0, tracked.lag, ready.chunks, tracked.heads, tracked.kv_heads, ready.memories,
    )  # fmt: skip
    constants = {**common, **ready.only("BLOCK_E", "BLOCK_K", "HAS_WINDOW", "LAGGING"), **ready.launch()}
    if ready.maps is not None:
        del constants["F"], constants["BLOCK_F"]
        constants["BLOCK_C"] = common["BLOCK_F"]
        mapped_keys_kernel[grid](phi_q, phi_k, *ready.maps, *tensors, *numbers, **constants)
    else:
        for name in ("D", "C", "STEP"):
            del constants[name]
        linear_keys_kernel[grid](phi_q, phi_k, *tensors, *numbers, **constants)
    return grad_phi_k
