"""Gradients of `equipoise.ops.stream`: everything but the inputs is computed again, chunk by chunk.

Two sweeps. The first goes forward, as the forward pass does, and ends with the gradients of the queries,
the windows and the keys not yet folded. The second goes backward and carries the gradients of S and z to
the keys folded into them. Memory beyond inputs and gradients: one tensor of the output's size and one
number a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equipoise.ops.mix import EPSILON
from equipoise.ops.stream import Stream, Weights
from equipoise.ops.stream_forward import (
    WindowWeights,
    attend,
    empty_totals,
    linear_sums,
    mixing_weights,
    rows_of,
    scale_factors,
    window_weights,
)
from equipoise.ops.stream_sums import Sums, group, safe, spread
from equipoise.ops.types import Call, FeatureMapLike


def run(call: Call) -> Tensor:
    """The output [B, H, T, E], differentiable in q, k, v, the features, the gate and sink logits."""
    return run_with_totals(call, wanted=False)[0]


def run_with_totals(call: Call, *, wanted: bool = True) -> tuple[Tensor, Any]:
    """The same and, where wanted, `stream_forward.run_with_totals`' logarithms, differentiable too."""
    call = replace(call, phi_q=_mapped(call.phi_q, call.q, call), phi_k=_mapped(call.phi_k, call.k, call))
    weights = mixing_weights(Stream(call))
    return _Stream.apply(  # pyright: ignore[reportReturnType]
        call.q, call.k, call.v, call.phi_q, call.phi_k, weights.window, weights.linear, call.sink_logits,
        call, wanted,
    )  # fmt: skip


def _mapped(phi: Tensor | FeatureMapLike | None, tokens: Tensor, call: Call) -> Tensor | None:
    """Features of all tokens, so that autograd knows how they came about."""
    if phi is None or isinstance(phi, Tensor):
        return phi
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    clean = tokens if call.key_mask is None else tokens.masked_fill(~call.key_mask[:, None, :, None], 0)
    return phi(clean.to(dtype))


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None, phi_k: Tensor | None,
        weight_window: Tensor | None, weight_linear: Tensor | None, sink_logits: Tensor | None, call: Call,
        totals: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        given = replace(call, q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, sink_logits=sink_logits)
        stream = Stream(given, totals=totals)
        logarithms = empty_totals(stream) if totals else None
        out, _ = attend(stream, Sums(stream), Weights(weight_window, weight_linear), logarithms)
        ctx.save_for_backward(q, k, v, phi_q, phi_k, weight_window, weight_linear, sink_logits)
        ctx.call = replace(
            call, q=q.detach(), k=k.detach(), v=v.detach(), phi_q=None, phi_k=None, gate=0.5, sink_logits=None
        )
        return out, logarithms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        assert grads[0] is not None
        q, k, v, phi_q, phi_k, weight_window, weight_linear, sink_logits = ctx.saved_tensors
        call = replace(ctx.call, q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, sink_logits=sink_logits)
        with torch.autocast(grads[0].device.type, enabled=False):
            found = _Backward(Stream(call), Weights(weight_window, weight_linear), grads[0], grads[1])
            found.run(attention=any(ctx.needs_input_grad[i] for i in (0, 1, 7)))
        inputs = (q, k, v, phi_q, phi_k, weight_window, weight_linear, sink_logits)
        totals = (
            found.q, found.k, found.v, found.phi_q, found.phi_k, found.weight_window, found.weight_linear,
            found.sink_logits,
        )  # fmt: skip
        given = (
            None if total is None or like is None else total.to(like.dtype)
            for total, like in zip(totals, inputs, strict=True)
        )
        return *given, None, None


@dataclass
class _Chunk:
    """What the second sweep needs of a chunk: which rows saw the folded keys, what became of the sums."""

    rows: slice
    far: Tensor | None
    kept: Tensor | None
    folds: bool


