"""Scores of single documents, task by task, and the file that keeps those of a finished branch state."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.files import write_text
from equipoise.models.load import ADAPTERS, load_config
from equipoise.models.storage import fingerprint
from equipoise.statistics import Floats

FORMAT = 1
FOLDER = "scores"
"""Where a result directory keeps the scores of finished states."""


class ScoresError(RuntimeError):
    """Stored scores that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class MetricScores:
    """One metric of one task; its value is sum(sums) / sum(weights), of a state and, by guessing, of none.

    Attributes:
        sums: [documents] float64; higher is better.
        weights: [documents] float64; 0 for documents that the metric does not cover.
        chance: [documents] float64, the sums to expect of guessing; 0 where there are no options.
    """

    sums: Floats
    weights: Floats
    chance: Floats


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """One task in one state.

    Attributes:
        documents: a hash of each document and its prompt: equal where states saw the same.
        metrics: by lm-eval's `metric,filter`, in the task's own order.
        reported: lm-eval's own aggregates of all numeric metrics, also of those that are no average over
            documents.
    """

    documents: tuple[str, ...]
    metrics: Mapping[str, MetricScores]
    reported: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class StateScores:
    """All tasks in one state.

    Attributes:
        tasks: by task.
        seconds: wall-clock time it took.
        notes: what lm-eval warned of meanwhile.
    """

    tasks: Mapping[str, TaskScores]
    seconds: float
    notes: tuple[str, ...] = field(default=())


def key_of(settings: Mapping[str, Any]) -> str:
    """Hash of everything that scores depend on, without addresses in memory: they change with every run."""
    text = json.dumps(settings, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


def model_fingerprint(name_or_path: str) -> str:
    """Hash of a local model's weights, adapters, configuration and tokenizer; name and commit on the Hub."""
    path = Path(name_or_path)
    if not path.is_dir():
        return f"{name_or_path}@{getattr(load_config(name_or_path), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for name in ("config.json", ADAPTERS, f"lora/{ADAPTERS}", "tokenizer.json", "tokenizer_config.json"):
        if (path / name).is_file():
            digest.update(name.encode() + (path / name).read_bytes())
    for folder in (path, path / "lora"):
        if any(folder.glob("*.safetensors")):
            digest.update(fingerprint(folder).encode())
    return digest.hexdigest()


def score_file(output: Path, state: str, key: str) -> Path:
    """Where the scores of a state under these settings lie."""
    return output / FOLDER / f"{state}-{key[:12]}.json"


def store(path: Path, key: str, settings: Mapping[str, Any], scores: StateScores) -> None:
    """Keep a finished state; the file appears only when it is complete."""
    data = {"format": FORMAT, "key": key, "settings": settings, **asdict(scores)}
    text = json.dumps(data, default=_plain, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def stored(path: Path, key: str) -> StateScores | None:
    """The scores of a state that was finished before under the same settings; None if it was not.

    Raises:
        ScoresError: the file is not what `store` writes.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["format"], data["key"]) != (FORMAT, key):
            return None
        tasks = {name: _task(task) for name, task in data["tasks"].items()}
        return StateScores(tasks=tasks, seconds=data["seconds"], notes=tuple(data["notes"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScoresError(
            f"{path}: expected the scores of a finished state, got a file that does not read as such "
            f"({type(error).__name__}: {error}). Remove it to run that state again."
        ) from None


def _task(data: Mapping[str, Any]) -> TaskScores:
    metrics = {
        name: MetricScores(**{part: np.asarray(values, dtype=np.float64) for part, values in metric.items()})
        for name, metric in data["metrics"].items()
    }
    return TaskScores(documents=tuple(data["documents"]), metrics=metrics, reported=data["reported"])


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
