"""The sums that `equipoise.ops.stream` carries from chunk to chunk, and the shapes that go with them."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.ops.mix import EPSILON
from equipoise.ops.stream import Stream


class Sums:
    """S [B * M, F, E] and z [B * M, F, 1] of the folded keys, updated in place; None until there are any.

    Attributes:
        segment: the segment they belong to [B]; None when there is one.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.total: Tensor | None = None
        self.normalizer: Tensor | None = None
        self.segment: Tensor | None = None
        state = stream.call.state
        if state is not None and state.linear_state is not None and state.linear_normalizer is not None:
            # a copy: the caller's state stays what it was
            self.total = state.linear_state.flatten(0, 1).to(stream.dtype, copy=True)
            self.normalizer = state.linear_normalizer.flatten(0, 1)[..., None].to(stream.dtype, copy=True)
            self.segment = state.folded_segment

    def own(self, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        """The segment that is folded with these columns [B], and which of them belong to it [B, n]."""
        segments = self.stream.tokens.segments
        if segments is None:
            return None, None
        segment = segments[:, columns.stop - 1]
        return segment, segments[:, columns] == segment[:, None]

    def fold(self, columns: slice, features: Tensor, values: Tensor) -> None:
        """Add keys: features [B, M, n, F], values [B, M, n, E]."""
        segment, same = self.own(columns)
        if same is not None:
            features = features * same[:, None, :, None].to(features.dtype)
        self.keep(segment)
        self.add(features.flatten(0, 1), values.flatten(0, 1))
        self.segment = segment

    def add(self, features: Tensor, values: Tensor) -> None:
        """Add keys of the segment that is there: features [B * M, n, F], values [B * M, n, E]."""
        if self.total is None or self.normalizer is None:
            self.total, self.normalizer = torch.bmm(features.mT, values), features.sum(1)[..., None]
        else:
            self.total.baddbmm_(features.mT, values)
            self.normalizer += features.sum(1)[..., None]

    def keep(self, segment: Tensor | None) -> Tensor | None:
        """Start rows afresh where a new segment has begun; returns what the old sums were multiplied by."""
        if segment is None or self.segment is None or self.total is None or self.normalizer is None:
            return None
        kept = (self.segment == segment).to(self.total.dtype)
        kept = kept.repeat_interleave(len(self.total) // len(kept))[:, None, None]
        self.total *= kept
        self.normalizer *= kept
        return kept

    def tensors(self, memories: int, features: int) -> tuple[Tensor, Tensor]:
        """S [B, M, F, E] and z [B, M, F]; zeros where nothing was folded."""
        stream = self.stream
        if self.total is None or self.normalizer is None:
            device = stream.call.q.device
            return (
                torch.zeros(
                    stream.batch, memories, features, stream.value_size, dtype=stream.dtype, device=device
                ),
                torch.zeros(stream.batch, memories, features, dtype=stream.dtype, device=device),
            )
        shape = (stream.batch, memories, features)
        return self.total.view(*shape, -1), self.normalizer.view(shape)


def group(rows: Tensor, groups: int) -> Tensor:
    """[B, H, c, X] -> [B * groups, H / groups * c, X]: query heads of one key head, one below the other."""
    batch, heads, count, size = rows.shape
    return rows.reshape(batch * groups, heads // groups * count, size)


def sink_column(stream: Stream, rows: slice) -> Tensor | None:
    """The sink logits beside a chunk's scores [B * N, H / N * c, 1], in new memory; None without any."""
    logits = stream.call.sink_logits
    if logits is None:
        return None
    shape = (stream.batch, stream.heads, rows.stop - rows.start, 1)
    return group(logits.to(stream.dtype)[None, :, None, None].expand(shape).clone(), stream.kv_heads)


def spread(values: Tensor, heads: int) -> Tensor:
    """[B, N, n, E] -> [B, heads, n, E], each repeated for the heads that share it."""
    return values if values.shape[1] == heads else values.repeat_interleave(heads // values.shape[1], 1)


def safe(denominator: Tensor) -> Tensor:
    """The denominator with its magnitude kept above EPSILON, as in `equipoise.ops.mix.divide`."""
    if denominator.device.type == "cpu" and bool(denominator.amin() >= EPSILON):
        return denominator  # as it is for every map but a few; five operations fewer
    floor = torch.where(denominator < 0, -EPSILON, EPSILON).to(denominator.dtype)
    return torch.where(denominator.abs() < EPSILON, floor, denominator)
