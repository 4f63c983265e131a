"""The files of finished states."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from equipoise.evaluate.scores import (
    MetricScores,
    ScoresError,
    StateScores,
    TaskScores,
    key_of,
    model_fingerprint,
    score_file,
    store,
    stored,
)
from support import tiny_model

SCORES = StateScores(
    tasks={
        "one": TaskScores(
            documents=("a", "b"), reported={"acc,none": 0.5},
            metrics={"acc,none": MetricScores(
                sums=np.array([1.0, 0.0]), weights=np.ones(2), chance=np.array([1 / 3, 0.25])
            )},
        )
    },
    seconds=1.5, notes=("a warning",),
)  # fmt: skip


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    path = score_file(tmp_path, "window", "f" * 64)
    assert stored(path, "f" * 64) is None
    store(path, "f" * 64, {"limit": 3}, SCORES)
    back = stored(path, "f" * 64)
    assert back is not None
    assert (back.seconds, back.notes) == (1.5, ("a warning",))
    one, known = back.tasks["one"], SCORES.tasks["one"]
    assert (one.documents, one.reported) == (known.documents, known.reported)
    for part in ("sums", "weights", "chance"):
        np.testing.assert_array_equal(
            getattr(one.metrics["acc,none"], part), getattr(known.metrics["acc,none"], part)
        )
    assert stored(path, "f" * 12 + "0" * 52) is None  # the same file name, but not the same key
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 1, "key": "k", "tasks": 3}'])
def test_damaged_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "window-k.json"
    path.write_text(content)
    with pytest.raises(ScoresError, match=r"window-k.json: expected the scores.*Remove it"):
        stored(path, "k")


def test_key_depends_on_every_setting_but_not_on_addresses() -> None:
    assert key_of({"a": 1, "b": {"c": 2}}) == key_of({"b": {"c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of({"f": "<function f at 0x7f01>"}) == key_of({"f": "<function f at 0x7f02>"})


def test_fingerprint_of_a_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = model_fingerprint(str(tmp_path / "a"))
    assert model_fingerprint(str(tmp_path / "b")) == first
    (tmp_path / "b" / "lora").mkdir()
    (tmp_path / "b" / "lora" / "adapter_config.json").write_text("{}")
    assert model_fingerprint(str(tmp_path / "b")) != first
    tiny_model(seed=1).save_pretrained(tmp_path / "a")
    assert model_fingerprint(str(tmp_path / "a")) != first
