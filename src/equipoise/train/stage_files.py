"""What a stage leaves on disk: training checkpoints, its trained weights, and what it did.

A checkpoint is filled in `SAVING` and moves to its own name when all of it, and the manifest that lists it,
is on the disk. So ``checkpoint-N`` is whole, or was damaged later, which its manifest tells.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from equipoise.files import (
    damage,
    make_directory,
    move_directory,
    read_manifest,
    remove_directory,
    remove_leftovers,
    sha256,
    sync,
    sync_tree,
    write_manifest,
    write_text,
)

TRAINED = "trained.safetensors"
"""The trained weights, in a training checkpoint and beside `FINISHED`."""
FINISHED = "finished.json"
"""Written when a stage is done, so that a run killed later does not go through it again."""
SAVING = ".saving"
"""Where a checkpoint is filled."""
STATE = "trainer_state.json"
_LOG = logging.getLogger(__name__)


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


# ---- checkpoints


def checkpoint_at(directory: Path, step: int) -> Path:
    """Where a stage keeps the checkpoint of a step."""
    return directory / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The optimiser step a checkpoint is of; -1 for another directory."""
    end = checkpoint.name.removeprefix("checkpoint-")
    return int(end) if end.isdecimal() else -1


def latest_checkpoint(directory: Path, *, tell: bool = False) -> Path | None:
    """The newest training checkpoint of a stage that is whole, and whose best one before it is whole too.

    Damaged ones are passed over; with ``tell``, each with a line of warning.
    """
    found = sorted(directory.glob("checkpoint-*"), key=step_of, reverse=True)
    for path in (path for path in found if step_of(path) >= 0):
        fault = checkpoint_damage(path)
        if fault is None:
            return path
        if tell:
            _LOG.warning("the training checkpoint %s is passed over: %s.", path, fault)
    return None


def checkpoint_damage(checkpoint: Path) -> str | None:
    """What is wrong with a training checkpoint, in words; None where nothing is."""
    fault = damage(checkpoint)
    if fault is not None:
        return fault
    missing = {TRAINED, STATE} - read_manifest(checkpoint).keys()
    if missing:
        return f"it was written without {min(missing)}"
    best = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("best_global_step")
    if not best or best == step_of(checkpoint):
        return None
    fault = damage(checkpoint_at(checkpoint.parent, best))
    return None if fault is None else f"of the best one before it, checkpoint-{best}, {fault}"


def begin_checkpoint(directory: Path) -> None:
    """Make room to fill a checkpoint in."""
    shutil.rmtree(directory / SAVING, ignore_errors=True)
    make_directory(directory)
    sync(directory.parent)  # others may have made it, and not seen to it that it stays


def commit_checkpoint(directory: Path, step: int, keep: Collection[int | None]) -> None:
    """Move a filled checkpoint to its name, whole and listed; then remove all but it and those to keep."""
    filled = checkpoint_at(directory / SAVING, step)
    sync_tree(filled)
    write_manifest(filled)
    place = checkpoint_at(directory, step)
    move_directory(filled, place)
    for path in directory.glob("checkpoint-*"):
        if step_of(path) not in (-1, step, *keep):
            remove_directory(path)
    remove_leftovers(directory)


# ---- finished stages


def finished_result(directory: Path, *, tell: bool = False) -> StageResult | None:
    """What a stage that ran to its end left; None if it did not, or its weights were damaged since."""
    path = directory / FINISHED
    if not path.is_file():
        return None
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        expected = described.pop("trained_sha256")
        if sha256(directory / TRAINED) != expected:
            raise ValueError(f"{TRAINED} is not what was written")
        return StageResult(**described)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if tell:
            _LOG.warning("the finished stage %s is gone through again: it is damaged (%s).", directory, error)
        return None


def write_finished(directory: Path, result: StageResult) -> None:
    """Note that the stage is done; its weights must be there already."""
    described = {**asdict(result), "trained_sha256": sha256(directory / TRAINED)}
    write_text(directory / FINISHED, json.dumps(described))


def clear(directory: Path) -> None:
    """Take away what an earlier run of the stage left, which a later resume would mistake for this one's."""
    (directory / FINISHED).unlink(missing_ok=True)
    for path in directory.glob("checkpoint-*"):
        if (path / TRAINED).is_file():
            remove_directory(path)
    shutil.rmtree(directory / SAVING, ignore_errors=True)
    remove_leftovers(directory)
