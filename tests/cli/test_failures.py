"""Bad input of every kind: the exit code, the words of the message, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FalconConfig

from equipoise.layers import interface
from equipoise.train import objectives, trainer
from support import tiny_tokenizer

from .conftest import Cli


def check(done: Any, code: int, *words: str) -> None:
    """The exit code, one error with all the words, whole words, and no traceback."""
    assert done.exit_code == code, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


@pytest.fixture
def copy(donor: Path, tmp_path: Path) -> Path:
    """A copy of the donor to damage."""
    return Path(shutil.copytree(donor, tmp_path / "copy"))


# ---- settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("hybrid.window=0", ("hybrid.window", "greater than or equal to 1", "got 0")),
        ("hybrid.window=100000", ("context of 512", "got 100000", "Choose a smaller one")),
        ("hybrid.feature_map=hedgehogg", ("unknown feature map", "Did you mean 'hedgehog'?")),
        ("hybrid.mixing=convexx", ("unknown mixing rule", "Did you mean 'convex'?")),
        ("transfer.objectives={weight: 1.0}", ("unknown transfer objective", "Did you mean 'weights'?")),
        ("hybrid.windw=8", ("unknown setting 'windw'", "Did you mean 'window'?")),
        ("finetune.rank=two", ("finetune.rank", "got 'two'")),
        ("hybrid.layers=[7]", ("layers between 0 and 1",)),
        ("finetune.targets=[q_prj]", ("finetune.targets", "got 'q_prj'")),
        ("finetune", ("expected key=value",)),
        ("finetune.rank=[1", ("not YAML",)),
    ],
)
def test_setting_that_cannot_be_used(
    convert: Cli, tmp_path: Path, setting: str, words: tuple[str, ...]
) -> None:
    check(convert("ssd", "--set", setting), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("sdd", ("unknown recipe", "Did you mean 'ssd'?")), ("missing.yaml", ("cannot read", "missing.yaml"))],
)
def test_unknown_recipe(convert: Cli, tmp_path: Path, recipe: str, words: tuple[str, ...]) -> None:
    check(convert(recipe), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert",),
        ("convert", "donor", "--recipe", "ssd"),
        ("convert", "donor", "--recipe", "ssd", "--output", "x", "--max-steps", "0"),
        ("audit", "x", "--output", "y", "--documents", "1"),
        ("generate", "x", "y", "--reading", "sideways"),
        ("generate", "x", "y", "--temperature", "-1"),
        ("generate", "x", "y", "--top-p", "0"),
        ("generate", "x"),
        ("generate", "x", "y", "--prompt-file", "z"),
        ("generate", "x", "--prompt-file", "no-such-file"),
        ("convrt",),
        ("--no-such-option",),
    ],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    check(cli(*arguments), 2)


# ---- data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ("empty file",)),
        ("blank.jsonl", b"\n\n", ("columns",)),
        ("binary.txt", b"\x00\x01\x02", ("binary data",)),
        ("latin.txt", "Grüße".encode("latin-1"), ("UTF-8",)),
        ("broken.jsonl", b'{"text": "one"}\n{"text": "two"\n', ("line 2", "does not parse")),
        ("columns.jsonl", b'{"body": "one"}\n{"body": "two"}\n', ("body", "text_column")),
        ("short.jsonl", b'{"text": "one"}\n{"text": "two"}\n', ("expected at least 64 tokens",)),
        (None, b"", ("expected a file or directory",)),
    ],
)
def test_data_that_cannot_be_used(
    convert: Cli, tmp_path: Path, name: str | None, content: bytes, words: tuple[str, ...]
) -> None:
    data = tmp_path / (name or "not-there.jsonl")
    if name is not None:
        data.write_bytes(content)
    check(convert("ssd", data=data), 1, *words)
    assert not (tmp_path / "out").exists()


# ---- donors


def test_donor_that_is_not_there(convert: Cli, tmp_path: Path) -> None:
    check(convert("ssd", source=tmp_path / "nowhere"), 1, "nowhere", "expected a local model directory")
    assert not (tmp_path / "out").exists()


def test_donor_that_is_a_file(convert: Cli, corpus: Path) -> None:
    check(convert("ssd", source=corpus), 1, "got a file")


@pytest.mark.parametrize(
    ("pickle", "words"), [(False, ("found none",)), (True, ("pytorch_model.bin", "safetensors"))]
)
def test_donor_without_safetensors(
    convert: Cli, copy: Path, tmp_path: Path, pickle: bool, words: tuple[str, ...]
) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    if pickle:
        torch.save(weights, copy / "pytorch_model.bin")
    check(convert("ssd", source=copy), 1, "expected weights", *words)
    assert not (tmp_path / "out").exists()


def test_donor_with_cut_off_weights(convert: Cli, copy: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    check(convert("ssd", source=copy), 1, "not a complete safetensors file", "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_donor_without_tokenizer(convert: Cli, copy: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    check(convert("ssd", source=copy), 1, "no tokenizer found")
    assert not (tmp_path / "out").exists()


def test_tokenizer_that_does_not_fit(convert: Cli, copy: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(20)], special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": "word19"})
    tokenizer.save_pretrained(copy)
    check(convert("ssd", source=copy), 1, "vocabulary size 300", "319")
    assert not (tmp_path / "out").exists()


def test_refused_family(convert: Cli, tmp_path: Path) -> None:
    place = tmp_path / "falcon"
    FalconConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(place)
    save_file({"x": torch.zeros(1)}, place / "model.safetensors")
    check(convert("ssd", source=place), 2, "cannot convert 'falcon'", "attention interface")
    assert not (tmp_path / "out").exists()


def test_failed_parity_is_failed_work(convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = interface.donor_attention
    monkeypatch.setattr(interface, "donor_attention", lambda inputs: right(inputs) * 1.1)
    check(convert("ssd"), 1, "parity self-test failed", "report the model type")
    assert not (tmp_path / "out").exists()


def test_adapters_are_no_donor(convert: Cli, cli: Cli, tmp_path: Path) -> None:
    assert convert("lora-only").exit_code == 0
    check(convert("ssd", source=tmp_path / "out", output=tmp_path / "second"), 1, "got adapters")
    assert not (tmp_path / "second").exists()
    done = cli("generate", tmp_path / "out", "def", "--max-new-tokens", 2)
    assert done.exit_code == 0, done.stderr


# ---- training that goes wrong


def test_loss_that_is_not_a_number(convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    good = objectives.OBJECTIVES["weights"]

    def weights(target: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return good(target) * (float("nan") if calls > 2 * 3 else 1.0)  # two layers: from step 4 on

    monkeypatch.setitem(objectives.OBJECTIVES._entries, "weights", weights)
    done = convert(
        "zero-shot", "--set", "transfer.max_steps=8", "--set", "transfer.batch_size=2",
    )  # fmt: skip
    # long before the first regular checkpoint, which comes after 200 steps
    kept = tmp_path / "out" / "training" / "transfer" / "checkpoint-3"
    assert done.exit_code == 1
    for words in ("nan at step 4", "Lower transfer.learning_rate", "max_grad_norm", str(kept)):
        assert words in done.stderr
    assert (kept / "trained.safetensors").is_file()
    assert not (tmp_path / "out" / "config.json").exists()


def test_interrupted_run_is_kept_and_goes_on(
    convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--set", "transfer.max_steps=4", "--set", "transfer.save_every=2")
    with monkeypatch.context() as patch:
        step = trainer.StageTrainer.check_finite

        def interrupted(self: Any, loss: torch.Tensor, where: str = "", **more: Any) -> None:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            step(self, loss, where, **more)

        patch.setattr(trainer.StageTrainer, "check_finite", interrupted)
        done = convert("zero-shot", *options)
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    check(convert("zero-shot", *options), 2, "not empty", "--resume")
    check(convert("zero-shot", *options, "--resume", "--seed", 5), 2, "differs in seed (was 0, now 5)")
    done = convert("zero-shot", *options, "--resume")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out" / "run.json").is_file()
    check(convert("zero-shot", *options, "--resume"), 2, "nothing to resume")


def test_interrupted_before_training_leaves_nothing(
    convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("equipoise.train.convert.prepare_data", interrupt)
    done = convert("ssd")
    assert done.exit_code == 130
    assert "nothing was kept" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- outputs


def test_output_that_is_not_empty(convert: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out [1]"  # brackets are rich's markup; they must come through
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    check(convert("ssd", output=out), 2, "out [1]", "not empty", "Choose another --output")
    check(convert("ssd", "--resume", output=out), 2, "no run to resume")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_output_that_is_a_file(convert: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    check(convert("ssd"), 2, "got a file")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("verb", ["convert", "audit"])
def test_output_that_cannot_be_written(
    cli: Cli, convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    out = tmp_path / "out"
    done = convert("ssd") if verb == "convert" else cli("audit", "model", "--output", out)
    check(done, 2, "cannot be written (Permission denied)", str(out))


def test_long_messages_are_not_cut(convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = tmp_path / ("long" * 40)
    out.mkdir()
    (out / "x").touch()
    check(convert("ssd", output=out), 2, str(out))


@pytest.mark.parametrize("how", ["os", "safetensors", "torch"])
def test_full_disk(convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    errors = {
        "os": OSError(errno.ENOSPC, "No space left on device"),
        "safetensors": RuntimeError("I/O error: No space left on device (os error 28)"),
        "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8384 vs 8278"),
    }

    def full(*_: object, **__: object) -> None:
        raise errors[how]

    monkeypatch.setattr("equipoise.models.auto.save_file", full)
    done = convert("swa-sinks" if how == "os" else "zero-shot")
    told = done.stderr.rpartition("error: ")[2]
    assert done.exit_code == 1
    for words in ("disk is full", str(tmp_path / "out"), "No half-written model", "--resume"):
        assert words in told
    left = sorted(path.name for path in tmp_path.glob("out/*"))
    assert left in ([], ["training"])


def test_full_disk_while_auditing(
    cli: Cli, convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert("swa-sinks").exit_code == 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the quick brown"}\n{"text": "fox jumps over"}\n')
    monkeypatch.setattr(os, "fsync", full)
    done = cli("audit", tmp_path / "out", "--output", tmp_path / "audit", "--data", data, "--resamples", 20)
    assert done.exit_code == 1
    assert "disk is full" in done.stderr
    assert not (tmp_path / "audit").exists()


# ---- audit and generate


def test_audit_of_what_is_not_converted(cli: Cli, donor: Path, tmp_path: Path) -> None:
    done = cli("audit", donor, "--output", tmp_path / "audit")
    check(done, 2, "expected a converted model", "plain llama", "equipoise convert")
    assert not (tmp_path / "audit").exists()


def test_models_whose_donor_vanished_or_differs(
    cli: Cli, convert: Cli, copy: Path, donor: Path, tmp_path: Path
) -> None:
    """One after the other on the same models, since they take a while to make."""
    weights = load_file(copy / "model.safetensors")
    save_file({n: t + 0.01 for n, t in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    a, b, audit = tmp_path / "a", tmp_path / "b", tmp_path / "audit"
    assert convert("swa-sinks", output=a).exit_code == 0
    assert convert("swa-sinks", source=copy, output=b).exit_code == 0
    check(cli("audit", a, b, "--output", audit), 2, "expected models of one donor", str(donor), str(copy))
    check(cli("audit", b, b, "--output", audit), 2, "one of them twice")
    check(cli("audit", b, "--output", audit, "--context-length", 9999), 2, "at most 512")
    shutil.rmtree(copy)
    check(cli("generate", b, "def"), 1, str(copy), "Put the donor back")
    done = cli("audit", b, "--output", audit)
    assert done.exit_code == 1
    assert "Put the donor back" in done.stderr
    (b / "run.json").write_text("{")
    check(cli("audit", b, "--output", audit), 1, "run.json")
    assert not audit.exists()


def test_audit_of_a_single_document(cli: Cli, convert: Cli, tmp_path: Path) -> None:
    assert convert("swa-sinks").exit_code == 0
    data = tmp_path / "book.txt"
    data.write_text("the quick brown fox " * 50)
    done = cli("audit", tmp_path / "out", "--output", tmp_path / "audit", "--data", data)
    check(done, 1, "at least 2 documents", "JSON lines")


def test_generate_with_an_unknown_branch(cli: Cli, donor: Path) -> None:
    check(cli("generate", donor, "x", "--branch", "linaer"), 2, "branch state", "Did you mean 'linear'?")
    check(cli("generate", donor, "x", "--branch", "linear"), 2, "not converted")
    check(cli("generate", donor, ""), 2, "at least one token")


# ---- anything else


def test_what_nobody_foresaw(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr("equipoise.train.recipes.load_recipe", fail)
    check(cli("recipes", "ssd"), 1, "ZeroDivisionError: division by zero", "--debug")
    done = cli("--debug", "recipes", "ssd")
    assert isinstance(done.exception, ZeroDivisionError)


def test_other_system_errors_name_their_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/some/file")

    monkeypatch.setattr("equipoise.train.recipes.load_recipe", fail)
    check(cli("recipes", "ssd"), 1, "Permission denied: /some/file")


def test_out_of_memory_says_what_to_lower(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("equipoise.train.recipes.load_recipe", fail)
    check(cli("recipes", "ssd"), 1, "out of memory", "micro_batch_size")
