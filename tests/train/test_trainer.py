"""Divergence, training checkpoints, and runs that were killed and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from equipoise.data.sources import DataError
from equipoise.files import write_manifest
from equipoise.layers.interface import mixers_of
from equipoise.models.storage import CheckpointError
from equipoise.train.rank_trainer import TrainingDiverged
from equipoise.train.stage_files import FINISHED, TRAINED, StageResult, finished_result, latest_checkpoint
from equipoise.train.stages import finetune, transfer

STAGE: dict[str, Any] = {"max_steps": 7, "batch_size": 4, "micro_batch_size": 2, "save_every": 3}
DROPOUT = {"window_dropout": {"probabilities": [0.9, 0.5]}, "train_maps": True}
STOPPING = {"early_stopping": {"every": 2, "patience": 2}, "learning_rate": 0.5, "max_steps": 30}
STAGES: dict[str, dict[str, Any]] = {
    "transfer": {"transfer": STAGE},
    "finetune": {"finetune": {**STAGE, **DROPOUT}},
    "stopped": {"finetune": {**STAGE, **STOPPING}},
}


class KilledError(Exception):
    """The process goes away."""


class KillAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.step:
            raise KilledError


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".hybrid." in n or "lora" in n}


def run_stage(run: Any, model: Any, rows: Any, directory: Path, **kwargs: Any) -> StageResult:
    if run.transfer is not None:
        return transfer(model, run, rows, directory, **kwargs)
    return finetune(model, run, rows, rows, directory, **kwargs)


def assert_same(model: nn.Module, other: dict[str, Tensor]) -> None:
    assert weights(model).keys() == other.keys()
    assert [n for n, p in weights(model).items() if not torch.equal(p, other[n])] == []


class TestResume:
    @pytest.mark.parametrize("stage", list(STAGES))
    def test_equals_a_run_that_was_not_killed(
        self, stage: str, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        """Bit for bit, the log too: killed in the middle of the second epoch of 12 rows."""
        run, rows = recipe(**STAGES[stage]), packed(12)
        whole = hybrid(run)
        expected = run_stage(run, whole, rows, tmp_path / "whole")
        saved_at = 4 if stage == "stopped" else 3
        with pytest.raises(KilledError):
            run_stage(run, hybrid(run), rows, tmp_path / "cut", callbacks=[KillAfter(saved_at)])
        model, watch = hybrid(run), Watch()
        torch.manual_seed(99)  # another process has another random state
        result = run_stage(run, model, rows, tmp_path / "cut", callbacks=[watch], resume=True)
        assert watch.steps[0] == saved_at + 1
        assert_same(model, weights(whole))
        assert (result.steps, result.tokens) == (expected.steps, expected.tokens)
        losses = [[e["loss"] for e in r.history if "loss" in e] for r in (result, expected)]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("stage", list(STAGES))
    def test_finished_stage_is_passed_over(
        self, stage: str, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(**STAGES[stage])
        whole = hybrid(run)
        expected = run_stage(run, whole, rows, tmp_path)
        model, watch = hybrid(run), Watch()
        assert run_stage(run, model, rows, tmp_path, callbacks=[watch], resume=True) == expected
        assert watch.steps == []
        assert_same(model, weights(whole))
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("stage", list(STAGES))
    def test_killed_between_the_last_checkpoint_and_the_end(
        self, stage: str, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        """Trainer alone takes one step more."""
        run = recipe(**STAGES[stage])
        whole = hybrid(run)
        expected = run_stage(run, whole, rows, tmp_path)
        (tmp_path / FINISHED).unlink()
        model, watch = hybrid(run), Watch()
        result = run_stage(run, model, rows, tmp_path, callbacks=[watch], resume=True)
        assert watch.steps == []
        assert result.steps == expected.steps
        assert_same(model, weights(whole))

    def test_without_resume_everything_starts_anew(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        """And no later resume mistakes what lay there for its own."""
        run = recipe(**STAGES["transfer"])
        run_stage(run, hybrid(run), rows, tmp_path)
        with pytest.raises(KilledError):
            run_stage(run, hybrid(run), rows, tmp_path, callbacks=[KillAfter(3)])
        assert finished_result(tmp_path) is None
        newest = latest_checkpoint(tmp_path)
        assert newest is not None
        assert newest.name == "checkpoint-3"

    def test_time_adds_up(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        run = recipe(**STAGES["transfer"])
        with pytest.raises(KilledError):
            run_stage(run, hybrid(run), rows, tmp_path, callbacks=[KillAfter(3)])
        place = tmp_path / "checkpoint-3" / "trainer_state.json"
        state = json.loads(place.read_text())
        assert 0 < state["stateful_callbacks"]["StageClock"]["args"]["before"] < 60
        state["stateful_callbacks"]["StageClock"]["args"]["before"] = 1000.0
        place.write_text(json.dumps(state))
        write_manifest(place.parent)
        assert 1000 < run_stage(run, hybrid(run), rows, tmp_path, resume=True).seconds < 1060

    def test_settings_that_do_not_fit(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        run = recipe(finetune=STAGE)
        run_stage(run, hybrid(run), rows, tmp_path)
        other = recipe(finetune={**STAGE, "rank": 2})
        with pytest.raises(CheckpointError, match="other settings of finetune"):
            run_stage(other, hybrid(other), rows, tmp_path, resume=True)


class TestCheckpoints:
    def test_hold_what_trains_and_nothing_else(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file

        run = recipe(finetune=STAGE)
        model = hybrid(run)
        run_stage(run, model, rows, tmp_path)
        saved = load_file(tmp_path / "checkpoint-7" / TRAINED)
        assert saved.keys() == {n for n in weights(model) if "lora" in n}
        assert not list(tmp_path.rglob("model*.safetensors"))

    @pytest.mark.parametrize("damage", ["no weights", "no state", "half a state", "not a step"])
    def test_half_written_ones_are_passed_over(
        self, damage: str, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(**STAGES["transfer"])
        with pytest.raises(KilledError):
            run_stage(run, hybrid(run), rows, tmp_path, callbacks=[KillAfter(6)])
        older, newer = tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"
        assert latest_checkpoint(tmp_path) == newer
        state = newer / "trainer_state.json"
        if damage == "no weights":
            (newer / TRAINED).unlink()
        elif damage == "no state":
            state.unlink()
        elif damage == "half a state":
            state.write_text(state.read_text()[:-40])
        else:
            shutil.move(newer, tmp_path / "checkpoint-tmp")
        assert latest_checkpoint(tmp_path) == older
        watch = Watch()
        run_stage(run, hybrid(run), rows, tmp_path, callbacks=[watch], resume=True)
        assert watch.steps == [4, 5, 6, 7]

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert latest_checkpoint(tmp_path / "missing") is None
        assert finished_result(tmp_path) is None


class Poison(TrainerCallback):
    """From a step on, something of one layer is NaN; the weights just before are kept to compare."""

    def __init__(self, step: int, strike: Any) -> None:
        self.step, self.strike = step, strike
        self.before: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.before = weights(kwargs["model"])
            self.strike(kwargs["model"])


def nan_output(model: Any) -> None:
    """The second layer's keys turn NaN on their way in."""
    model.get_decoder().layers[1].self_attn.k_proj.register_forward_hook(lambda m, i, out: out * float("nan"))


