"""Callbacks whose state goes through training checkpoints: a resumed stage logs what it would have logged."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from equipoise.data.streaming import RowPosition, StreamedRows


class StageClock(TrainerCallback, ExportableState):
    """Time spent on a stage, also before it was killed and resumed."""

    def __init__(self, before: float = 0.0) -> None:
        self.before, self.since = before, time.monotonic()

    def total(self) -> float:
        """Seconds so far."""
        return self.before + time.monotonic() - self.since

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {"before": self.total()}, "attributes": {}}


class UnloggedLoss(TrainerCallback, ExportableState):
    """The losses since the last log, so that the next one is the mean it would have been."""

    def __init__(self, total: float = 0.0, since: int = 0) -> None:
        self.total, self.since = total, since

    def state(self) -> dict[str, Any]:
        return {"args": {"total": self.total, "since": self.since}, "attributes": {}}


class DataPosition(TrainerCallback, ExportableState):
    """Where streamed rows stand, so that a resumed run need not read again what it has seen."""

    def __init__(self, row: int = 0, position: dict[str, Any] | None = None) -> None:
        self.row, self.position = row, position

    def take(self, rows: StreamedRows, row: int) -> None:
        """Note where a row begins, for the checkpoint about to be written."""
        self.row, self.position = row, rows.position(row).to_dict()

    def give(self, rows: StreamedRows) -> None:
        """Tell the rows what the checkpoint says."""
        if self.position is not None:
            rows.seek(self.row, RowPosition.from_dict(self.position))

    def state(self) -> dict[str, Any]:
        return {"args": {"row": self.row, "position": self.position}, "attributes": {}}
