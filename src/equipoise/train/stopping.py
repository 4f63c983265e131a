"""When to stop: judged by one watched value, and kept in training checkpoints for runs that are killed."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from equipoise.config import LOSS, EarlyStopping


class StoppingRule(TrainerCallback, ExportableState):
    """Judges one value a look. The trainer asks it; being a callback gets it into training checkpoints.

    ``best``: stops after ``patience`` looks in a row that do not improve on the best value so far by more
    than ``min_improvement``; the look with the best value is the one to keep. ``fall``: stops after
    ``patience`` looks in a row that are each worse than the one before by more than ``min_improvement``; the
    one to keep is the last that was not.

    Args:
        settings: a plain mapping of `EarlyStopping` (checkpoints are JSON).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = EarlyStopping(**settings)
        self.reference: float | None = None
        self.worse = 0

    @property
    def watched(self) -> str:
        """Name of the value it judges."""
        return self.settings.watch

    @property
    def strikes(self) -> bool:
        """Whether it is time to stop."""
        return self.worse >= self.settings.patience

    def keeps(self, value: float) -> bool:
        """Take in the value of a look (NaN is worse); whether its weights are the ones to keep so far."""
        if math.isnan(value):
            self.worse += 1
            return False
        goodness = -value if lower_is_better(self.watched) else value
        before, least = self.reference, self.settings.min_improvement
        if self.settings.mode == "fall":
            fell = before is not None and before - goodness > least
            self.reference, self.worse = goodness, self.worse + 1 if fell else 0
            return not fell
        self.worse = 0 if before is None or goodness - before > least else self.worse + 1
        is_best = before is None or goodness > before
        self.reference = goodness if is_best else before
        return is_best

    def state(self) -> dict[str, Any]:
        return {
            "args": {"settings": self.settings.model_dump(mode="json")},
            "attributes": {"reference": self.reference, "worse": self.worse},
        }


def lower_is_better(name: str) -> bool:
    """Whether a watched value is a loss; of all others more is better."""
    return name == LOSS or name.startswith("nll")
