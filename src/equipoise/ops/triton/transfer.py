"""Launches the kernels of the transfer cross-entropy. Shapes follow the legend in `equipoise.ops.types`.

Memory beyond features and their gradients: two numbers a row, kept for the way back, and the loss.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from equipoise.ops.transfer_blocks import FLOOR
from equipoise.ops.triton.configs import config_for, using
from equipoise.ops.triton.plan import TYPES, operand_of, padded, plain
from equipoise.ops.triton.transfer_kernels import (
    transfer_kernel,
    transfer_keys_kernel,
    transfer_queries_kernel,
)
from equipoise.ops.types import Donor, accumulation_dtype

WIDTH = 256
"""Most features whose gradients one program holds; beyond it blocks of pairs are computed once for each."""


def run(phi_q: Tensor, phi_k: Tensor, donor: Donor) -> Tensor:
    """The cross-entropy of every row [B, H, T], differentiable in phi only.

    Products of features run in the donor's type, as in `hybrid_attention`: for a donor in bfloat16 features
    are rounded to it as they are loaded. Sums and the loss are float32 or wider.
    """
    return cast(Tensor, _Transfer.apply(plain(phi_q), plain(phi_k), donor))


class _Transfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phi_q: Tensor, phi_k: Tensor, donor: Donor) -> Tensor:
        dtype = torch.promote_types(accumulation_dtype(donor.q.dtype), phi_q.dtype)
        logsumexps, totals, losses = (phi_q.new_empty(phi_q.shape[:3], dtype=dtype) for _ in range(3))
        config = config_for(donor.q.dtype)
        grid = (triton.cdiv(phi_q.shape[2], config.queries), phi_q.shape[0] * phi_q.shape[1])
        tensors, numbers, constants = _arguments(phi_q, phi_k, donor)
        transfer_kernel[grid](*tensors, logsumexps, totals, losses, *numbers, **constants)
        ctx.save_for_backward(phi_q, phi_k, logsumexps, totals)
        ctx.donor, ctx.config = donor, config
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        phi_q, phi_k, logsumexps, totals = ctx.saved_tensors
        # stage 1 goes back inside the forward pass, where autocast may be on
        with using(ctx.config), torch.autocast(grads[0].device.type, enabled=False):
            tensors, numbers, constants = _arguments(phi_q, phi_k, ctx.donor)
            constants["WIDTH"] = width = min(WIDTH, padded(phi_q.shape[-1]))
            rows = logsumexps, totals, grads[0].to(totals.dtype).contiguous()
            found: list[Tensor] = []
            for kernel, phi, size in (
                (transfer_queries_kernel, phi_q, ctx.config.queries),
                (transfer_keys_kernel, phi_k, ctx.config.keys),
            ):
                batch, heads, length, features = phi.shape
                found.append(torch.empty(phi.shape, dtype=phi.dtype, device=phi.device))
                grid = (triton.cdiv(length, size), batch * heads, triton.cdiv(features, width))
                kernel[grid](*tensors, *rows, found[-1], *numbers, **constants)
        return found[0], found[1], None


def _arguments(
    phi_q: Tensor, phi_k: Tensor, donor: Donor
) -> tuple[tuple[Tensor, ...], tuple[int | float, ...], dict[str, Any]]:
    """What all three kernels take: tensors, then strides and sizes, then constants."""
    q, k = plain(donor.q), plain(donor.k)
    valid, segments = q, q  # any tensor where there is none: it is never read
    if donor.key_mask is not None:
        valid = donor.key_mask.to(torch.int8).contiguous()
    if donor.segment_ids is not None:
        segments = donor.segment_ids.to(torch.int32).contiguous()
    config, (_, heads, length, size) = config_for(q.dtype), q.shape
    features = phi_q.shape[-1]
    numbers = (
        *q.stride()[:3], *k.stride()[:3], *phi_q.stride()[:3], *phi_k.stride()[:3], length,
        min(donor.window or length, length), donor.scale, donor.softcap or 1.0, heads, k.shape[1],
        phi_k.shape[1],
    )  # fmt: skip
    constants = {
        "D": size, "F": features, "BLOCK_D": padded(size), "BLOCK_F": min(config.features, padded(features)),
        "BLOCK_Q": config.queries, "BLOCK_K": config.keys, "HAS_VALID": donor.key_mask is not None,
        "HAS_SEGMENTS": donor.segment_ids is not None, "HAS_CAP": donor.softcap is not None, "FLOOR": FLOOR,
        "OPERAND": operand_of(q.dtype),
        "SUM": TYPES[torch.promote_types(accumulation_dtype(q.dtype), phi_q.dtype)],
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    return (q, k, phi_q, phi_k, valid, segments), numbers, constants
