"""Several ranks give what one process gives: weights, losses, checkpoints; and they fail together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversions import files, logits
from equipoise.config import ConfigError
from equipoise.distributed import Ranks
from equipoise.registry import UnknownNameError
from equipoise.train import parallel
from equipoise.train.parallel import chosen_parallel, share_of_batch
from equipoise.train.recipes import load_recipe
from ranks import SEEN, launch, run_job
from support import tiny_model, tiny_tokenizer

RECIPES: dict[str, dict[str, Any]] = {
    # window dropout, drawn by global sample; accumulation; recomputed activations; the donor's predictions
    "ssd": {
        "transfer": {"micro_batch_size": 1},
        "finetune": {"micro_batch_size": 1, "objectives": {"next-token": 1.0, "far-distillation": 1.0}},
    },
    # early stopping, whose looks the ranks share
    "hedgecats": {"finetune": {"early_stopping": {"every": 2, "watch": "linear_share", "mode": "fall"}}},
}
SHARED = ("hybrid.safetensors", "lora/adapter_model.safetensors")


@pytest.fixture
def job(small: Any, donor: str) -> Any:
    """A conversion as `ranks` takes it."""

    def make(
        recipe: str, output: Path, *, options: dict[str, Any] | None = None, **settings: Any
    ) -> dict[str, Any]:
        stages = {
            stage: {
                "max_steps": 4,
                "save_every": 2,
                **RECIPES.get(recipe, {}).get(stage, {}),
                **settings.pop(stage, {}),
            }
            for stage in ("transfer", "finetune")
        }
        run = small(recipe, **stages, watch={"every": 2, "rows": 4}, **settings)
        values = {"donor": donor, "run": run.model_dump(mode="json"), "output": str(output)}
        return {**values, "float64": True, **(options or {})}

    return make


def trained(output: Path) -> dict[str, torch.Tensor]:
    return {f"{file} {name}": t for file in SHARED for name, t in load_file(output / file).items()}


def assert_equal(output: Path, reference: Path) -> None:
    """The same weights, losses, looks and result."""
    ours, theirs = trained(output), trained(reference)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    told, expected = (json.loads((place / "run.json").read_text()) for place in (output, reference))
    assert told["held_out"] == pytest.approx(expected["held_out"], abs=1e-9)
    assert told["train_tokens"] == expected["train_tokens"]
    for name, stage in expected["stages"].items():
        own = told["stages"][name]
        assert (own["steps"], own["kept_step"]) == (stage["steps"], stage["kept_step"])
        assert len(own["history"]) == len(stage["history"])
        for ours_entry, theirs_entry in zip(own["history"], stage["history"], strict=True):
            assert ours_entry.keys() == theirs_entry.keys()
            for key in theirs_entry:
                if "second" in key or "runtime" in key:
                    continue
                # transformers' own loss, and the norms of branches, are float32 whatever the model is held in
                exact = key == "grad_norm" or (name == "transfer" and key in ("loss", "train_loss"))
                tolerance = 1e-9 if exact else 1e-5
                assert ours_entry[key] == pytest.approx(theirs_entry[key], rel=tolerance, abs=tolerance), key


def seen(output: Path) -> list[dict[str, Any]]:
    return json.loads(output.with_name(f"{output.name}-{SEEN}").read_text())


@pytest.mark.slow
class TestOneResult:
    def test_fsdp2_on_two_ranks(self, job: Any, tmp_path: Path) -> None:
        """Done when: a 2-rank FSDP2 conversion gives the single-process result for `ssd` and `hedgecats`."""
        for recipe in RECIPES:
            run_job(job(recipe, tmp_path / f"{recipe}-1", gradient_checkpointing=recipe == "ssd"))
        jobs = [
            job("ssd", tmp_path / "ssd-2", gradient_checkpointing=True, options={"parallel": "fsdp2"}),
            job(
                "hedgecats", tmp_path / "hedgecats-2", options={"parallel": "auto"}
            ),  # as accelerate is configured
        ]
        done = launch(2, jobs, tmp_path, ACCELERATE_USE_FSDP="true")
        assert done.returncode == 0, done.stderr
        for recipe in RECIPES:
            assert_equal(tmp_path / f"{recipe}-2", tmp_path / f"{recipe}-1")
            one, other = seen(tmp_path / f"{recipe}-2")
            # FSDP on CPU through accelerate would be DDP without a word
            assert one["sharded"] == one["donor"] > 0
            assert one["part"] + other["part"] == 1
            assert 0.4 < one["part"] < 0.6
            # sharded mixers would be trained wrong without a word
            assert one["sharded_own"] == 0
            assert one["trained"] == other["trained"]
            assert files(tmp_path / f"{recipe}-2") == files(tmp_path / f"{recipe}-1")
        assert done.stderr.count("held-out loss") == 2  # the leader alone speaks
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ssd-2")
        assert type(model).__name__ == "EquipoiseLlamaForCausalLM"

    def test_the_default_recipe_on_two_ranks(self, job: Any, tmp_path: Path) -> None:
        """As `equipoise allocate` writes it: delta states in two heads, means whose scores are fitted."""
        means = load_recipe("equipoise").allocation
        assert means is not None
        means = {**(means.elsewhere or {}), "linear_heads": [0, 1, 2, 3]}
        shared_out = {
            "hybrid": {"window": 4, "linear_heads": [2, 3], "per_layer": {1: means}}, "allocation": None,
        }  # fmt: skip
        run_job(job("equipoise", tmp_path / "equipoise-1", **shared_out))
        sharded = job("equipoise", tmp_path / "equipoise-2", options={"parallel": "fsdp2"}, **shared_out)
        done = launch(2, [sharded], tmp_path)
        assert done.returncode == 0, done.stderr
        assert_equal(tmp_path / "equipoise-2", tmp_path / "equipoise-1")
        one, other = seen(tmp_path / "equipoise-2")
        assert one["sharded"] == one["donor"] > 0
        assert one["sharded_own"] == 0
        assert one["trained"] == other["trained"]

    def test_ddp_on_two_ranks(self, job: Any, tmp_path: Path) -> None:
        for recipe in RECIPES:
            run_job(job(recipe, tmp_path / f"{recipe}-1"))
        done = launch(2, [job(recipe, tmp_path / f"{recipe}-2") for recipe in RECIPES], tmp_path)
        assert done.returncode == 0, done.stderr
        for recipe in RECIPES:
            assert_equal(tmp_path / f"{recipe}-2", tmp_path / f"{recipe}-1")
            assert [rank["sharded"] for rank in seen(tmp_path / f"{recipe}-2")] == [0, 0]

    def test_ddp_on_four_ranks(self, job: Any, tmp_path: Path) -> None:
        for recipe in RECIPES:
            run_job(job(recipe, tmp_path / f"{recipe}-1"))
        done = launch(4, [job(recipe, tmp_path / f"{recipe}-4") for recipe in RECIPES], tmp_path)
        assert done.returncode == 0, done.stderr
        for recipe in RECIPES:
            assert_equal(tmp_path / f"{recipe}-4", tmp_path / f"{recipe}-1")

    def test_tied_weights_full_checkpoints_and_bfloat16(self, job: Any, tmp_path: Path) -> None:
        tied = tmp_path / "gemma2"
        tiny_model("gemma2", vocab_size=300).save_pretrained(tied)
        tiny_tokenizer().save_pretrained(tied)
        full = {"donor": str(tied), "float64": False}
        options = {"parallel": "fsdp2"}
        run_job(job("ssd", tmp_path / "full-1", checkpoint="full", options=full))
        jobs = [
            job("ssd", tmp_path / "full-2", checkpoint="full", options={**full, **options}),
            job("ssd", tmp_path / "bf16-2", precision="bfloat16", options={**options, "float64": False}),
        ]
        done = launch(2, jobs, tmp_path)
        assert done.returncode == 0, done.stderr
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / f"full-{n}") for n in (1, 2))
        torch.testing.assert_close(logits(two), logits(one), rtol=1e-4, atol=1e-5)
        assert files(tmp_path / "full-2") == files(tmp_path / "full-1")
        assert all(rank["own_dtypes"] == ["torch.float32"] for rank in seen(tmp_path / "bf16-2"))
        told = json.loads((tmp_path / "bf16-2" / "run.json").read_text())
        assert all(
            math.isfinite(entry["loss"]) for stage in told["stages"].values() for entry in stage["history"]
            if "loss" in entry
        )  # fmt: skip


@pytest.mark.slow
class TestFailingTogether:
    def run(self, kind: str, job: Any, donor: str, output: Path, **environment: str) -> Any:
        """Convert on two ranks by command, of which the second breaks in the third step."""
        data = job("ssd", output)["run"]["data"]
        arguments = [
            "convert", donor, "--recipe", "ssd", "--output", str(output), "--data", data["source"],
            "--max-steps", "4",
        ]  # fmt: skip
        arguments += [
            part for setting in (
                "data.context_length=32", "data.max_tokens=3000", "hybrid.window=4", "transfer.save_every=2",
                "transfer.batch_size=4", "finetune.batch_size=4",
            ) for part in ("--set", setting)
        ]  # fmt: skip
        fault = {} if kind == "none" else {"fault": {"rank": 1, "step": 2, "kind": kind}}
        resumed = ["--resume"] if kind == "none" else []
        return launch(2, [{"arguments": arguments + resumed, **fault}], output.parent, **environment)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("die", "another of the 2 processes of this run stopped"),
            ("hang", "another of the 2 processes of this run did not answer within 5 seconds"),
            ("raise", "this rank is broken"),
            ("nan", "the loss of layer 0 is nan at step 3"),
        ],
    )
    def test_one_message_and_the_last_checkpoint(
        self, kind: str, message: str, job: Any, donor: str, tmp_path: Path
    ) -> None:
        done = self.run(
            kind, job, donor, tmp_path / "out", EQUIPOISE_TIMEOUT="5" if kind == "hang" else "120"
        )
        assert done.returncode != 0
        told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(told) == 1, done.stderr
        assert message in told[0]
        checkpoint = tmp_path / "out" / "training" / "transfer" / "checkpoint-2"
        assert load_file(checkpoint / "trained.safetensors")
        assert not (tmp_path / "out" / "run.json").exists()

    def test_sigterm_to_one_rank_saves_on_all_and_resumes(self, job: Any, donor: str, tmp_path: Path) -> None:
        done = self.run("sigterm", job, donor, tmp_path / "out")
        assert "error: terminated after step 3, which was saved" in done.stderr
        assert done.stderr.count("error:") - done.stderr.count("error: terminated") == 0
        assert done.stderr.count("exitcode  : 143") == 2, done.stderr
        assert (tmp_path / "out" / "training" / "transfer" / "checkpoint-3").is_dir()
        again = self.run("none", job, donor, tmp_path / "out")
        assert again.returncode == 0, again.stderr
        whole = self.run("none", job, donor, tmp_path / "whole")
        assert whole.returncode == 0, whole.stderr
        one, other = trained(tmp_path / "out"), trained(tmp_path / "whole")
        assert all(torch.equal(one[name], other[name]) for name in other)


class TestChoosing:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(parallel, "_configured", set())

    def launched(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(count))

    def test_what_a_launcher_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert chosen_parallel("auto") == "none"
        self.launched(monkeypatch, 2)
        assert chosen_parallel("auto") == "ddp"
        assert chosen_parallel("fsdp2") == "fsdp2"
        self.launched(monkeypatch, 1)
        assert chosen_parallel("fsdp2") == "ddp"  # a shard of one rank would be the whole donor
        self.launched(monkeypatch, 2)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        assert chosen_parallel("ddp") == "ddp"
        assert chosen_parallel("auto") == "fsdp2"
        assert chosen_parallel("auto") == "fsdp2"  # also in a second run of the process

    @pytest.mark.parametrize("wanted", ["ddp", "fsdp2"])
    def test_one_process_is_not_several(self, wanted: str) -> None:
        """`accelerate launch --cpu --num_processes 2` starts one, and says nothing."""
        with pytest.raises(ConfigError, match="got this one alone"):
            chosen_parallel(wanted)

    def test_other_engines_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched(monkeypatch, 2)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(ConfigError, match="configured for DEEPSPEED"):
            chosen_parallel("auto")

    def test_unknown_ways(self) -> None:
        with pytest.raises(UnknownNameError, match="Did you mean"):
            chosen_parallel("fsdp")


class TestShares:
    @pytest.mark.parametrize(
        ("batch", "micro", "count", "expected"),
        [(8, None, 1, (8, 1)), (8, None, 4, (2, 1)), (8, 2, 2, (2, 2)), (8, 8, 2, (4, 1)), (4, 1, 4, (1, 1))],
    )
    def test_rows_of_a_rank(
        self, batch: int, micro: int | None, count: int, expected: Any, recipe: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(parallel, "ranks", lambda: Ranks(0, count))
        stage = recipe(transfer={"batch_size": batch, "micro_batch_size": micro}).transfer
        assert share_of_batch(stage, "transfer") == expected

    @pytest.mark.parametrize(
        ("batch", "micro", "count", "message"),
        [
            (8, None, 3, "transfer.batch_size: expected a multiple of the 3 processes.*Set it to 6 or 9"),
            (2, None, 4, "Set it to 4,"),
            (12, 4, 2, "transfer.micro_batch_size: expected a divisor of 6"),
        ],
    )
    def test_shares_that_do_not_divide(
        self, batch: int, micro: int | None, count: int, message: str, recipe: Any, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(parallel, "ranks", lambda: Ranks(0, count))
        stage = recipe(transfer={"batch_size": batch, "micro_batch_size": micro}).transfer
        with pytest.raises(ConfigError, match=message):
            share_of_batch(stage, "transfer")
