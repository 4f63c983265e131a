"""`equipoise plan` and `convert --dry-run`: figures that conversions confirm, from a config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from equipoise import HybridConfig, hybridize
from equipoise.cli import app
from equipoise.config import DataConfig
from equipoise.models.adapters import add_lora
from equipoise.planning import plan as planning
from equipoise.planning import slices
from equipoise.planning.data_size import data_size
from equipoise.planning.plan import plan_conversion, steps_of
from equipoise.planning.slices import make_slice, stage_seconds
from equipoise.train.recipes import load_recipe
from equipoise.train.stages import lora_targets
from support import tiny_model, tiny_tokenizer

SMALL = {"data": {"source": "stdlib", "context_length": 32}, "hybrid": {"window": 8}}
STEPS = {"transfer": {"max_steps": 5}, "finetune": {"max_steps": 7}}


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


SHORT = ("--set", "hybrid.window=8", "--set", "data.context_length=32")
"""Rows short enough to be counted through quickly."""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A donor's directory with nothing but its config.json."""
    tiny_model("gemma3_text", attention_dropout=0.1).config.save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"word {i} " * 40}) + "\n" for i in range(100)))
    return path


def test_figures_are_those_of_the_conversion(bare: Path) -> None:
    run = load_recipe("ssd", SMALL | STEPS)
    plan = plan_conversion(str(bare), run, probe=False)
    donor = tiny_model("gemma3_text")
    assert run.hybrid is not None
    assert run.finetune is not None
    assert plan.parameters == sum(p.numel() for p in donor.parameters())
    hybrid = hybridize(donor, run.hybrid)
    mixers = sum(p.numel() for n, p in hybrid.named_parameters() if ".hybrid." in n)
    add_lora(hybrid, rank=run.finetune.rank, alpha=16.0, targets=lora_targets(hybrid, run.finetune))
    lora = sum(p.numel() for n, p in hybrid.named_parameters() if "lora_" in n)
    assert (plan.mixer_parameters, plan.layers.local, plan.layers.converted) == (mixers, (0,), (1, 2))
    transfer, finetune = plan.stages
    assert (transfer.trainable, finetune.trainable) == (mixers, lora)
    assert (transfer.steps, transfer.tokens) == (5, 5 * run.transfer.batch_size * 32)  # type: ignore[union-attr]
    assert finetune.weight_bytes == 4 * (plan.parameters + mixers + lora)
    assert plan.output_bytes == 4 * (mixers + lora)
    assert (plan.seconds, plan.unmeasured) == (None, "not asked for")
    assert plan.download_bytes == plan.parameters * 2  # bfloat16, where nothing is said