def nan_gradient(model: Any) -> None:
    """The loss stays finite, the gradient of the second layer's map does not."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "layers.1." in name:
            parameter.register_hook(lambda grad: grad * float("nan"))
            return


class TestDivergence:
    @pytest.mark.parametrize("strike", [nan_output, nan_gradient])
    @pytest.mark.parametrize("stage", ["transfer", "finetune"])
    def test_stops_and_says_what_to_do(
        self, stage: str, strike: Any, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(**STAGES[stage])
        model = hybrid(run)
        poison = Poison(5, strike)
        with pytest.raises(TrainingDiverged) as caught:
            run_stage(run, model, rows, tmp_path, callbacks=[poison])
        message = str(caught.value)
        layer = " of layer 1" if stage == "transfer" else ""
        if strike is nan_gradient:
            assert f"{stage}: the gradient is not finite at step 5: " in message
            assert "in 1 parameters" in message
            assert "layers.1." in message
        else:
            assert f"{stage}: the loss{layer} is nan at step 5;" in message
        assert f"Lower {stage}.learning_rate (now 0.0" in message
        assert_same(model, poison.before)
        newest = latest_checkpoint(tmp_path)
        assert newest is not None
        assert newest.name == "checkpoint-4"  # between two saves: the weights before the step that failed
        assert str(newest) in message
        # left in order: the mixers run as configured, nothing trains
        assert all(mixer.mode.kind == "hybrid" and mixer.observer is None for mixer in mixers_of(model))
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_too_few_rows_for_one_step(recipe: Any, hybrid: Any, packed: Any, tmp_path: Path) -> None:
    run = recipe(transfer={"batch_size": 8, "micro_batch_size": 1})
    with pytest.raises(DataError, match=r"at least 8 rows .* got 3. Give more data, or lower transfer.batch"):
        transfer(hybrid(run), run, packed(3), tmp_path)
