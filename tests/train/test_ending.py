"""SIGTERM in every part of a run, and two runs on one directory."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from conversions import files, logits, quiet
from equipoise.models.load import load_model
from equipoise.train import convert as module
from equipoise.train.convert import convert
from equipoise.train.ending import LOCK, EndWhenAsked, InUseError, Terminated, ended_by_sigterm, only_run
from equipoise.train.progress import ProgressReport


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_at(monkeypatch: pytest.MonkeyPatch, label: str, step: int, hook: str) -> None:
    def at(self: ProgressReport, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.label == label and state.global_step == step:
            terminate()

    monkeypatch.setattr(ProgressReport, hook, at)


class TestSigterm:
    @pytest.mark.parametrize(
        ("label", "hook", "step", "saved"),
        [
            pytest.param("ssd transfer", "on_step_begin", 0, 1, marks=pytest.mark.slow),
            ("ssd transfer", "on_step_begin", 2, 3),
            pytest.param("ssd transfer", "on_step_end", 4, 4, marks=pytest.mark.slow),
            ("ssd finetune", "on_step_begin", 1, 2),
            pytest.param("ssd finetune", "on_step_begin", 3, 4, marks=pytest.mark.slow),
        ],
    )
    def test_the_step_is_finished_and_saved_and_the_run_goes_on(
        self, label: str, hook: str, step: int, saved: int, donor: str, small: Any, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        stage = {"max_steps": 4, "save_every": 100}  # no checkpoint but the one that SIGTERM asks for
        run = small("ssd", transfer=stage, finetune=stage)
        whole = convert(donor, run, tmp_path / "whole", console=quiet())
        with monkeypatch.context() as patch:
            terminate_at(patch, label, step, hook)
            with pytest.raises(Terminated, match=f"after step {saved}, which was saved") as ended:
                convert(donor, run, tmp_path / "cut", console=quiet())
        assert ended.value.code == 143
        place = tmp_path / "cut" / "training" / label.split()[1]
        assert (place / f"checkpoint-{saved}" / "trained.safetensors").is_file()
        assert not (tmp_path / "cut" / LOCK).exists()
        record = convert(donor, run, tmp_path / "cut", resume=True, console=quiet())
        assert record.train_tokens == whole.train_tokens
        models = [load_model(str(tmp_path / name)) for name in ("whole", "cut")]
        assert torch.equal(logits(models[0]), logits(models[1]))
        assert files(tmp_path / "whole") == files(tmp_path / "cut")

    def test_outside_training_it_ends_at_once_and_leaves_nothing(
        self, donor: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "prepare_data", lambda *_, **__: terminate())
        with pytest.raises(Terminated, match="terminated"):
            convert(donor, small("ssd"), tmp_path / "out", console=quiet())
        assert not (tmp_path / "out").exists()

    def test_while_the_model_is_written_the_training_is_kept(
        self, donor: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = small("zero-shot", transfer={"save_every": 1})
        with monkeypatch.context() as patch:
            patch.setattr(module, "save", lambda *_, **__: terminate())
            with pytest.raises(Terminated):
                convert(donor, run, tmp_path / "out", console=quiet())
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["training"]
        assert convert(donor, run, tmp_path / "out", resume=True, console=quiet()).train_tokens

    def test_a_second_one_does_not_wait(self) -> None:
        with ended_by_sigterm() as ending:
            ending.training = True
            terminate()
            assert ending.asked
            with pytest.raises(Terminated):
                terminate()

    def test_the_handler_before_is_put_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with ended_by_sigterm():
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before

    def test_another_thread_listens_to_nothing(self) -> None:
        before, found = signal.getsignal(signal.SIGTERM), list[Any]()

        def listen() -> None:
            with ended_by_sigterm() as ending:
                found.extend([ending, signal.getsignal(signal.SIGTERM)])

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        assert isinstance(found[0], EndWhenAsked)
        assert found[1] is before


class TestLock:
    def test_one_run_at_a_time(self, donor: str, small: Any, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        with FileLock(out / LOCK), pytest.raises(InUseError, match="another run is writing there"):
            convert(donor, small("swa-sinks"), out, console=quiet())
        assert out.is_dir()  # it is the other run's

    def test_the_other_runs_files_are_left_alone(self, donor: str, small: Any, tmp_path: Path) -> None:
        started = tmp_path / "training" / "start.json"
        started.parent.mkdir()
        started.write_text("{}")
        with only_run(tmp_path), pytest.raises(InUseError):
            convert(donor, small("ssd"), tmp_path, resume=True, console=quiet())
        assert started.read_text() == "{}"

    def test_what_a_killed_process_leaves_is_in_nobodys_way(
        self, donor: str, small: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / LOCK).touch()
        convert(donor, small("swa-sinks"), tmp_path / "out", console=quiet())
        assert not (tmp_path / "out" / LOCK).exists()


def test_resuming_what_never_began_begins(donor: str, small: Any, tmp_path: Path) -> None:
    run = small("zero-shot")
    one = convert(donor, run, tmp_path / "one", console=quiet())
    two = convert(donor, run, tmp_path / "two", resume=True, console=quiet())
    assert two.held_out == one.held_out
