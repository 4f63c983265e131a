"""The running sums of linear attention: S, z, and which keys they stand for.

Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.ops.mix import Branch
from equipoise.ops.tokens import Tokens
from equipoise.ops.types import AttentionState


@dataclass(frozen=True)
class Folded:
    """Sums over the keys folded so far; all tensors None until there are any.

    Attributes:
        stop: the first token, counted from the start of the history, that is not yet folded.
        sums, normalizer: S [B, M, F, E] and z [B, M, F].
        count: number of keys in them [B].
        segment: the segment they belong to [B]; None when there is one.
    """

    stop: int
    sums: Tensor | None = None
    normalizer: Tensor | None = None
    count: Tensor | None = None
    segment: Tensor | None = None

    @classmethod
    def of(cls, state: AttentionState | None, stop: int) -> Folded:
        """What a state holds."""
        if state is None:
            return cls(stop)
        return cls(stop, state.linear_state, state.linear_normalizer, state.folded, state.folded_segment)

    def add_to(self, branch: Branch, phi_q: Tensor, tokens: Tokens, rows: slice) -> Branch:
        """The branch of the queries ``rows`` with what the folded keys contribute."""
        if self.sums is None or self.normalizer is None or self.count is None:
            return branch
        batch, memories = self.sums.shape[:2]
        grouped = phi_q.reshape(batch, memories, -1, phi_q.shape[-1])
        far = (grouped @ self.sums).view_as(branch.numerator)
        weight = (grouped @ self.normalizer[..., None]).view_as(branch.denominator)
        seen = (self.count > 0)[:, None, None, None]
        if tokens.segments is not None and self.segment is not None:
            same = (tokens.segments[:, rows] == self.segment[:, None])[:, None, :, None]
            far, weight, seen = far * same, weight * same, seen & same
        return Branch(branch.numerator + far, branch.denominator + weight, branch.visible | seen)

    def fold(self, stop: int, features: Tensor, values: Tensor, tokens: Tokens, skip_sinks: int) -> Folded:
        """The sums with the tokens up to ``stop`` in them.

        Args:
            stop: where folding stops.
            features, values: of the tokens `self.stop`..stop [B, M, n, F], [B, N, n, E]; 0 in padding.
            tokens: their validity, segments and ranks.
            skip_sinks: leave out the first so many real tokens of a segment.
        """
        fresh = slice(self.stop, stop)
        kept = torch.ones(features.shape[0], stop - self.stop, dtype=torch.bool, device=features.device)
        if tokens.valid is not None:
            kept = kept & tokens.valid[:, fresh]
        if skip_sinks:
            assert tokens.ranks is not None
            kept = kept & (tokens.ranks[:, fresh] >= skip_sinks)
        segment = None
        if tokens.segments is not None:
            segment = tokens.segments[:, stop - 1].clone()  # a view would keep them all
            kept = kept & (tokens.segments[:, fresh] == segment[:, None])
        if skip_sinks or segment is not None:
            features = features.masked_fill(~kept[:, None, :, None], 0)
        groups = features.shape[1] // values.shape[1]
        values = values.repeat_interleave(groups, 1) if groups > 1 else values
        sums, normalizer, count = features.mT @ values, features.sum(2), kept.sum(1)
        if self.sums is None or self.normalizer is None or self.count is None:
            return Folded(stop, sums, normalizer, count, segment)
        old = self.sums, self.normalizer, self.count
        if segment is not None and self.segment is not None:  # a new segment starts from nothing
            same = self.segment == segment
            old = old[0] * same[:, None, None, None], old[1] * same[:, None, None], old[2] * same
        return Folded(stop, old[0] + sums, old[1] + normalizer, old[2] + count, segment)

    def or_empty(self, probe: Tensor, value_size: int, segmented: bool) -> Folded:
        """The sums, zeros where nothing was folded; ``probe`` are features of any token [B, M, n, F]."""
        if self.sums is not None:
            return self
        batch, memories, _, size = probe.shape
        return Folded(
            self.stop,
            probe.new_zeros(batch, memories, size, value_size),
            probe.new_zeros(batch, memories, size),
            torch.zeros(batch, dtype=torch.long, device=probe.device),
            torch.full((batch,), -1, device=probe.device) if segmented else None,
        )
