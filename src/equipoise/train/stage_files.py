"""What a stage leaves on disk: training checkpoints, its trained weights, and what it did."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from equipoise.models.storage import write_atomically

TRAINED = "trained.safetensors"
"""The trained weights, in a training checkpoint and beside `FINISHED`."""
FINISHED = "finished.json"
"""Written when a stage is done, so that a run killed later does not go through it again."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did.

    Attributes:
        steps: optimiser steps taken.
        tokens: training tokens seen.
        seconds: time spent training, all runs of a stage that was resumed together.
        history: what was logged, in order; looks at held-out rows too (see `watching.watched_history`).
        kept_step: the step that the result's weights are of, where early stopping chose; None for the last.
    """

    steps: int
    tokens: int
    seconds: float
    history: list[dict[str, float]]
    kept_step: int | None = None


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete training checkpoint of a stage; half-written ones are passed over."""
    found = [path for path in directory.glob("checkpoint-*") if _is_complete(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    """trainer_state.json is what Trainer writes last: one that reads as JSON stands for all the rest."""
    if not checkpoint.name.rpartition("-")[2].isdigit() or not (checkpoint / TRAINED).is_file():
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def finished_result(directory: Path) -> StageResult | None:
    """What a stage that ran to its end left; None if it did not."""
    path = directory / FINISHED
    return StageResult(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_finished(directory: Path, result: StageResult) -> None:
    """Note that the stage is done; its weights must be there already."""
    text = json.dumps(asdict(result))
    write_atomically(directory / FINISHED, lambda path: path.write_text(text, encoding="utf-8"))


def clear(directory: Path) -> None:
    """Take away what an earlier run of the stage left, which a later resume would mistake for this one's."""
    (directory / FINISHED).unlink(missing_ok=True)
    for path in directory.glob("checkpoint-*"):
        if (path / TRAINED).is_file():
            shutil.rmtree(path)
