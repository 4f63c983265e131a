"""Conversions by layers: bit for bit those of joint training, whatever stops them, and refusals that help."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conversions import files, logits, quiet
from equipoise.config import ConfigError, RunConfig
from equipoise.models.branches import branches
from equipoise.models.load import load_model
from equipoise.models.storage import CheckpointError
from equipoise.train import layer_convert as module
from equipoise.train.convert import convert
from equipoise.train.layer_convert import check_streamable, convert_by_layers
from equipoise.train.layer_inputs import InputStore
from equipoise.train.layer_progress import LayerProgress
from equipoise.train.layer_stream import LayerStream
from equipoise.train.outputs import WORK, OutputError
from equipoise.train.rank_trainer import TrainingDiverged
from support import tiny_model, tiny_tokenizer

Donor = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def family(tmp_path: Path) -> Donor:
    """A tiny donor of a family in many shards."""

    def save(name: str, **settings: Any) -> str:
        place = tmp_path / "donor"
        tiny_model(name, vocab_size=320, **settings).save_pretrained(place, max_shard_size="20KB")
        tiny_tokenizer().save_pretrained(place)
        return str(place)

    return save


@pytest.fixture
def run(small: Any) -> Callable[..., RunConfig]:
    """A recipe that sees its rows twice, in an order of their own each time, in micro batches."""

    def load(**settings: Any) -> RunConfig:
        stage = {
            "max_steps": None, "epochs": 1.5, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-2,
            "save_every": 2, **settings.pop("transfer", {}),
        }  # fmt: skip
        data = {"data": {"context_length": 32, "max_tokens": 700}}
        hybrid = {"window": 4, "layers": "all", "gate": "per_token"}
        chosen = small("zero-shot", transfer=stage, watch=None, **settings)
        values = chosen.model_dump()
        values["data"] |= data["data"]
        values["hybrid"] |= hybrid | settings.get("hybrid", {})
        return RunConfig(**values)

    return load


def maps(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "hybrid.safetensors")


def assert_same_result(one: Path, other: Path) -> None:
    ours, theirs = maps(one), maps(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert files(one) == files(other)
    for name in ("config.json", "generation_config.json"):
        assert (one / name).read_text() == (other / name).read_text()


def both(donor: str, chosen: RunConfig, place: Path) -> tuple[Any, Any]:
    joint = convert(donor, chosen, place / "joint", seed=3, console=quiet())
    streamed = convert_by_layers(donor, chosen, place / "streamed", seed=3, console=quiet())
    assert streamed is not None
    return joint, streamed


class TestTheSameAsJointTraining:
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("llama", torch.bfloat16), ("gemma3_text", torch.float32), ("gpt2", torch.bfloat16)],
    )
    def test_weights_and_files(
        self, name: str, dtype: torch.dtype, family: Donor, run: Any, tmp_path: Path
    ) -> None:
        donor = family(name, dtype=dtype)
        joint, streamed = both(donor, run(), tmp_path)
        assert_same_result(tmp_path / "joint", tmp_path / "streamed")
        assert streamed.held_out == pytest.approx(joint.held_out, abs=1e-5)
        assert streamed.train_tokens == joint.train_tokens > 0
        losses = [
            [entry["loss"] for entry in record.stages["transfer"]["history"] if "loss" in entry]
            for record in (joint, streamed)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        results = [load_model(str(tmp_path / kind)) for kind in ("joint", "streamed")]
        assert torch.equal(logits(results[0]), logits(results[1]))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["qwen3", "gemma2", "mixtral", "smollm3", "gpt_neox", "olmo3", "phi3"])
    def test_more_families(
        self, name: str, dtype: torch.dtype, family: Donor, run: Any, tmp_path: Path
    ) -> None:
        both(family(name, dtype=dtype), run(), tmp_path)
        assert_same_result(tmp_path / "joint", tmp_path / "streamed")

    def test_some_layers_of_which_one_learns_in_bfloat16_autocast(
        self, family: Donor, run: Any, tmp_path: Path
    ) -> None:
        chosen = run(
            hybrid={"layers": (0, 1), "per_layer": {0: {"feature_map": None}}}, precision="bfloat16",
            transfer={"objectives": {"weights": 1.0, "output": 2.0}, "max_steps": 3, "decay": "linear"},
        )  # fmt: skip
        both(family("qwen3", num_hidden_layers=3), chosen, tmp_path)
        assert_same_result(tmp_path / "joint", tmp_path / "streamed")

    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_a_full_checkpoint_stands_alone(self, name: str, family: Donor, run: Any, tmp_path: Path) -> None:
        both(family(name, dtype=torch.bfloat16), run(checkpoint="full", transfer={"max_steps": 2}), tmp_path)
        shutil.rmtree(tmp_path / "donor")
        results = [load_model(str(tmp_path / kind)) for kind in ("joint", "streamed")]
        assert torch.equal(logits(results[0]), logits(results[1]))
        default = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
        assert default.dtype == torch.bfloat16
        assert {p.dtype for n, p in default.named_parameters() if ".hybrid." in n} == {torch.float32}


# ---- stopped and resumed


class KillError(Exception):
    """The process goes away."""


def fail_at(monkeypatch: pytest.MonkeyPatch, kind: type[Any], name: str, call: int) -> None:
    """Have a method raise at a call, counted from 1."""
    own, seen = getattr(kind, name), [0]

    def method(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == call:
            raise KillError
        return own(*args, **kwargs)

    monkeypatch.setattr(kind, name, method)


POINTS = [
    pytest.param(InputStore, "put_batch", 2, marks=pytest.mark.slow),  # while rows are laid out
    pytest.param(InputStore, "put", 3, marks=pytest.mark.slow),  # while they are embedded
    (LayerProgress, "on_step_end", 4),  # in layer 0, after a training checkpoint
    pytest.param(InputStore, "put", 20, marks=pytest.mark.slow),  # between layers
    (LayerProgress, "on_step_end", 13),  # in layer 1
    pytest.param(LayerStream, "install", 1, marks=pytest.mark.slow),  # all trained
]


class TestResume:
    @pytest.mark.parametrize(("kind", "name", "call"), POINTS)
    def test_bit_equal_after_a_failure(
        self, kind: type[Any], name: str, call: int, family: Donor, run: Any, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        donor, chosen = family("llama"), run()
        convert_by_layers(donor, chosen, tmp_path / "whole", console=quiet())
        with monkeypatch.context() as patch:
            fail_at(patch, kind, name, call)
            with pytest.raises(KillError):
                convert_by_layers(donor, chosen, tmp_path / "cut", console=quiet())
        early = kind is InputStore and call < 4
        assert (tmp_path / "cut" / WORK).exists() != early  # nothing worth keeping yet
        trained: list[int] = []
        own = LayerStream._train
        monkeypatch.setattr(LayerStream, "_train", lambda self, i: (trained.append(i), own(self, i)))
        record = convert_by_layers(donor, chosen, tmp_path / "cut", resume=True, console=quiet())
        assert trained == {("put", 20): [1], ("on_step_end", 13): [1], ("install", 1): []}.get(
            (name, call), [0, 1]
        )
        assert record is not None
        assert_same_result(tmp_path / "cut", tmp_path / "whole")

    def test_a_damaged_layer_is_trained_again(
        self, family: Donor, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its inputs are gone, and are made again."""
        donor, chosen = family("llama"), run(transfer={"max_steps": 2})
        convert_by_layers(donor, chosen, tmp_path / "whole", console=quiet())
        with monkeypatch.context() as patch:
            fail_at(patch, LayerStream, "install", 1)
            with pytest.raises(KillError):
                convert_by_layers(donor, chosen, tmp_path / "cut", console=quiet())
        weights = tmp_path / "cut" / WORK / "layer-0000" / "trained.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
        convert_by_layers(donor, chosen, tmp_path / "cut", resume=True, console=quiet())
        assert_same_result(tmp_path / "cut", tmp_path / "whole")

    def test_it_is_resumed_as_it_was_started(
        self, family: Donor, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        donor = family("llama")
        fail_at(monkeypatch, LayerStream, "install", 1)
        with pytest.raises(KillError):
            convert_by_layers(donor, run(), tmp_path / "out", console=quiet())
        with pytest.raises(ConfigError, match=r"stream_layers \(was True, now None\)"):
            convert(donor, run(), tmp_path / "out", resume=True, console=quiet())
        with pytest.raises(ConfigError, match="epochs"):
            convert_by_layers(
                donor, run(transfer={"epochs": 2}), tmp_path / "out", resume=True, console=quiet()
            )

    @pytest.mark.parametrize("forward_first", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_what_layers_get_does_not_pile_up(
        self, forward_first: bool, family: Donor, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor is it gone before its layer is trained, where a helper pushes it on first."""
        most = [0]
        own = InputStore.put

        def put(self: InputStore, *args: Any) -> None:
            own(self, *args)
            if self.root.name == "inputs":
                most[0] = max(most[0], len(list(self.root.glob("layer-*/*"))))

        monkeypatch.setattr(InputStore, "put", put)
        begin = LayerStream.__init__

        def reordered(self: LayerStream, *args: Any, **options: Any) -> None:
            begin(self, *args, **options)
            self.tasks.sort(key=lambda task: (task.layer, (task.kind == "train") == forward_first))

        monkeypatch.setattr(LayerStream, "__init__", reordered)
        chosen = run(transfer={"max_steps": 10})
        convert_by_layers(family("llama", num_hidden_layers=4), chosen, tmp_path / "out", console=quiet())
        layers = 2 if forward_first else 1
        assert most[0] <= 10 * 2 * layers + 1  # so many layers', and one micro batch more
        assert not (tmp_path / "out" / WORK).exists()


# ---- what goes wrong


class TestErrors:
    def test_a_shard_that_is_missing_or_cut_off_is_named_before_anything_starts(
        self, family: Donor, run: Any, tmp_path: Path
    ) -> None:
        donor, chosen = family("llama"), run(transfer={"max_steps": 2})
        whole = tmp_path / "whole"
        convert_by_layers(donor, chosen, whole, console=quiet())
        index = json.loads((Path(donor) / "model.safetensors.index.json").read_text())["weight_map"]
        of_layer = {f for n, f in index.items() if ".layers.1." in n}
        others = {f for n, f in index.items() if ".layers.1." not in n}
        shard = Path(donor) / min(of_layer - others)
        content, out = shard.read_bytes(), tmp_path / "out"
        shard.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=rf"{shard.name}: not a complete"):
            convert_by_layers(donor, chosen, out, console=quiet())
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"expected the shard {shard.name}"):
            convert_by_layers(donor, chosen, out, console=quiet())
        assert not out.exists()
        shard.write_bytes(content)
        convert_by_layers(donor, chosen, out, console=quiet())
        assert_same_result(out, whole)

    def test_nan_names_the_layer_and_keeps_the_others(self, family: Donor, run: Any, tmp_path: Path) -> None:
        donor = family("llama")
        for shard in Path(donor).glob("*.safetensors"):
            weights = load_file(shard)
            name = "model.layers.1.input_layernorm.weight"
            if name in weights:
                weights[name] = weights[name] * float("nan")
                save_file(weights, shard, metadata={"format": "pt"})
        with pytest.raises(TrainingDiverged, match=r"loss of layer 1 is nan at step 1.*1 finished layers"):
            convert_by_layers(donor, run(), tmp_path / "out", console=quiet())
        assert (tmp_path / "out" / WORK / "layer-0000" / "finished.json").is_file()

    def test_a_disk_without_room_is_known_before(
        self, family: Donor, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr("equipoise.train.layer_stream.shutil.disk_usage", lambda _: usage)
        with pytest.raises(ConfigError, match=r"takes [\d,]+ bytes on disk, and 10 are free"):
            convert_by_layers(family("llama"), run(), tmp_path / "out", console=quiet())
        assert not (tmp_path / "out").exists()

    def test_what_needs_the_whole_model_is_refused(self, small: Any) -> None:
        with pytest.raises(ConfigError, match=r"`--set finetune=null --set watch=null --report-to none`"):
            check_streamable(small("hedgecats", report_to="tensorboard"))
        far = small("zero-shot", transfer={"objectives": {"far-output": 1.0}})
        with pytest.raises(ConfigError, match=r"far-output looks at predictions.*objectives=\{output: 1\.0"):
            check_streamable(far)
        fitted = small("zero-shot", transfer={"fit_scores": True})
        with pytest.raises(
            ConfigError, match=r"fit_scores runs the donor.*transfer\.fit_scores=false --set watch"
        ):
            check_streamable(fitted)
        with pytest.raises(ConfigError, match="swa-sinks has no transfer"):
            check_streamable(small("swa-sinks"))

    def test_there_must_be_a_run_to_join(self, family: Donor, run: Any, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="found no run to join"):
            convert_by_layers(family("llama"), run(), tmp_path / "out", join=True, console=quiet())

    def test_the_donor_in_the_result_is_the_donor(self, family: Donor, run: Any, tmp_path: Path) -> None:
        donor = family("gemma3_text")
        convert_by_layers(donor, run(transfer={"max_steps": 1}), tmp_path / "out", console=quiet())
        result = load_model(str(tmp_path / "out"))
        with branches(result, "softmax"):
            torch.testing.assert_close(logits(result), logits(load_model(donor)), rtol=1e-4, atol=1e-5)
        assert module.kept_layers(tmp_path) == ""
