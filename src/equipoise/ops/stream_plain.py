"""One chunk of `equipoise.ops.stream` in as few operations as it takes, for the plain case.

Plain is what inference mostly is: convex mixing of both branches over overlapping keys, no padding, no
packing. Results are those of `equipoise.ops.stream_forward`; what differs is that products go into buffers
that stay in cache, scale and mask ride along with the scores' product, and the band is a multiple of 16
keys. Shapes follow the legend in `equipoise.ops.types`; G = H / N query heads share a key head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equipoise.ops.stream import Stream, Weights
from equipoise.ops.stream_sums import Sums, group, safe, sink_column, spread
from equipoise.ops.types import Call

LOG2_E = math.log2(math.e)
"""Weights are powers of two of scores in these units: exp itself takes 25 times as long on hidden keys."""
ALIGNED = 16
"""Keys of a band come in multiples of this: what a vector register holds."""


def is_plain(call: Call) -> bool:
    """Whether a call that the stream supports has nothing in it that `Plain` leaves out."""
    return (
        call.window is not None
        and call.phi_k is not None
        and call.mixing == "convex"
        and not call.lagging
        and call.softcap is None
        and call.key_mask is None
        and call.segment_ids is None
        and call.branches.window is True
        and call.branches.linear is True
    )


class Plain:
    """The chunks of one call; keeps the buffers they share."""

    def __init__(self, stream: Stream, weights: Weights) -> None:
        self.stream, self.weights = stream, weights
        self.gate = stream.call.gate if isinstance(stream.call.gate, float) else None
        self._buffers: dict[tuple[str | int, ...], Tensor] = {}
        self._biases: dict[tuple[int, int, int], Tensor] = {}
        self._device = stream.call.q.device

    def reaches_back(self, rows: slice) -> bool:
        """Whether some window of the rows holds tokens of an earlier call; those are not for this path."""
        return self.stream.tokens.valid is not None or self.stream.band(rows).start < self.stream.past

    def band(self, rows: slice) -> slice:
        """The keys that some window of the rows reaches, and a few more before them."""
        exact = self.stream.band(rows)
        count = -(-(exact.stop - exact.start) // ALIGNED) * ALIGNED
        return slice(max(self.stream.past, rows.stop - count), rows.stop)

    def run(self, rows: slice, sums: Sums, out: Tensor) -> tuple[int, int]:
        """Attend for a chunk: rows of ``out`` [B, H, T, E] are written, its keys folded; (M, F)."""
        stream, part = self.stream, self.stream.row_slice(rows)
        dtype, batch, heads = stream.dtype, stream.batch, stream.heads
        band = stream.row_slice(self.band(rows))
        keys = stream.keys[:, :, band].to(dtype).flatten(0, 1)
        values = stream.values[:, :, band].to(dtype)
        queries = group(stream.queries[:, :, part].to(dtype), stream.kv_heads)
        window, mass = self._window(rows, queries, keys, values.flatten(0, 1))
        count = part.stop - part.start
        features = stream.key_features(rows)
        memories, size = features.shape[1], features.shape[3]
        values = spread(values[:, :, -count:], memories).flatten(0, 1)
        phi_q = group(stream.query_features(rows), memories)
        linear, denominator = self._linear(count, phi_q, features.flatten(0, 1), values, sums)
        shape = (batch * heads, count, -1)
        window, linear = window.view(shape), linear.view(shape)
        near, far = self._shares(part, count)
        mixed = window.mul_(near / mass.view(shape))
        mixed.addcmul_(linear, far / safe(denominator.view(shape)))
        out[:, :, part] = mixed.view(batch, heads, count, -1)
        return memories, size

    def _shares(self, part: slice, count: int) -> tuple[float | Tensor, float | Tensor]:
        """What the normalised branches are multiplied by, [B * H, c, 1] or one number."""
        if self.gate is not None:
            return self.gate, 1 - self.gate
        assert self.weights.window is not None
        assert self.weights.linear is not None
        near, far = (
            (weight if weight.shape[2] == 1 else weight[:, :, part]).reshape(
                -1, min(count, weight.shape[2]), 1
            )
            for weight in (self.weights.window, self.weights.linear)
        )
        return near, far

    def _window(self, rows: slice, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Window attention before normalisation [B * N, G * c, E], and the sums of its weights [..., 1]."""
        batch, count, _ = queries.shape
        bias, width = self._bias(rows), keys.shape[1]
        scores = self._buffer("scores", batch, count, width)
        torch.baddbmm(bias, queries, keys.mT, alpha=self.stream.call.scale * LOG2_E, out=scores)
        top, sink = scores.amax(-1, keepdim=True), sink_column(self.stream, rows)
        if sink is not None:
            top = torch.maximum(top, sink.mul_(LOG2_E))
        scores.sub_(top).exp2_()
        out = self._buffer("window", batch, count, values.shape[2])
        torch.bmm(scores, values, out=out)
        mass = scores.sum(-1, keepdim=True)
        return out, mass if sink is None else mass + (sink - top).exp2()

    def _bias(self, rows: slice) -> Tensor:
        """[1, G * c, keys of the band]: 0 for keys in a row's window, else next to -inf."""
        stream, band = self.stream, self.band(rows)
        key = (rows.start - band.start, rows.stop - rows.start, band.stop - band.start)
        if key not in self._biases:
            bias, _ = stream.block(rows, band, "window")
            assert bias is not None
            self._biases[key] = bias[0].repeat(1, stream.heads // stream.kv_heads, 1)
        return self._biases[key]

    def _linear(
        self, count: int, phi_q: Tensor, features: Tensor, values: Tensor, sums: Sums
    ) -> tuple[Tensor, Tensor]:
        """Numerator [B * M, H / M * c, E] and denominator [..., 1] of the chunk; folds its keys."""
        memories, queries, _ = phi_q.shape
        weights = self._buffer("weights", memories, queries, count)
        torch.bmm(phi_q, features.mT, out=weights)
        weights.view(-1, count, count).tril_()
        numerator = self._buffer("linear", memories, queries, values.shape[2])
        torch.bmm(weights, values, out=numerator)
        denominator = weights.sum(-1, keepdim=True)
        if sums.total is not None and sums.normalizer is not None:
            numerator.baddbmm_(phi_q, sums.total)
            denominator.baddbmm_(phi_q, sums.normalizer)
        sums.add(features, values)
        return numerator, denominator

    def _buffer(self, name: str, *shape: int) -> Tensor:
        key = (name, *shape)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(shape, dtype=self.stream.dtype, device=self._device)
        return self._buffers[key]
