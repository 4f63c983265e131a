"""`equipoise allocate`, `--state-bytes`, and the recipe that `equipoise convert` takes by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from equipoise import Allocation, HybridConfig
from equipoise.config import RunConfig
from equipoise.layers.interface import mixers_of
from equipoise.models.layout import state_bytes
from equipoise.train import allocating
from equipoise.train.allocating import as_dict, described, from_dict
from equipoise.train.convert import convert as convert_here
from equipoise.train.recipes import load_recipe

Cli = Callable[..., Any]
SETTINGS = ("data.context_length=64", "allocation.rows=2", "allocation.smallest_window=2")
OPTIONS = [part for setting in SETTINGS for part in ("--set", setting)]
BYTES = 3_000


@pytest.fixture
def run(corpus: Path) -> RunConfig:
    return load_recipe(
        "equipoise",
        {
            "data": {"source": str(corpus), "context_length": 64}, "watch": None,
            "allocation": {"rows": 2, "smallest_window": 2, "state_bytes": BYTES},
            "transfer": {"max_steps": 2, "batch_size": 4, "save_every": 1},
            "finetune": {"max_steps": 2, "batch_size": 4, "save_every": 1},
        },
    )  # fmt: skip


class TestConvert:
    def test_the_default_recipe(self, cli: Cli, donor: Path, corpus: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        done = cli(
            "convert", donor, "--output", out, "--data", corpus, "--max-steps", 2, "--state-bytes", BYTES,
            *OPTIONS,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        told = json.loads((out / "run.json").read_text())
        assert told["recipe"] == "equipoise"
        assert told["allocation"]["budget"] == BYTES
        assert told["settings"]["hybrid"] == told["allocation"]["hybrid"]
        model: Any = AutoModelForCausalLM.from_pretrained(out)
        assert state_bytes(model) == told["allocation"]["state_bytes"] <= BYTES
        assert [max(windows) for windows in told["allocation"]["windows"]] == [
            mixer.config.window for mixer in mixers_of(model)
        ]
        assert any(mixer.has_both for mixer in mixers_of(model))
        assert "D features in heads" in done.stderr
        with torch.no_grad():
            assert model(torch.arange(3, 40)[None]).logits.isfinite().all()

    def test_too_few_bytes(self, cli: Cli, donor: Path, corpus: Path, tmp_path: Path) -> None:
        done = cli(
            "convert", donor, "--output", tmp_path / "out", "--data", corpus, "--state-bytes", 10, *OPTIONS
        )
        assert done.exit_code == 2
        assert "raise --state-bytes" in done.stderr
        assert not (tmp_path / "out" / "config.json").exists()

    def test_other_recipes_can_have_one(self, convert: Cli, tmp_path: Path) -> None:
        done = convert("ssd", "--state-bytes", BYTES, "--set", "allocation.smallest_window=2")
        assert done.exit_code == 0, done.output
        assert "ssd has no allocation of its own; --state-bytes adds one" in done.stderr

    @pytest.mark.parametrize("recipe", ["lolcats", "swa-sinks", "hedgehog"])
    def test_where_it_cannot_be(self, convert: Cli, recipe: str) -> None:
        done = convert(recipe, "--state-bytes", BYTES)
        assert done.exit_code == 2
        assert "Traceback" not in done.output

    def test_layer_streaming_refuses_it(self, cli: Cli, donor: Path, tmp_path: Path) -> None:
        done = cli("convert", donor, "--output", tmp_path / "out", "--stream-layers")
        assert done.exit_code == 2
        assert "--set allocation=null" in " ".join(done.stderr.split())

    def test_a_resumed_run_does_not_measure_again(
        self, run: RunConfig, donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = convert_here(str(donor), run, tmp_path / "whole")
        stopped = run.model_copy()
        with pytest.MonkeyPatch.context() as patch:

            def dies(*_: object, **__: object) -> None:
                raise KeyboardInterrupt

            patch.setattr("equipoise.train.convert.finetune", dies)
            with pytest.raises(KeyboardInterrupt):
                convert_here(str(donor), stopped, tmp_path / "cut")
        monkeypatch.setattr(allocating, "allocate", lambda *_, **__: pytest.fail("measured again"))
        resumed = convert_here(str(donor), run, tmp_path / "cut", resume=True)
        assert resumed.allocation == whole.allocation
        assert resumed.held_out == whole.held_out

    def test_it_comes_back_from_json(self, run: RunConfig, donor: Path, tmp_path: Path) -> None:
        record = convert_here(str(donor), run, tmp_path / "out")
        assert record.allocation is not None
        written = json.loads((tmp_path / "out" / "run.json").read_text())["allocation"]
        assert as_dict(from_dict(written)) == as_dict(from_dict(json.loads(json.dumps(record.allocation))))


def test_it_is_said_where_the_data_does_not_look_far() -> None:
    hybrid = HybridConfig(window=8, per_layer={1: {"feature_map": None}, 2: {"feature_dim": 1}})
    for loss, expected in ((0.2, False), (0.001, True)):
        found = Allocation(
            hybrid, 10, 20, [0, 1, 2], [[8, 8], [8, 4], [8, 8]], [[1], [], []], [[0.1, 0.2]] * 3, [4],
            [[[0.1], [0.2]]] * 3, {"shared": loss, "even": 0.3},
        )  # fmt: skip
        lines = described(found)
        assert any("hardly look past the windows" in line for line in lines) == expected
        assert lines[-3:] == [
            "  layer 0: window 8, linear attention of 2 D features in heads 1", "  layer 1: windows 8 4",
            "  layer 2: window 8, states of 1 feature in all heads",
        ]  # fmt: skip


class TestAllocate:
    def test_the_recipe_it_writes_converts_to_the_same(
        self, cli: Cli, donor: Path, corpus: Path, tmp_path: Path
    ) -> None:
        mine, common = tmp_path / "mine.yaml", ("--data", corpus, *OPTIONS)
        done = cli("allocate", donor, "--state-bytes", BYTES, "--output", mine, "--json", *common)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["budget"] == BYTES
        run = load_recipe(str(mine))
        assert run.hybrid is not None
        assert run.allocation is None
        assert run.hybrid.model_dump(mode="json") == found["hybrid"]
        made = cli("convert", donor, "--recipe", mine, "--output", tmp_path / "out", "--max-steps", 1)
        assert made.exit_code == 0, made.output
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert state_bytes(model) == found["state_bytes"]
        again = cli("allocate", donor, "--state-bytes", BYTES, "--output", mine, *common)
        assert again.exit_code == 2
        assert "exists already" in again.stderr

    def test_a_recipe_without_one(self, cli: Cli, donor: Path, corpus: Path) -> None:
        done = cli("allocate", donor, "--recipe", "ssd", "--data", corpus)
        assert done.exit_code == 2
        assert "give --state-bytes" in done.stderr

    def test_plan(self, cli: Cli, donor: Path, corpus: Path) -> None:
        done = cli("plan", donor, "--data", corpus, "--state-bytes", BYTES, "--no-probe", *OPTIONS)
        assert done.exit_code == 0, done.output
        assert "2.9 KiB a sequence; windows and linear heads are measured first" in done.stdout
