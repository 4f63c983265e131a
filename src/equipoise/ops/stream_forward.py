"""The forward pass of `equipoise.ops.stream`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from equipoise.ops.mix import EPSILON
from equipoise.ops.stream import Stream, Weights
from equipoise.ops.stream_plain import Plain, is_plain
from equipoise.ops.stream_sums import Sums, group, safe, sink_column, spread
from equipoise.ops.types import AttentionState, Call


@dataclass(frozen=True)
class WindowWeights:
    """The window of a chunk. Where there are sink logits the softmax has a last column for them, and the
    values a last row of zeros.

    Attributes:
        probabilities: the softmax [B * N, H / N * c, X].
        queries: scaled [B * N, H / N * c, D].
        slope: d score / d product; None without a softcap.
        keys, values: [B * N, X, D], [B * N, X, E].
        top: the largest score of a row [B, H, c, 1]; None where nobody asks for it.
    """

    probabilities: Tensor
    queries: Tensor
    slope: Tensor | None
    keys: Tensor
    values: Tensor
    top: Tensor | None

    def mass(self, stream: Stream) -> Tensor:
        """Sum over the window of exp(score - largest score) [B, H, c, 1]: the largest has weight 1 in it."""
        mass = 1 / self.probabilities.amax(-1, keepdim=True)
        return mass.view(stream.batch, stream.heads, -1, 1)


def window_weights(stream: Stream, rows: slice) -> WindowWeights:
    """What a chunk's queries make of the keys in their windows."""
    call, band = stream.call, stream.band(rows)
    keys, values = stream.key_values(band)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    queries = group(
        stream.queries[:, :, stream.row_slice(rows)].to(stream.dtype) * call.scale, stream.kv_heads
    )
    scores = torch.bmm(queries, keys.mT)
    slope = None
    if call.softcap is not None:
        scores = scores.div_(call.softcap).tanh_()
        if call.q.requires_grad or call.k.requires_grad:
            slope = 1 - scores.square()
        scores = scores.mul_(call.softcap)
    bias, _ = stream.block(rows, band, "window")
    assert bias is not None
    scores.view(stream.batch, stream.heads, -1, scores.shape[-1]).add_(bias)
    sink = sink_column(stream, rows)
    if sink is not None:
        scores = torch.cat([scores, sink], -1)
        values = functional.pad(values, (0, 0, 0, 1))
    top = None
    if stream.calibrated or stream.totals:
        top = scores.amax(-1, keepdim=True).view(stream.batch, stream.heads, -1, 1)
    return WindowWeights(scores.softmax(-1), queries, slope, keys, values, top)


def linear_sums(
    stream: Stream, rows: slice, sums: Sums, features: Tensor, phi_q: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights of the near keys [B * M, H / M * c, n], numerator, denominator) of a chunk's linear attention.

    Args:
        stream, rows: the chunk.
        sums: of the folded keys.
        features, values: of the near keys, [B, M, n, F] and [B, M, n, E].
        phi_q: grouped, [B * M, H / M * c, F].
    """
    memories = features.shape[1]
    weights = torch.bmm(phi_q, features.flatten(0, 1).mT)
    if weights.shape[-1]:
        seen = stream.block(rows, stream.near(rows), "linear")[1]
        weights.view(stream.batch, stream.heads, -1, weights.shape[-1]).mul_(seen)
    numerator = torch.bmm(weights, values.flatten(0, 1))
    denominator = weights.sum(-1, keepdim=True)
    if sums.total is not None and sums.normalizer is not None:
        far = far_queries(stream, rows, sums, phi_q, memories)
        numerator.baddbmm_(far, sums.total)
        denominator.baddbmm_(far, sums.normalizer)
    return weights, numerator, denominator


def far_queries(stream: Stream, rows: slice, sums: Sums, phi_q: Tensor, memories: int) -> Tensor:
    """Query features, 0 in rows whose segment is not the folded one."""
    same = stream.same_segment(rows, sums.segment)
    if same is None:
        return phi_q
    return group(same.expand(-1, stream.heads, -1, -1), memories) * phi_q


def run(call: Call, output_final_state: bool) -> tuple[Tensor, AttentionState | None]:
    """The output [B, H, T, E] in q's dtype, and the state after the last token if asked for."""
    out, _, state = run_with_totals(call, output_final_state, wanted=False)
    return out, state


def run_with_totals(
    call: Call, output_final_state: bool, *, wanted: bool = True
) -> tuple[Tensor, Tensor | None, AttentionState | None]:
    """The same and, where wanted, the logarithm of the output's denominator between them [B, H, T, 1].

    A window alone has one, and `calibrated` mixing.
    """
    stream = Stream(call, totals=wanted)
    sums, totals = Sums(stream), empty_totals(stream) if wanted else None
    out, shape = attend(stream, sums, mixing_weights(stream), totals)
    if not output_final_state:
        return out, totals, None
    state = stream.final_state(*((None, None) if call.phi_k is None else sums.tensors(*shape)))
    return out, totals, state


