"""The attention-transfer cross-entropy, at memory linear in the length.

For a donor's softmax weights p_ij and linear attention's a_ij = s_ij / sum_j s_ij, s_ij = phi(q_i) .
phi(k_j):

    loss_i = - sum_j p_ij log a_ij = log(sum_j s_ij) - sum_j p_ij log s_ij        since sum_j p_ij = 1.

Forward keeps three numbers a row (log-sum-exp of the scores, sum of s, sum of p log s) from one sweep over
blocks;
backward recomputes the blocks: d loss_i / d s_ij = 1 / sum_j s_ij - p_ij / s_ij.
Source: the Hedgehog objective (arXiv 2402.04347, equation 4). Shapes: legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.ops.types import accumulation_dtype

BLOCK = 128
FLOOR = 1e-12
"""Products of features are clamped here before the logarithm: maps can be zero, and some are signed."""


def transfer_cross_entropy(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B N T D"],
    phi_q: Float[Tensor, "B H T F"],
    phi_k: Float[Tensor, "B M T F"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    key_mask: Bool[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T"]:
    """Cross-entropy of each row from the donor's softmax weights to linear attention's; differentiable in phi
    only.

    Args:
        q, k: the donor's queries and keys; constants here, no gradient flows into them.
        phi_q, phi_k: their features; M is N or H.
        scale, softcap, window: of the donor's attention in this layer (window None for full attention).
        key_mask: True for real tokens; rows of padding, or without a key, have loss 0.
        segment_ids: packed sequences.
    """
    call = _Blocks(q.detach(), k.detach(), scale, softcap, window, key_mask, segment_ids)
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(accumulation_dtype(q.dtype), phi_q.dtype)
        return _TransferCrossEntropy.apply(phi_q.to(dtype), phi_k.to(dtype), call)  # pyright: ignore


@dataclass(frozen=True)
class _Blocks:
    """What does not need a gradient, and how to cut it up."""

    q: Tensor
    k: Tensor
    scale: float
    softcap: float | None
    window: int | None
    key_mask: Tensor | None
    segment_ids: Tensor | None

    def pairs(self, rows: slice) -> list[slice]:
        """Blocks of keys that a block of rows can see."""
        first = 0 if self.window is None else max(0, rows.start - self.window + 1) // BLOCK * BLOCK
        return [slice(j, min(j + BLOCK, rows.stop)) for j in range(first, rows.stop, BLOCK)]

    def scores(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        scores = products(self.q[:, :, rows].to(dtype) * self.scale, self.k[:, :, columns].to(dtype))
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def hidden(self, rows: slice, columns: slice) -> Tensor | None:
        """Pairs that do not count [B or 1, 1, rows, columns]; None if all do."""
        i = torch.arange(rows.start, rows.stop, device=self.q.device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=self.q.device)[None]
        hidden = None
        if columns.stop > rows.start + 1:
            hidden = (j > i)[None, None]
        if self.window is not None:
            outside = (i - j >= self.window)[None, None]
            hidden = outside if hidden is None else hidden | outside
        if self.key_mask is not None:
            padding = ~(self.key_mask[:, None, rows, None] & self.key_mask[:, None, None, columns])
            hidden = padding if hidden is None else hidden | padding
        if self.segment_ids is not None:
            apart = self.segment_ids[:, None, rows, None] != self.segment_ids[:, None, None, columns]
            hidden = apart if hidden is None else hidden | apart
        return hidden


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, H, t, X] x [B, N or H, n, X] -> [B, H, t, n]."""
    batch, heads, count, size = rows.shape
    grouped = rows.reshape(batch, columns.shape[1], heads // columns.shape[1] * count, size)
    return (grouped @ columns.mT).view(batch, heads, count, columns.shape[2])


class _TransferCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, phi_q: Tensor, phi_k: Tensor, call: _Blocks) -> Tensor:
        length = phi_q.shape[2]
        logsumexp, total, loss = (phi_q.new_zeros(phi_q.shape[:3]) for _ in range(3))
        for start in range(0, length, BLOCK):
            rows = slice(start, min(start + BLOCK, length))
            logsumexp[:, :, rows], total[:, :, rows], cross = _sweep(phi_q, phi_k, call, rows)
            present = total[:, :, rows] != 0  # NaN is present, and must show
            logarithm = torch.where(present, total[:, :, rows], 1.0).log()
            loss[:, :, rows] = torch.where(present, logarithm - cross, 0.0)
        ctx.save_for_backward(phi_q, phi_k, logsumexp, total)
        ctx.call = call
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        with torch.autocast(grads[0].device.type, enabled=False):  # stage 1 goes back inside the forward pass
            return *_backward(ctx, grads[0]), None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both features, block by block."""
    phi_q, phi_k, logsumexp, total = ctx.saved_tensors
    call: _Blocks = ctx.call
    length, memories = phi_q.shape[2], phi_k.shape[1]
    present = total != 0
    grad = torch.where(present, grad, 0.0)
    over_total = grad / torch.where(present, total, 1.0)
    grad_q, grad_k = torch.zeros_like(phi_q), torch.zeros_like(phi_k)
    for start in range(0, length, BLOCK):
        rows = slice(start, min(start + BLOCK, length))
        row_features = phi_q[:, :, rows]
        for columns in call.pairs(rows):
            features = products(row_features, phi_k[:, :, columns])
            # in place: a block's tensors stay in cache, new ones would not
            weights = call.scores(rows, columns, phi_q.dtype).sub_(logsumexp[:, :, rows, None]).exp_()
            slope = weights.mul_(grad[:, :, rows, None])
            # three passes less on CPU for the maps that stay above the floor; elsewhere the answer would cost
            clamped = features.device.type != "cpu" or not bool(features.amin() >= FLOOR)
            slope.div_(features.clamp_min(FLOOR) if clamped else features)
            torch.sub(over_total[:, :, rows, None], slope, out=slope)
            if clamped:
                slope.masked_fill_(features < FLOOR, 0)
            hidden = call.hidden(rows, columns)
            if hidden is not None:
                slope.masked_fill_(hidden, 0)
            grouped = slope.reshape(slope.shape[0], memories, -1, slope.shape[-1])
            grad_q[:, :, rows] += (grouped @ phi_k[:, :, columns]).view_as(row_features)
            grad_k[:, :, columns] += grouped.mT @ row_features.reshape(*grouped.shape[:3], -1)
    return grad_q, grad_k


def _sweep(phi_q: Tensor, phi_k: Tensor, call: _Blocks, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp of the scores, sum of s, sum of p log s) of a block of rows [B, H, t], online."""
    shape = (*phi_q.shape[:2], rows.stop - rows.start)
    top = phi_q.new_full(shape, torch.finfo(phi_q.dtype).min)
    mass, cross, total = (phi_q.new_zeros(shape) for _ in range(3))
    for columns in call.pairs(rows):
        scores = call.scores(rows, columns, phi_q.dtype)
        features = products(phi_q[:, :, rows], phi_k[:, :, columns]).clamp_min_(FLOOR)
        hidden = call.hidden(rows, columns)
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
