"""The transfer cross-entropy in plain PyTorch: blocks of rows and keys, one sweep forward, one back.

Forward keeps three numbers a row (log-sum-exp of the scores, sum of s, sum of p log s); backward recomputes
the blocks. Takes every call; formulas in `equipoise.ops.transfer_loss`, shapes in `equipoise.ops.types`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise.ops.types import Donor, accumulation_dtype

BLOCK = 128
FLOOR = 1e-12
"""Products of features are clamped here before the logarithm: maps can be zero, and some are signed."""


def run(phi_q: Tensor, phi_k: Tensor, donor: Donor) -> Tensor:
    """The cross-entropy of every row [B, H, T], differentiable in phi only."""
    dtype = torch.promote_types(accumulation_dtype(donor.q.dtype), phi_q.dtype)
    return _TransferCrossEntropy.apply(phi_q.to(dtype), phi_k.to(dtype), donor)  # pyright: ignore


def _pairs(donor: Donor, rows: slice) -> list[slice]:
    """Blocks of keys that a block of rows can see."""
    first = 0 if donor.window is None else max(0, rows.start - donor.window + 1) // BLOCK * BLOCK
    return [slice(j, min(j + BLOCK, rows.stop)) for j in range(first, rows.stop, BLOCK)]


def _scores(donor: Donor, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    scores = products(donor.q[:, :, rows].to(dtype) * donor.scale, donor.k[:, :, columns].to(dtype))
    return scores if donor.softcap is None else scores.div_(donor.softcap).tanh_().mul_(donor.softcap)


def seen_share(donor: Donor, logsumexp: Tensor) -> Tensor | float:
    """What the donor's weights on keys sum to in each row [B, H, T]: all but its sink's."""
    if donor.sink_logits is None:
        return 1.0
    return torch.sigmoid(logsumexp - donor.sink_logits.to(logsumexp.dtype)[:, None])


def _hidden(donor: Donor, rows: slice, columns: slice) -> Tensor | None:
    """Pairs that do not count [B or 1, 1, rows, columns]; None if all do."""
    i = torch.arange(rows.start, rows.stop, device=donor.q.device)[:, None]
    j = torch.arange(columns.start, columns.stop, device=donor.q.device)[None]
    hidden = None
    if columns.stop > rows.start + 1:
        hidden = (j > i)[None, None]
    if donor.window is not None:
        outside = (i - j >= donor.window)[None, None]
        hidden = outside if hidden is None else hidden | outside
    if donor.key_mask is not None:
        padding = ~(donor.key_mask[:, None, rows, None] & donor.key_mask[:, None, None, columns])
        hidden = padding if hidden is None else hidden | padding
    if donor.segment_ids is not None:
        apart = donor.segment_ids[:, None, rows, None] != donor.segment_ids[:, None, None, columns]
        hidden = apart if hidden is None else hidden | apart
    return hidden


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, H, t, X] x [B, N or H, n, X] -> [B, H, t, n]."""
    batch, heads, count, size = rows.shape
    grouped = rows.reshape(batch, columns.shape[1], heads // columns.shape[1] * count, size)
    return (grouped @ columns.mT).view(batch, heads, count, columns.shape[2])


class _TransferCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phi_q: Tensor, phi_k: Tensor, donor: Donor) -> Tensor:
        length = phi_q.shape[2]
        logsumexp, total, loss = (phi_q.new_zeros(phi_q.shape[:3]) for _ in range(3))
        for start in range(0, length, BLOCK):
            rows = slice(start, min(start + BLOCK, length))
            logsumexp[:, :, rows], total[:, :, rows], cross = _sweep(phi_q, phi_k, donor, rows)
            present = total[:, :, rows] != 0  # NaN is present, and must show
            logarithm = torch.where(present, total[:, :, rows], 1.0).log()
            loss[:, :, rows] = torch.where(present, logarithm - cross, 0.0)
        loss *= seen_share(donor, logsumexp)
        ctx.save_for_backward(phi_q, phi_k, logsumexp, total)
        ctx.donor = donor
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        with torch.autocast(grads[0].device.type, enabled=False):  # stage 1 goes back inside the forward pass
            return *_backward(ctx, grads[0]), None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both features, block by block."""
    phi_q, phi_k, logsumexp, total = ctx.saved_tensors
    donor: Donor = ctx.donor
    length, memories = phi_q.shape[2], phi_k.shape[1]
    present = total != 0
    grad = torch.where(present, grad, 0.0) * seen_share(donor, logsumexp)
    over_total = grad / torch.where(present, total, 1.0)
    grad_q, grad_k = torch.zeros_like(phi_q), torch.zeros_like(phi_k)
    for start in range(0, length, BLOCK):
        rows = slice(start, min(start + BLOCK, length))
        row_features = phi_q[:, :, rows]
        for columns in _pairs(donor, rows):
            features = products(row_features, phi_k[:, :, columns])
            # in place: a block's tensors stay in cache, new ones would not
            weights = _scores(donor, rows, columns, phi_q.dtype).sub_(logsumexp[:, :, rows, None]).exp_()
            slope = weights.mul_(grad[:, :, rows, None])
            # three passes less on CPU for the maps that stay above the floor; elsewhere the answer would cost
            clamped = features.device.type != "cpu" or not bool(features.amin() >= FLOOR)
            slope.div_(features.clamp_min(FLOOR) if clamped else features)
            torch.sub(over_total[:, :, rows, None], slope, out=slope)
            if clamped:
                slope.masked_fill_(features < FLOOR, 0)
            hidden = _hidden(donor, rows, columns)
            if hidden is not None:
                slope.masked_fill_(hidden, 0)
            grouped = slope.reshape(slope.shape[0], memories, -1, slope.shape[-1])
            grad_q[:, :, rows] += (grouped @ phi_k[:, :, columns]).view_as(row_features)
            grad_k[:, :, columns] += grouped.mT @ row_features.reshape(*grouped.shape[:3], -1)
    return grad_q, grad_k


def _sweep(phi_q: Tensor, phi_k: Tensor, donor: Donor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp of the scores, sum of s, sum of p log s) of a block of rows [B, H, t], online."""
    shape = (*phi_q.shape[:2], rows.stop - rows.start)
    top = phi_q.new_full(shape, torch.finfo(phi_q.dtype).min)
    mass, cross, total = (phi_q.new_zeros(shape) for _ in range(3))
    for columns in _pairs(donor, rows):
        scores = _scores(donor, rows, columns, phi_q.dtype)
        features = products(phi_q[:, :, rows], phi_k[:, :, columns]).clamp_min_(FLOOR)
        hidden = _hidden(donor, rows, columns)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
            total += features.masked_fill(hidden, 0).sum(-1)
        else:
            total += features.sum(-1)
        new_top = torch.maximum(top, scores.amax(-1))
        shrink = (top - new_top).exp()
        weights = scores.sub_(new_top[..., None]).exp_()
        mass = mass * shrink + weights.sum(-1)
        cross = cross * shrink + weights.mul_(features.log_()).sum(-1)
        top = new_top
    safe = torch.where(mass != 0, mass, 1.0)
    return top + safe.log(), total, cross / safe
