"""`equipoise convert` watching itself: what reaches run.json and TensorBoard, and what is refused first."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from equipoise.commands.recall_watch import RecallWatcher, recall_watchers
from equipoise.config import ConfigError
from equipoise.evaluate import recall_running
from equipoise.train.convert import convert as convert_run
from equipoise.train.recipes import load_recipe
from equipoise.train.watching import watched_history

from .conftest import Cli

RECALL = "{length: 96, examples: 4, needles: 2, answer_words: 1, wording: pairs}"


def looks(output: Path, stage: str) -> list[dict[str, float]]:
    """What was seen in a stage, from run.json."""
    return watched_history(json.loads((output / "run.json").read_text())["stages"][stage]["history"])


def test_every_look_is_in_run_json(convert: Cli, tmp_path: Path) -> None:
    done = convert("hedgecats", "--set", "watch.every=1", "--set", "finetune.early_stopping.every=1")
    assert done.exit_code == 0, done.stderr
    for stage in ("transfer", "finetune"):
        found = looks(tmp_path / "out", stage)
        assert [look["step"] for look in found] == [0, 1, 2]
        assert all({"nll", "nll_window", "nll_linear", "nll_none", "gap"} <= set(look) for look in found)
    assert ", linear alone " in done.stderr


def test_tensorboard_files_lie_beside_the_model(convert: Cli, tmp_path: Path) -> None:
    done = convert("hedgecats", "--report-to", "tensorboard")
    assert done.exit_code == 0, done.stderr
    files = [path.relative_to(tmp_path / "out/logs") for path in (tmp_path / "out/logs").rglob("events*")]
    assert {path.parts[0] for path in files} == {"transfer", "finetune"}
    assert json.loads((tmp_path / "out/run.json").read_text())["settings"]["report_to"] == "tensorboard"


def test_a_reporter_that_is_not_installed(
    convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else found(name, *more)
    )
    done = convert("ssd", "--report-to", "wandb")
    assert done.exit_code == 2
    assert "wandb is not installed. Run `pip install wandb`" in done.stderr
    assert not (tmp_path / "out").exists()
    done = convert("ssd", "--report-to", "tensorbord")
    assert done.exit_code == 2
    assert "report_to" in done.stderr


def test_a_failed_run_leaves_no_logs(convert: Cli, tmp_path: Path) -> None:
    done = convert("ssd", "--report-to", "tensorboard", "--set", "transfer.batch_size=100000")
    assert done.exit_code == 1
    assert "at least 100000 rows" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_value_that_nobody_watches(convert: Cli, tmp_path: Path) -> None:
    """Known before the donor is read."""
    done = convert("hedgecats", "--set", "finetune.early_stopping.watch=recall")
    assert done.exit_code == 2
    assert "unknown value for finetune.early_stopping.watch 'recall'" in done.stderr
    assert not (tmp_path / "out").exists()


class TestRecall:
    def test_is_asked_at_every_look(self, convert: Cli, tmp_path: Path) -> None:
        done = convert("hedgecats", "--set", f"watch.recall={RECALL}")
        assert done.exit_code == 0, done.stderr
        for stage in ("transfer", "finetune"):
            found = looks(tmp_path / "out", stage)
            assert [look["step"] for look in found] == [0, 2]
            assert all(0 <= look[name] <= 1 for look in found for name in ("recall", "recall_linear"))
        assert ", recall " in done.stderr

    def test_what_is_counted(self, donor: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both branches right on items 0 and 2, linear on 1; items 2 and 3 beyond reach."""
        watch = {"recall": {"length": 96, "needles": 2, "examples": 4}}
        run = load_recipe("hedgecats", {"watch": watch, "data": {"source": str(corpus)}})
        (watcher,) = recall_watchers(run, str(donor))
        assert isinstance(watcher, RecallWatcher)
        assert len(watcher.examples) == 4
        right = {"both": [1, 0, 1, 0], "linear_renormalised": [0, 1, 0, 0]}
        items = [item for _, item in recall_running.items_of(watcher.examples)]
        far = {id(item) for item in items[2:]}
        model: Any = None
        monkeypatch.setattr(
            recall_running, "run_state",
            lambda model, examples, state, **_: SimpleNamespace(right=np.array(right[state], float)),
        )  # fmt: skip
        sight = SimpleNamespace(beyond=lambda item: id(item) in far)
        monkeypatch.setattr(recall_running, "sight", lambda *_: sight)
        assert watcher(model, 0) == {"recall": 0.5, "recall_linear": 0.25, "recall_beyond": 0.5}
        far.clear()
        assert np.isnan(watcher(model, 0)["recall_beyond"])

    def test_nobody_was_handed_in(self, donor: Path, tmp_path: Path) -> None:
        run = load_recipe("hedgecats", {"watch": {"recall": {}}})
        with pytest.raises(
            ConfigError, match=r"expected a watcher of 'recall', got none: `equipoise convert`"
        ):
            convert_run(str(donor), run, tmp_path / "out", console=Console(quiet=True))
        assert not (tmp_path / "out").exists()
        assert recall_watchers(load_recipe("hedgecats"), str(donor)) == []

    def test_a_donor_has_no_branches_to_ask(self) -> None:
        with pytest.raises(ConfigError, match=r"watch\.recall needs a hybrid"):
            load_recipe("lora-only", {"watch": {"recall": {}}})