class _Backward:
    """Accumulates the gradients of one call, in the dtype of sums."""

    def __init__(self, stream: Stream, weights: Weights, grad: Tensor, total: Tensor | None) -> None:
        """``grad`` is of the output, ``total`` of the denominators' logarithms, where they were given."""
        call = stream.call
        self.stream, self.weights = stream, weights
        absent = None if call.key_mask is None else ~call.key_mask[:, None, :, None]
        self.grad = grad if absent is None else grad.masked_fill(absent, 0)
        self.total = total if absent is None or total is None else total.masked_fill(absent, 0)
        self.q, self.k, self.v = (self._zeros(x) for x in (call.q, call.k, call.v))
        self.phi_q = None if call.phi_q is None else self._zeros(cast(Tensor, call.phi_q))
        self.phi_k = None if call.phi_k is None else self._zeros(cast(Tensor, call.phi_k))
        self.weight_window = None if weights.window is None else self._zeros(weights.window)
        self.weight_linear = None if weights.linear is None else self._zeros(weights.linear)
        self.sink_logits = None if call.sink_logits is None else self._zeros(call.sink_logits)
        self.memories = 0 if self.phi_k is None else self.phi_k.shape[1]
        self.chunks: list[_Chunk] = []
        if self.phi_k is not None:
            self.numerators = torch.empty_like(self.grad, dtype=stream.dtype)
            self.denominators = self.numerators.new_empty(*self.grad.shape[:3], 1)

    def _zeros(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=self.stream.dtype, device=like.device)

    def run(self, *, attention: bool) -> None:
        """Both sweeps; ``attention`` is whether anything wants the gradient of the scores."""
        sums = Sums(self.stream)
        for rows in self.stream.chunks():
            part = self.stream.row_slice(rows)
            grad = self.grad[:, :, part].to(self.stream.dtype)
            if self.stream.joint:
                self._joint(rows, grad, sums)
                continue
            if self.stream.call.window is not None and self.weights.window is not None:
                self._window(rows, grad, attention=attention)
            if self.phi_k is not None and self.weights.linear is not None:
                self._linear(rows, grad, sums)
        if self.phi_k is not None:
            self._fold_back()

    # ---- the window

    def _window(self, rows: slice, grad: Tensor, *, attention: bool) -> None:
        stream, part = self.stream, self.stream.row_slice(rows)
        assert self.weights.window is not None
        assert self.weight_window is not None
        seen = window_weights(stream, rows)
        probabilities, values = seen.probabilities, seen.values
        out = torch.bmm(probabilities, values)
        add_rows(self.weight_window, part, (grad * out.view_as(grad)).sum(-1, keepdim=True))
        pulled = group(grad * rows_of(self.weights.window, part), stream.kv_heads)
        self._add_window_values(rows, torch.bmm(probabilities.mT, pulled))
        if attention:
            slopes = torch.bmm(pulled, values.mT).sub_((pulled * out).sum(-1, keepdim=True))
            if self.total is not None:
                slopes += group(self.total[:, :, part], stream.kv_heads)
            self._scores(rows, slopes.mul_(probabilities), seen)

    def _scores(self, rows: slice, slopes: Tensor, seen: WindowWeights) -> None:
        """Gradients of queries, keys and sink logits from those of the scores [B * N, H / N * c, X]."""
        stream = self.stream
        if self.sink_logits is not None:
            self.sink_logits += slopes[..., -1].reshape(stream.batch, stream.heads, -1).sum((0, 2))
            slopes = slopes[..., :-1]
        if seen.slope is not None:
            slopes = slopes * seen.slope
        pulled = torch.bmm(slopes, seen.keys).mul_(stream.call.scale)
        part = self.q[:, :, stream.row_slice(rows)]
        part += pulled.view(part.shape)
        self._add(self.k, stream.band(rows), torch.bmm(slopes.mT, seen.queries))

    def _add_window_values(self, rows: slice, part: Tensor) -> None:
        """Gradients of the window's values [B * N, X, E]; the sink's, which come last, go nowhere."""
        self._add(self.v, self.stream.band(rows), part if self.sink_logits is None else part[:, :-1])

    def _add(self, total: Tensor, columns: slice, part: Tensor) -> None:
        target = total[:, :, columns]
        target += part.view(target.shape)

    # ---- linear attention

    def _linear(self, rows: slice, grad: Tensor, sums: Sums) -> None:
        part = self.stream.row_slice(rows)
        assert self.weights.linear is not None
        assert self.weight_linear is not None
        near = _Near(self.stream, rows, sums, self.memories)
        denominator = safe(near.denominator)
        out = near.numerator / denominator
        add_rows(self.weight_linear, part, (grad * out).sum(-1, keepdim=True))
        numerators = grad * rows_of(self.weights.linear, part) / denominator
        denominators = -(numerators * out).sum(-1, keepdim=True)
        denominators.masked_fill_(near.denominator.abs() < EPSILON, 0)
        self._near(rows, near, numerators, denominators, sums)

    def _near(self, rows: slice, near: _Near, numerators: Tensor, denominators: Tensor, sums: Sums) -> None:
        """Gradients of the chunk's queries, and of the keys it sees before they are folded."""
        stream, part = self.stream, self.stream.row_slice(rows)
        assert self.phi_q is not None
        assert self.phi_k is not None
        self.numerators[:, :, part], self.denominators[:, :, part] = numerators, denominators
        pulled, drained = group(numerators, self.memories), group(denominators, self.memories)
        slopes = torch.bmm(pulled, near.values.flatten(0, 1).mT).add_(drained)
        columns = stream.near(rows)
        if slopes.shape[-1]:
            seen = stream.block(rows, columns, "linear")[1]
            slopes.view(stream.batch, stream.heads, -1, slopes.shape[-1]).mul_(seen)
        queries = torch.bmm(slopes, near.features.flatten(0, 1))
        same = stream.same_segment(rows, sums.segment)
        if sums.total is not None and sums.normalizer is not None:
            far = torch.bmm(pulled, sums.total.mT).add_(drained * sums.normalizer.mT)
            if same is not None:
                far *= group(same.expand(-1, stream.heads, -1, -1), self.memories)
            queries += far
        target = self.phi_q[:, :, part]
        target += queries.view(target.shape)
        self._add(self.phi_k, columns, torch.bmm(slopes.mT, near.phi_q))
        self._add_values(columns, torch.bmm(near.weights.mT, pulled))
        had_sums = sums.total is not None
        segment, _ = (None, None) if not near.folds else sums.own(stream.folding(rows))
        before = sums.segment
        near.fold(sums)
        kept = None
        if had_sums and near.folds and segment is not None and before is not None:
            kept = (before == segment).to(stream.dtype).repeat_interleave(self.memories)[:, None, None]
        self.chunks.append(_Chunk(rows, same, kept, near.folds))

    def _add_values(self, columns: slice, part: Tensor) -> None:
        """Gradients of values [B * M, n, E], summed over the heads that share them."""
        target = self.v[:, :, columns]
        shape = (*target.shape[:2], part.shape[0] // (target.shape[0] * target.shape[1]), *target.shape[2:])
        target += part.view(shape).sum(2)

    def _fold_back(self) -> None:
        """The second sweep: gradients of S and z, from the last chunk to the first."""
        stream = self.stream
        assert self.phi_k is not None
        assert self.phi_q is not None
        total: Tensor | None = None
        normalizer: Tensor | None = None
        for chunk in reversed(self.chunks):
            columns = stream.folding(chunk.rows)
            if total is not None and normalizer is not None and chunk.folds:
                features = stream.key_features(columns)
                values = spread(stream.key_values(columns)[1], self.memories)
                _, same = Sums(stream).own(columns)
                kept = None if same is None else same[:, None, :, None].to(stream.dtype)
                pulled = torch.bmm(values.flatten(0, 1), total.mT).add_(normalizer.mT)
                pulled = pulled.view(features.shape)
                if kept is not None:
                    pulled, features = pulled * kept, features * kept
                self._add(self.phi_k, columns, pulled)
                self._add_values(columns, torch.bmm(features.flatten(0, 1), total))
                if chunk.kept is not None:
                    total, normalizer = total * chunk.kept, normalizer * chunk.kept
            part = stream.row_slice(chunk.rows)
            queries = stream.query_features(chunk.rows)
            if chunk.far is not None:
                queries = queries * chunk.far
            queries = group(queries, self.memories)
            numerators = group(self.numerators[:, :, part], self.memories)
            denominators = group(self.denominators[:, :, part], self.memories)
            if total is None or normalizer is None:
                total, normalizer = torch.bmm(queries.mT, numerators), torch.bmm(queries.mT, denominators)
            else:
                total.baddbmm_(queries.mT, numerators)
                normalizer.baddbmm_(queries.mT, denominators)
        if self.stream.tokens.valid is not None:
            self.phi_k.masked_fill_(~self.stream.tokens.valid[:, None, :, None], 0)

    # ---- one denominator for both

    def _joint(self, rows: slice, grad: Tensor, sums: Sums) -> None:
        stream, part = self.stream, self.stream.row_slice(rows)
        assert self.weights.window is not None
        seen, gate = window_weights(stream, rows), rows_of(self.weights.window, part)
        mass = seen.mass(stream)
        summed = torch.bmm(seen.probabilities, seen.values).view_as(grad) * mass
        near = _Near(stream, rows, sums, self.memories)
        rule = self._shared if stream.shared else self._calibrated
        rule(rows, grad, sums, seen, near, gate, mass, summed)

    def _calibrated(
        self, rows: slice, grad: Tensor, sums: Sums, seen: WindowWeights, near: _Near, gate: Tensor,
        mass: Tensor, summed: Tensor,
    ) -> None:  # fmt: skip
        """The factors of `scale_factors` cancel in the output but for exp(l), so r has no gradient."""
        stream, part = self.stream, self.stream.row_slice(rows)
        assert self.weight_window is not None
        assert seen.top is not None
        window, far, _ = scale_factors(seen.top, gate, near.denominator)
        total = near.denominator.clamp_min(EPSILON)
        divisor = window * mass + far * total
        numerators = grad / divisor
        along = (numerators * near.numerator).sum(-1, keepdim=True)
        drift = -((numerators * summed).sum(-1, keepdim=True) * window + along * far) / divisor
        if self.total is not None:
            drift += self.total[:, :, part] / divisor
        add_rows(self.weight_window, part, far * (along + drift * total))
        exponentials = seen.probabilities * group(mass * window, stream.kv_heads)
        pulled = group(numerators, stream.kv_heads)
        self._add_window_values(rows, torch.bmm(exponentials.mT, pulled))
        slopes = torch.bmm(pulled, seen.values.mT).add_(group(drift, stream.kv_heads)).mul_(exponentials)
        self._scores(rows, slopes, seen)
        denominators = (far * drift).masked_fill_(near.denominator < EPSILON, 0)
        self._near(rows, near, far * numerators, denominators, sums)

    def _shared(
        self, rows: slice, grad: Tensor, sums: Sums, seen: WindowWeights, near: _Near, gamma: Tensor,
        mass: Tensor, summed: Tensor,
    ) -> None:  # fmt: skip
        stream, part = self.stream, self.stream.row_slice(rows)
        assert self.weight_window is not None
        probabilities, values = seen.probabilities, seen.values
        denominator = gamma * mass + near.denominator
        divisor = safe(denominator)
        numerators = grad / divisor
        denominators = -(numerators * (gamma * summed + near.numerator)).sum(-1, keepdim=True) / divisor
        denominators.masked_fill_(denominator.abs() < EPSILON, 0)
        add_rows(self.weight_window, part, (numerators * summed).sum(-1, keepdim=True) + denominators * mass)
        pulled = group(numerators * gamma, stream.kv_heads)
        exponentials = probabilities * group(mass, stream.kv_heads)
        self._add_window_values(rows, torch.bmm(exponentials.mT, pulled))
        slopes = torch.bmm(pulled, values.mT).add_(group(denominators * gamma, stream.kv_heads))
        slopes.mul_(exponentials)
        largest = (probabilities == probabilities.amax(-1, keepdim=True)).to(slopes.dtype)
        slopes -= largest / largest.sum(-1, keepdim=True) * slopes.sum(-1, keepdim=True)
        self._scores(rows, slopes, seen)
        self._near(rows, near, numerators, denominators, sums)


class _Near:
    """Linear attention of one chunk, computed again: what its gradients are made of."""

    def __init__(self, stream: Stream, rows: slice, sums: Sums, memories: int) -> None:
        self.folding, near = stream.folding(rows), stream.near(rows)
        count = near.stop - near.start
        self._features = stream.key_features(self.folding)
        self._values = spread(stream.key_values(self.folding)[1], memories)
        self.features, self.values = self._features[:, :, :count], self._values[:, :, :count]
        self.phi_q = group(stream.query_features(rows), memories)
        self.weights, numerator, denominator = linear_sums(
            stream, rows, sums, self.features, self.phi_q, self.values
        )
        new = (stream.batch, stream.heads, rows.stop - rows.start, -1)
        self.numerator, self.denominator = numerator.view(new), denominator.view(new)
        self.folds = self.folding.stop > self.folding.start

    def fold(self, sums: Sums) -> None:
        if self.folds:
            sums.fold(self.folding, self._features, self._values)


def add_rows(total: Tensor, part: slice, values: Tensor) -> None:
    """Add a chunk's gradients [B, H, c, 1] to those of weights [B, H, T or 1, 1]."""
    if total.shape[2] == 1:
        total += values.sum(2, keepdim=True)
    else:
        total[:, :, part] += values
