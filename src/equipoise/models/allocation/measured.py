"""Measurements of one allocation, and how far they have got."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from equipoise.config import AllocationConfig
from equipoise.models.allocation.choosing import fewer_sinks
from equipoise.models.allocation.measuring import DonorDivergence

STEPS = 6
"""Points of the path along which the worth of windows is integrated."""
LOOKUP_STEPS = 2
"""And of the path that heads are chosen by where lookups are weighed: an order of heads wants no more."""


class Measured:
    """Measurements, and how many of their batches are done; a pass with gradients counts for three."""

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        sinks: int,
        settings: AllocationConfig,
        batch_size: int,
        seen: Callable[[int, int], None],
    ) -> None:
        self.done, self.weight, self.seen, self.sinks = 0, 1, seen, sinks
        self.credit, moves = settings.linear_credit, settings.moves
        self.donor = DonorDivergence(model, inputs, batch_size=batch_size, tick=self._tick)
        sinking = 0
        if settings.fewer_sinks:  # at most: what changes nothing is not measured
            counts = len(fewer_sinks(sinks))
            sinking = 2 + counts + (counts + 1) * len(self.donor.mixers)
        lookups = 3 * LOOKUP_STEPS if settings.weigh_lookups else 0
        self.total = (3 * STEPS + lookups + 2 + sinking + (moves and moves + 1)) * self.donor.batches

    def _tick(self) -> None:
        self.done += self.weight
        self.seen(self.done, self.total)

    def worth(self, sizes: Sequence[int]) -> list[list[list[float]]]:
        return self._by_layer(self._integrated(sizes, steps=STEPS))

    def beyond(self, window: int) -> list[list[float]]:
        """What full attention restores beyond a window in every head, by layer, lookups weighed."""
        found = self._integrated([window], steps=LOOKUP_STEPS, weigh_lookups=True)
        return self._by_layer(found.squeeze(-1))

    def _integrated(self, sizes: Sequence[int], **more: Any) -> Tensor:
        self.weight = 3
        found = self.donor.worth(sizes, sinks=self.sinks, **more)
        self.weight = 1
        return found

    def _by_layer(self, found: Tensor) -> list[Any]:
        # a tensor has as many heads as the widest layer
        return [row[: mixer.heads].tolist() for row, mixer in zip(found, self.donor.mixers, strict=True)]

    def windows(
        self,
        windows: Sequence[Sequence[int]],
        heads: Sequence[Sequence[int]],
        sinks: Sequence[int] | None = None,
    ) -> float:
        own = self.sinks if sinks is None else sinks
        return self.donor.windowed(windows, sinks=own, heads=heads, softmax_share=self.credit)