def test_time_comes_from_slices(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro batch of the whole model, from slices whose time is known."""
    asked: list[tuple[str, list[int], int]] = []
    own = {"converted": 3.0, "local": 0.5}

    def slice_seconds(config: Any, run: Any, stage: str, indices: Any, kinds: Any, **size: Any) -> float:
        asked.append((stage, list(indices), size["rows"]))
        return size["rows"] * (1.0 + sum(own[kinds[i]] for i in indices))

    monkeypatch.setattr(slices, "slice_seconds", slice_seconds)
    settings = SMALL | {"transfer": {"max_steps": 5, "batch_size": 8, "micro_batch_size": 4}}
    plan = plan_conversion(str(bare), load_recipe("zero-shot", settings))
    assert asked == [("transfer", [1], 1), ("transfer", [1, 1], 1), ("transfer", [1, 0], 1)]
    (stage,) = plan.stages
    assert stage.step_seconds == pytest.approx(8 * (1.0 + 2 * 3.0 + 0.5))
    assert plan.seconds == pytest.approx(5 * 8 * 7.5)


def test_a_quick_slice_is_timed_with_a_whole_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def slice_seconds(*_: Any, rows: int, **__: Any) -> float:
        counts.append(rows)
        return 0.1 + 0.01 * rows

    monkeypatch.setattr(slices, "slice_seconds", slice_seconds)
    run = load_recipe("zero-shot")
    seconds = stage_seconds(None, run, "transfer", ["converted"], rows=8, length=32, device="cpu")
    assert counts == [1, 8]
    assert seconds == pytest.approx(0.18)


@pytest.mark.slow
def test_real_slices(tmp_path: Path) -> None:
    """Both stages run on two layers of a mixture of experts, from its configuration alone."""
    tiny_model("mixtral").config.save_pretrained(tmp_path)
    plan = plan_conversion(str(tmp_path), load_recipe("ssd", SMALL | STEPS))
    assert (plan.unmeasured, plan.unknown) == (None, None)
    for stage in plan.stages:
        assert stage.step_seconds is not None
        assert stage.step_seconds > 0
        assert stage.activation_bytes
    transfer, finetune = plan.stages
    assert finetune.activation_bytes > transfer.activation_bytes  # type: ignore[operator]
    assert plan.seconds == pytest.approx(5 * transfer.step_seconds + 7 * finetune.step_seconds)  # type: ignore[operator]


def test_a_slice_keeps_what_its_layers_are() -> None:
    config = tiny_model("smollm3").config
    cut = make_slice(config, [1, 1, 0], "cpu").config
    assert (cut.num_hidden_layers, cut.no_rope_layers) == (3, [0, 0, 1])
    assert (config.num_hidden_layers, config.no_rope_layers) == (2, [1, 0])


def test_steps_take_whole_batches() -> None:
    run = load_recipe("ssd")
    assert run.finetune is not None
    stage = run.finetune.model_copy(update={"epochs": 2.0, "batch_size": 8})
    assert steps_of(stage, 23) == 4
    assert steps_of(stage, None) is None
    assert steps_of(stage.model_copy(update={"max_steps": 3}), None) == 3


def test_tokens_of_local_data(corpus: Path, tmp_path: Path, bare: Path) -> None:
    from equipoise.data.packing import pack_documents
    from equipoise.data.sources import load_documents

    config = DataConfig(source=str(corpus), context_length=32)
    rough = data_size(config, str(bare), local=True)
    assert "at 4 a token" in rough.source
    tiny_tokenizer().save_pretrained(bare)
    counted = data_size(config, str(bare), local=True)
    packed = pack_documents(load_documents(str(corpus)), tiny_tokenizer(), context_length=32, seed=0)
    assert counted.tokens == pytest.approx(packed.statistics.tokens, rel=0.02)
    limited = config.model_copy(update={"max_tokens": 100})
    assert data_size(limited, str(bare), local=True).tokens == 100


def test_steps_that_only_the_data_can_tell_are_unknown(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the Hub is not read for a plan; where not even its size is known, that is said."""

    def unreachable(*_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    done = cli("plan", bare, "--recipe", "zero-shot", "--no-probe", "--json")
    plan = json.loads(done.stdout)
    assert (plan["data"]["tokens"], plan["stages"][0]["steps"], plan["seconds"]) == (None, None, None)
    assert "--max-steps" in plan["data"]["source"]


@pytest.mark.parametrize("columns", [40, 100])
def test_the_table_fits_the_terminal(bare: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = cli("plan", bare, "--recipe", "ssd", "--max-steps", 3, "--no-probe", *SHORT)
    assert done.exit_code == 0, done.stderr
    table = done.stdout.split("\nmemory: ")[0]
    assert max(map(len, table.splitlines())) <= columns
    assert "\x1b" not in done.stdout
    for words in ("finetune", "Adam", "not measured: not asked for"):
        assert words in done.stdout


def test_memory_that_is_not_there(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available", lambda device: 1000)
    done = cli("plan", bare, "--recipe", "ssd", "--max-steps", 3, *SHORT)
    assert done.exit_code == 0, done.stderr
    assert "time was not measured: two layers and the embeddings take" in " ".join(done.stdout.split())
    assert "warning: this needs" in done.stderr


def test_refusals(tmp_path: Path, bare: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny_model().config.save_pretrained(tmp_path / "converted")
    hybrid = hybridize(tiny_model(), HybridConfig(window=5))
    hybrid.config.save_pretrained(tmp_path / "converted")
    for donor, code, words in (
        (tmp_path / "empty", 1, "config.json"),
        (tmp_path / "converted", 2, "converted already"),
    ):
        done = cli("plan", donor, "--recipe", "ssd", "--max-steps", 3)
        assert (done.exit_code, words in done.stderr) == (code, True), done.stderr
        assert done.stdout == ""
    assert cli("plan", bare, "--recipe", "sdd").exit_code == 2


def test_dry_run_of_a_conversion_does_nothing(bare: Path, tmp_path: Path) -> None:
    common = ("convert", bare, "--recipe", "ssd", "--max-steps", 3, *SHORT, "--dry-run")
    done = cli(*common, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert f"would write to {tmp_path / 'out'}; nothing was done" in done.stdout
    assert not (tmp_path / "out").exists()
    as_json = json.loads(cli(*common, "--output", tmp_path / "out", "--json").stdout)
    assert (as_json["output"], as_json["recipe"]) == (str(tmp_path / "out"), "ssd")
    assert cli(*common, "--output", bare).exit_code == 2  # not empty
