"""What reaches TensorBoard and W&B, and what is said where they are not installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from equipoise.config import ConfigError
from equipoise.train.reporting import check_reporter, reporting
from equipoise.train.stages import finetune

STAGE: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "save_every": 2}


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of TensorBoard's files by tag, as (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_has_every_look(recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
    run = recipe(finetune=STAGE, watch={"every": 2})
    with reporting("tensorboard", tmp_path / "logs") as callbacks:
        result = finetune(hybrid(run), run, rows, rows, tmp_path / "work", callbacks=callbacks)
    found = events(tmp_path / "logs")
    looks = [entry for entry in result.history if "eval_linear_share" in entry]
    for name in ("linear_share", "linear_recovered", "gap", "nll"):
        expected = [(look["step"], pytest.approx(look[f"eval_{name}"], rel=1e-6)) for look in looks]
        assert found[f"eval/{name}"] == expected
        assert [step for step, _ in expected] == [0, 2, 4]
    assert [step for step, _ in found["train/loss"]] == [1]


class KilledError(Exception):
    """The process goes away."""


class KillAt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KilledError


def test_a_resumed_stage_takes_back_what_it_does_again(
    recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
) -> None:
    """Killed after step 3, resumed from step 2: step 3 is logged twice and shown once."""
    run = recipe(finetune=STAGE, watch={"every": 1})
    with pytest.raises(KilledError), reporting("tensorboard", tmp_path / "logs") as callbacks:
        finetune(hybrid(run), run, rows, rows, tmp_path / "work", callbacks=[*callbacks, KillAt()])
    assert [step for step, _ in events(tmp_path / "logs")["eval/nll"]] == [0, 1, 2, 3]
    with reporting("tensorboard", tmp_path / "logs", resumed_at=2) as callbacks:
        finetune(hybrid(run), run, rows, rows, tmp_path / "work", callbacks=callbacks, resume=True)
    assert [step for step, _ in events(tmp_path / "logs")["eval/nll"]] == [0, 1, 2, 3, 4]


WANDB = """
import json, pathlib
PLACE = pathlib.Path(__file__).parent / "calls.jsonl"
run, config = None, {}

def note(*call):
    with PLACE.open("a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    _label = define_metric = watch = config = staticmethod(lambda *a, **k: None)

class Config(dict):
    def update(self, *a, **k): pass

def init(**settings):
    global run, config
    run, config = Run(), Config()
    run.config, run.summary = config, {}
    note("init", settings.get("name"))

def log(values):
    note("log", values)

def finish():
    global run
    run = None
    note("finish")

def define_metric(*a, **k): pass
def watch(*a, **k): pass
"""


def test_wandb_gets_a_run_a_stage(
    recipe: Any, hybrid: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a package of the same name that writes its calls down; wandb is nobody's dependency here."""
    for name, text in {"__init__.py": WANDB, "sdk/__init__.py": "", "sdk/lib/__init__.py": "",
                       "sdk/lib/config_util.py": "class ConfigError(Exception): pass"}.items():  # fmt: skip
        place = tmp_path / "site" / "wandb" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    check_reporter("wandb")
    run = recipe(finetune=STAGE, watch={"every": 2})
    for stage in ("one", "two"):
        with reporting("wandb", tmp_path) as callbacks:
            finetune(hybrid(run), run, rows, rows, tmp_path / stage, callbacks=callbacks)
    calls = [json.loads(line) for line in (tmp_path / "site/wandb/calls.jsonl").read_text().splitlines()]
    assert [call[1] for call in calls if call[0] == "init"] == ["test-one", "test-two"]
    assert [call[0] for call in calls if call[0] != "log"] == ["init", "finish"] * 2
    shares = [call[1]["train/global_step"] for call in calls if "eval/linear_share" in (call[1:] or [{}])[0]]
    assert shares == [0, 2, 4] * 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_told_with_the_cure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"{name} is not installed. Run `pip install {name}`"):
        check_reporter(name)
    check_reporter("none")
