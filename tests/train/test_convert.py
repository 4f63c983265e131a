"""Whole conversions of a tiny donor: what is written, what it loads as, and what a failure leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversions import files, logits, quiet
from equipoise.config import ConfigError, HybridConfig, RunConfig
from equipoise.data.sources import DataError
from equipoise.layers.interface import mixers_of
from equipoise.models.adapters import adapter_layers
from equipoise.models.branches import branches
from equipoise.models.load import load_model
from equipoise.models.storage import CheckpointError
from equipoise.train import convert as module
from equipoise.train.convert import RunRecord, convert, prepare_data
from equipoise.train.outputs import OutputError
from equipoise.train.progress import ProgressReport
from equipoise.train.rank_trainer import TrainingDiverged
from equipoise.train.recipes import recipe_names
from equipoise.train.watching import attribution_names, watched_history
from support import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_converts_and_loads_again(
    name: str, donor: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[torch.Tensor] = []
    save = module.save

    def save_and_keep(model: Any, *args: Any, **kwargs: Any) -> None:
        finished.append(logits(model))
        save(model, *args, **kwargs)

    monkeypatch.setattr(module, "save", save_and_keep)
    run, out = small(name), tmp_path / "out"
    record = convert(donor, run, out, seed=3, console=quiet())
    expected = {"run.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"}
    if run.hybrid is None:
        expected |= {"adapter_config.json", "adapter_model.safetensors"}
    else:
        expected |= {"config.json", "generation_config.json", "hybrid.safetensors"}
        if run.finetune is not None:
            expected |= {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    assert files(out) == expected
    assert not (out / "training").exists()
    again = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(again), finished[0], rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_tokenizer().get_vocab()
    assert bool(adapter_layers(again)) == (run.finetune is not None)
    assert len(mixers_of(again)) == (0 if run.hybrid is None else 2)
    if record.allocation is not None:  # the hybrid is what was measured
        run = run.model_copy(update={"hybrid": HybridConfig(**record.allocation["hybrid"])})
    assert_record(record, json.loads((out / "run.json").read_text()), run, donor)


@pytest.mark.parametrize("recipe", ["ssd", "lolcats"])
def test_a_donor_with_learned_sinks_converts(recipe: str, small: Any, tmp_path: Path) -> None:
    """GPT-OSS: local layers stay, the sinks do not train, and what is loaded is what was written."""
    donor = tiny_model("gpt_oss", vocab_size=300)
    expected = logits(donor)
    donor.save_pretrained(tmp_path / "donor")
    tiny_tokenizer().save_pretrained(tmp_path / "donor")
    record = convert(str(tmp_path / "donor"), small(recipe), tmp_path / "out", console=quiet())
    assert record.train_tokens > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [mixer.layer_idx for mixer in mixers_of(again)] == [1, 2]
    with branches(again, "softmax"):
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    assert (logits(again) - expected).abs().max() > 1e-2
    for layer, old in zip(again.model.layers, donor.model.layers, strict=True):
        assert torch.equal(layer.self_attn.sinks, old.self_attn.sinks)


def assert_record(record: RunRecord, written: dict[str, Any], run: RunConfig, donor: str) -> None:
    stages = [stage for stage in ("transfer", "finetune") if getattr(run, stage) is not None]
    assert list(written["stages"]) == stages
    assert RunConfig(**written["settings"]) == run
    assert (written["recipe"], written["donor"], written["seed"]) == (run.name, donor, 3)
    assert written["train_tokens"] == record.train_tokens == len(stages) * 2 * 4 * 32
    assert (written["train_seconds"] > 0) == bool(stages)
    for stage in stages:
        result = written["stages"][stage]
        assert (result["steps"], result["tokens"]) == (2, 2 * 4 * 32)
        assert next(entry["loss"] for entry in result["history"] if "loss" in entry) > 0
        looks = watched_history(result["history"])
        assert [look["step"] for look in looks] == ([0, 2] if run.hybrid is not None else [])
        assert all(tuple(look)[1:-1] == attribution_names(run) for look in looks)  # but for step and runtime
    assert set(written["held_out"]) == ({"donor", "result"} if stages else set())
    assert all(0 < loss < 30 for loss in written["held_out"].values())


def test_full_checkpoint_stands_alone(donor: str, small: Any, tmp_path: Path) -> None:
    results = []
    for kind in ("delta", "full"):
        convert(donor, small("hedgecats", checkpoint=kind), tmp_path / kind, console=quiet())
        results.append(load_model(str(tmp_path / kind)))
    assert files(tmp_path / "full") - files(tmp_path / "delta") == {"model.safetensors"}
    assert torch.equal(logits(results[0]), logits(results[1]))
    with branches(results[1], "softmax"):
        torch.testing.assert_close(logits(results[1]), logits(load_model(donor)), rtol=1e-4, atol=1e-5)


def test_a_seed_fixes_the_result(donor: str, small: Any, tmp_path: Path) -> None:
    run = small("ssd")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(donor, run, tmp_path / name, seed=seed, console=quiet())
    a, b, c = (logits(load_model(str(tmp_path / name))) for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_early_stopping_looks_at_training_rows(donor: str, small: Any) -> None:
    """What is reported must not choose the weights: the audit scores the held-out split."""
    model, tokenizer = load_model(donor), tiny_tokenizer()
    whole = prepare_data(small("ssd"), model, tokenizer, seed=0)
    assert whole.aside is None
    data = prepare_data(small("hedgecats"), model, tokenizer, seed=0)
    seen: list[Any] = [row["input_ids"] for part in (data.rows, data.aside) for row in listed(part)]
    assert len(seen) == len(listed(whole.rows))
    assert all(torch.equal(row, whole.rows[i]["input_ids"]) for i, row in enumerate(seen))


def listed(rows: Any) -> list[Any]:
    return [rows[i] for i in range(len(rows))]


def test_seeds_are_held_against_the_same_rows(donor: str, small: Any) -> None:
    """Or the losses of two seeds could not be compared."""
    model, run = load_model(donor), small("ssd")
    one, two = (prepare_data(run, model, tiny_tokenizer(), seed=seed) for seed in (1, 2))
    assert all(torch.equal(one.held_out[i]["input_ids"], two.held_out[i]["input_ids"]) for i in range(8))
    assert not all(torch.equal(one.rows[i]["input_ids"], two.rows[i]["input_ids"]) for i in range(8))


def test_context_is_cut_to_the_donors(donor: str, small: Any, text: str, tmp_path: Path) -> None:
    data = {"source": text, "context_length": 4096, "max_tokens": 8000}
    run = small("zero-shot", data=data, transfer={"batch_size": 2, "max_steps": 1})
    record = convert(donor, run, tmp_path / "out", console=quiet())
    assert record.train_tokens == 2 * 512


class KillError(Exception):
    """The process goes away."""


def kill_at(monkeypatch: pytest.MonkeyPatch, label: str, step: int) -> None:
    """Raise after a step of the stage whose progress has this label."""

    def on_step_end(self: ProgressReport, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.label == label and state.global_step == step:
            raise KillError

    monkeypatch.setattr(ProgressReport, "on_step_end", on_step_end)


class TestFailure:
    def test_nothing_is_left_of_a_run_that_never_began(self, donor: str, small: Any, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(CheckpointError):
            convert(str(tmp_path / "nowhere"), small("ssd"), out, console=quiet())
        with pytest.raises(DataError):
            convert(donor, small("ssd", data={"source": str(tmp_path / "none.txt")}), out, console=quiet())
        with pytest.raises(DataError, match="at least 5000 rows"):
            convert(donor, small("ssd", transfer={"batch_size": 5000}), out, console=quiet())
        assert not out.exists()

    def test_killed_in_training_leaves_checkpoints_only(
        self, donor: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        kill_at(monkeypatch, "ssd finetune", 2)
        with pytest.raises(KillError):
            convert(donor, small("ssd", finetune={"save_every": 1}), out, console=quiet())
        assert [path.name for path in out.iterdir()] == ["training"]
        with pytest.raises(OutputError, match="A killed run goes on with --resume"):
            convert(donor, small("ssd"), out, console=quiet())

    def test_killed_while_writing_leaves_no_model(
        self, donor: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_text", fail)
            patch.setattr(module, "check_start", lambda *args: None)
            with pytest.raises(OSError, match="No space"):
                convert(donor, small("zero-shot"), out, console=quiet())
        assert [path.name for path in out.iterdir()] == ["training"]

    def test_diverged(self, donor: str, small: Any, tmp_path: Path) -> None:
        out = tmp_path / "out"
        run = small("hedgehog", finetune={"learning_rate": 1e30, "max_steps": 4, "warmup": 0.0})
        with pytest.raises(TrainingDiverged, match=r"Lower finetune\.learning_rate \(now 1e\+30\)"):
            convert(donor, run, out, console=quiet())
        assert not (out / "config.json").exists()

    def test_output_in_use(self, donor: str, small: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(OutputError, match="is not empty"):
            convert(donor, small("zero-shot"), tmp_path, console=quiet())
        with pytest.raises(OutputError, match="got a file"):
            convert(donor, small("zero-shot"), tmp_path / "file", console=quiet())
        with pytest.raises(OutputError, match="no run to resume"):
            convert(donor, small("zero-shot"), tmp_path, resume=True, console=quiet())
        assert files(tmp_path) == {"file"}


class TestResume:
    @pytest.mark.parametrize(
        ("label", "step", "left"),
        [
            ("ssd transfer", 3, {"ssd transfer": 2, "ssd finetune": 4}),
            pytest.param("ssd finetune", 1, {"ssd transfer": 0, "ssd finetune": 4}, marks=pytest.mark.slow),
            ("ssd finetune", 3, {"ssd transfer": 0, "ssd finetune": 2}),
        ],
    )
    def test_equals_a_run_that_was_not_killed(
        self, label: str, step: int, left: Any, donor: str, small: Any, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Killed in one stage, a finished stage before it is not gone through again."""
        stage = {"max_steps": 4, "save_every": 2}
        run = small("ssd", transfer=stage, finetune=stage)
        whole = convert(donor, run, tmp_path / "whole", console=quiet())
        with monkeypatch.context() as patch:
            kill_at(patch, label, step)
            with pytest.raises(KillError):
                convert(donor, run, tmp_path / "cut", console=quiet())
        steps = dict.fromkeys(left, 0)

        def count(self: ProgressReport, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps[self.label] += 1

        monkeypatch.setattr(ProgressReport, "on_step_end", count)
        record = convert(donor, run, tmp_path / "cut", resume=True, console=quiet())
        assert steps == left
        assert record.train_tokens == whole.train_tokens
        assert record.held_out == whole.held_out
        models = [load_model(str(tmp_path / name)) for name in ("whole", "cut")]
        assert torch.equal(logits(models[0]), logits(models[1]))
        assert files(tmp_path / "whole") == files(tmp_path / "cut")
        with pytest.raises(OutputError, match="this run is finished"):
            convert(donor, run, tmp_path / "cut", resume=True, console=quiet())

    def test_other_settings_are_refused(
        self, donor: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            kill_at(patch, "ssd finetune", 2)
            with pytest.raises(KillError):
                convert(donor, small("ssd"), tmp_path / "out", console=quiet())
        before = files(tmp_path / "out")
        other = small("ssd", finetune={"rank": 2})
        with pytest.raises(ConfigError, match=r"differs in finetune\.rank \(was 8, now 2\)"):
            convert(donor, other, tmp_path / "out", resume=True, console=quiet())
        assert files(tmp_path / "out") == before


def test_progress_reaches_the_console(donor: str, small: Any, tmp_path: Path) -> None:
    console = quiet()
    convert(donor, small("hedgecats"), tmp_path / "out", console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "converted 2 layers; window 4, reach 6 tokens, decode state " in shown
    assert "hedgecats transfer done: 2 steps" in shown
    assert "hedgecats finetune done: 2 steps" in shown
    assert "held-out loss: donor " in shown
    assert "linear branch's part of the output where windows lose most: " in shown
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert record["heard"].keys() == {"0", "1"}
    assert all(0 < part < 1 for of in record["heard"].values() for part in of.values())
