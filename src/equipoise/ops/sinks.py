"""Sinks that the window has left behind: the first real tokens of a segment, kept for as long as it lasts.

Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.ops.tokens import Tokens
from equipoise.ops.types import AttentionState


@dataclass(frozen=True)
class Sinks:
    """Keys and values of the sinks behind the window; all tensors None until there are any.

    Attributes:
        stop: the first token, counted from the start of the history, that is not yet looked at.
        keys, values: [B, N, P, D], [B, N, P, E].
        valid: which of the P slots are filled [B, P].
        segment: the segment they belong to [B]; None when there is one.
        features: phi(k) of them [B, M, P, F], where features were given as tensors.
    """

    stop: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    valid: Tensor | None = None
    segment: Tensor | None = None
    features: Tensor | None = None

    @classmethod
    def of(cls, state: AttentionState | None) -> Sinks:
        """What a state holds."""
        if state is None:
            return cls()
        return cls(
            0, state.sink_keys, state.sink_values, state.sink_valid, state.sink_segment, state.sink_features
        )

    def mask(self, tokens: Tokens, rows: slice) -> Tensor:
        """Sinks left behind are visible to every query of their segment [B, 1, C, P]."""
        assert self.valid is not None
        mask = self.valid[:, None, None, :].expand(-1, -1, rows.stop - rows.start, -1)
        if tokens.segments is not None:
            assert self.segment is not None
            mask = mask & (tokens.segments[:, rows] == self.segment[:, None])[:, None, :, None]
        return mask

    def leave(
        self, stop: int, count: int, keys: Tensor, values: Tensor, features: Tensor | None, tokens: Tokens
    ) -> Sinks:
        """Keep the sinks among the tokens up to ``stop``, which the next block's window no longer reaches.

        Args:
            stop: where the window of the next block starts.
            count: P.
            keys, values, features: of all tokens, history first.
            tokens: their validity, segments and ranks.
        """
        gone = slice(self.stop, stop)
        if gone.stop <= gone.start:
            return self
        assert tokens.ranks is not None
        chosen = tokens.ranks[:, gone, None] == torch.arange(count, device=keys.device)
        if tokens.valid is not None:
            chosen = chosen & tokens.valid[:, gone, None]
        segment = keep = None
        if tokens.segments is not None:
            segment = tokens.segments[:, stop - 1].clone()  # a view would keep them all
            chosen = chosen & (tokens.segments[:, gone] == segment[:, None])[..., None]
        if self.valid is not None:
            keep = self.valid if segment is None else self.valid & (self.segment == segment)[:, None]

        def updated(old: Tensor | None, source: Tensor) -> Tensor:
            part = source[:, :, gone]
            new = chosen.to(part.dtype).mT[:, None] @ part  # one-hot rows: exact copies, differentiable
            return new if old is None or keep is None else new + old * keep[:, None, :, None]

        return Sinks(
            stop,
            updated(self.keys, keys),
            updated(self.values, values),
            chosen.any(1) if keep is None else chosen.any(1) | keep,
            segment,
            None if features is None else updated(self.features, features),
        )

    def or_empty(
        self, count: int, keys: Tensor, values: Tensor, features: Tensor | None, segmented: bool
    ) -> Sinks:
        """The sinks, P unfilled slots where none was left behind yet; other arguments as in `leave`."""
        if not count or self.keys is not None:
            return self

        def empty(source: Tensor) -> Tensor:
            return source.new_zeros(*source.shape[:2], count, source.shape[-1])

        batch, device = keys.shape[0], keys.device
        return Sinks(
            0,
            empty(keys),
            empty(values),
            torch.zeros(batch, count, dtype=torch.bool, device=device),
            torch.full((batch,), -1, device=device) if segmented else None,
            None if features is None else empty(features),
        )