def empty_totals(stream: Stream) -> Tensor:
    """Memory for the logarithms of the denominators, in the dtype of sums."""
    shape = (stream.batch, stream.heads, stream.length, 1)
    return torch.empty(shape, dtype=stream.dtype, device=stream.call.q.device)


def mixing_weights(stream: Stream) -> Weights:
    """The branches' weights; where they have one denominator, the rule's gate as the window's."""
    if not stream.joint:
        return stream.weights()
    gate = torch.as_tensor(stream.call.gate, dtype=stream.dtype, device=stream.call.q.device)
    return Weights(gate.expand(stream.batch, stream.heads, stream.length)[..., None], None)


def attend(
    stream: Stream, sums: Sums, weights: Weights, totals: Tensor | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """All chunks in order: the output, and (M, F) of the features. ``sums`` ends up with what is folded, and
    ``totals`` with the logarithms of the denominators."""
    call = stream.call
    shape = (stream.batch, stream.heads, stream.length, stream.value_size)
    out = torch.empty(shape, dtype=call.q.dtype, device=call.q.device)
    sizes = (0, 0)
    plain = Plain(stream, weights) if is_plain(call) else None
    for rows in stream.chunks():
        if plain is not None and not plain.reaches_back(rows):
            sizes = plain.run(rows, sums, out)
            continue
        part = stream.row_slice(rows)
        window = linear = seen = None
        if call.window is not None and weights.window is not None:
            seen = window_weights(stream, rows)
            window = torch.bmm(seen.probabilities, seen.values).view(*shape[:2], -1, shape[3])
        if call.phi_k is not None:
            linear, sizes = _linear(stream, rows, sums)
        if stream.joint:
            assert window is not None
            assert linear is not None
            assert seen is not None
            assert weights.window is not None
            mixed, total = _joint(stream, seen, window, linear, rows_of(weights.window, part))
        else:
            mixed, total = _convex(window, linear, weights, part), None
            if totals is not None and seen is not None:
                assert seen.top is not None
                total = seen.mass(stream).log_().add_(seen.top)
        if mixed is None:
            out[:, :, part] = 0
            continue
        if call.key_mask is not None:
            mixed.masked_fill_(~call.key_mask[:, None, part, None], 0)
        out[:, :, part] = mixed
        if totals is not None and total is not None:
            totals[:, :, part] = total
    return out, sizes


def _linear(stream: Stream, rows: slice, sums: Sums) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Numerator and denominator [B, H, c, E or 1] of a chunk, and (M, F); folds the chunk's keys."""
    folding, near = stream.folding(rows), stream.near(rows)
    features = stream.key_features(folding)
    memories, count = features.shape[1], near.stop - near.start
    values = spread(stream.key_values(folding)[1], memories)
    phi_q = group(stream.query_features(rows), memories)
    _, numerator, denominator = linear_sums(
        stream, rows, sums, features[:, :, :count], phi_q, values[:, :, :count]
    )
    if folding.stop > folding.start:
        sums.fold(folding, features, values)
    new = (stream.batch, stream.heads, rows.stop - rows.start, -1)
    return (numerator.view(new), denominator.view(new)), (memories, features.shape[-1])


def _joint(
    stream: Stream, seen: WindowWeights, window: Tensor, linear: tuple[Tensor, Tensor], gate: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The mix under one denominator, and its logarithm; the window's output is scratch and changes."""
    numerator, denominator = linear
    mass = seen.mass(stream)
    if stream.shared:
        factor = gate * mass
        return window.mul_(factor).add_(numerator).div_(safe(factor + denominator)), None
    assert seen.top is not None
    near, far, reference = scale_factors(seen.top, gate, denominator)
    near *= mass
    divisor = denominator.clamp_min(EPSILON).mul_(far).add_(near)
    mixed = window.mul_(near).add_(numerator * far).div_(divisor)
    return mixed, reference.add_(divisor.log_()) if stream.totals else None


def scale_factors(top: Tensor, gate: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(m - r), exp(l - r), r): what the sums of `calibrated` mixing are multiplied by, in new memory.

    r is the larger of the window's largest score m and l + log z, l the gate and z linear attention's
    denominator: then neither sum overflows, and together they are 1 at least.
    """
    reference = torch.maximum(top, gate + denominator.clamp_min(EPSILON).log())
    return (top - reference).exp_(), (gate - reference).exp_(), reference


def _convex(
    window: Tensor | None, linear: tuple[Tensor, Tensor] | None, weights: Weights, part: slice
) -> Tensor | None:
    """Weighted sum of the normalised branches; the arguments are scratch and change."""
    mixed = None
    if window is not None and weights.window is not None:
        mixed = window.mul_(rows_of(weights.window, part))
    if linear is not None and weights.linear is not None:
        other = linear[0].mul_(rows_of(weights.linear, part) / safe(linear[1]))
        mixed = other if mixed is None else mixed.add_(other)
    return mixed


def rows_of(weights: Tensor, part: slice) -> Tensor:
    """The chunk's part of weights [B, H, T or 1, 1]."""
    return weights if weights.shape[2] == 1 else weights[:, :, part]
