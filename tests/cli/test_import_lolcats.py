"""`equipoise import-lolcats`: what it writes and says, that an audit takes it, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.audit.schema import validate_audit
from lolcats import LAYERS, Attack, distilled, tuned
from support import tiny_model

from .conftest import Cli

Import = Callable[..., Any]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "distill.pt", tmp_path / "ft.pt"]
    for path, state in zip(paths, (distilled(), tuned(rank=2, targets=("q_proj",))), strict=True):
        torch.save({"model_state_dict": state, "step": 3}, path)
    return paths


@pytest.fixture
def bring(cli: Cli, donor: Path, files: list[Path], tmp_path: Path) -> Import:
    """`equipoise import-lolcats` of both files into tmp_path/out."""

    def run(*more: object, given: list[Path] = files, source: Path = donor) -> Any:
        return cli("import-lolcats", *given, "--donor", source, "--output", tmp_path / "out", *more)

    return run


def check(done: Any, code: int, output: Path, *words: str) -> None:
    """Exit code, one error with all the words, no traceback, and no output directory."""
    assert done.exit_code == code, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not output.exists()
    for word in words:
        assert word in done.stderr


def test_writes_a_delta_and_says_what_is_in_it(bring: Import, donor: Path, tmp_path: Path) -> None:
    done = bring("--window", 8)
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "out"
    said = done.stdout.splitlines()
    gammas = torch.cat([t for n, t in distilled().items() if "factors" in n]).sigmoid()
    assert said.pop(1) == f"gamma: {gammas.min():.3f} to {gammas.max():.3f}, mean {gammas.mean():.3f}"
    assert said == [
        "layers: 2 of 2 converted; H 4, D 8, F 4 (8 features)",
        "LoRA: rank 2, alpha 4 (assumed, twice the rank), on self_attn.q_proj",
        "not in the files: window 8, terraced, hedgehog, not affine",
        f"lolcats-import: hybrid in {out}",
        f"next: equipoise audit {out} --output {out}-audit",
    ]
    assert not (out / "model.safetensors").exists()
    assert len(load_file(out / "hybrid.safetensors")) == 3 * LAYERS
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["lora_alpha"] == 4
    described = json.loads((out / "config.json").read_text())["equipoise"]
    assert described["donor"]["name"] == str(donor.resolve())
    expected = {
        "window": 8, "layout": "terraced", "mixing": "shared", "gate": "per_head", "overlap": False,
        "feature_map": "hedgehog", "feature_multiple": 1, "layers": "all",
    }  # fmt: skip
    assert {key: described["hybrid"][key] for key in expected} == expected
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    tokens = AutoTokenizer.from_pretrained(out)("def window(size):", return_tensors="pt")
    made = AutoModelForCausalLM.from_pretrained(out).generate(**tokens, max_new_tokens=12)
    assert made.shape[1] > tokens["input_ids"].shape[1]


def test_what_the_files_cannot_say_is_recorded(bring: Import, files: list[Path], tmp_path: Path) -> None:
    done = bring("--window", 16, "--layout", "sliding", "--affine", "--lora-alpha", 3)
    assert done.exit_code == 0, done.stderr
    assert "alpha 3, on" in done.stdout
    assert "not in the files: window 16, sliding, hedgehog, linear weights times 1 - gamma" in done.stdout
    note = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (note["recipe"], note["train_tokens"], note["held_out"]) == ("lolcats-import", 0, {})
    hybrid = note["settings"]["hybrid"]
    assert (hybrid["window"], hybrid["layout"], hybrid["mixing"]) == (16, "sliding", "shared-affine")
    about = note["stages"]["import"]
    assert about["lora"] == {
        "rank": 2, "alpha": 3.0, "alpha_assumed": False, "targets": ["self_attn.q_proj"],
    }  # fmt: skip
    assert [file["name"] for file in about["files"]] == [path.name for path in files]
    assert about["layers"] == [0, 1]


def test_an_audit_takes_it(bring: Import, cli: Cli, corpus: Path, tmp_path: Path) -> None:
    assert bring("--window", 8).exit_code == 0
    done = cli(
        "audit", tmp_path / "out", "--output", tmp_path / "audit", "--data", corpus, "--documents", 4,
        "--context-length", 64, "--resamples", 20,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "audit" / "audit.json").read_text())
    validate_audit(report)
    assert [run["recipe"] for run in report["runs"]] == ["lolcats-import"]


def test_partial_files(bring: Import, files: list[Path], tmp_path: Path) -> None:
    part = {name: tensor for name, tensor in distilled().items() if "layers.1." in name}
    torch.save(part, files[0])
    check(bring(given=files[:1]), 1, tmp_path / "out", "for 1 of 2 layers: 0", "--allow-partial")
    done = bring("--allow-partial", given=files[:1])
    assert done.exit_code == 0, done.stderr
    assert "layers: 1 of 2 converted, 1 left softmax; H 4" in done.stdout
    assert "LoRA: none in the files" in done.stdout


def test_later_files_count_and_it_is_said(bring: Import, files: list[Path], tmp_path: Path) -> None:
    later = {name: torch.zeros_like(t) for name, t in distilled().items() if "factors" in name}
    torch.save(later, tmp_path / "again.pt")
    done = bring(given=[*files, tmp_path / "again.pt"])
    assert done.exit_code == 0, done.stderr
    assert "note: 2 tensors of earlier files were replaced" in done.stderr
    assert "gamma: 0.500 to 0.500" in done.stdout


def test_code_in_a_file_does_not_run(bring: Import, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({"model_state_dict": distilled(), "optimizer": Attack(mark)}, path)
    check(bring(given=[path]), 1, tmp_path / "out", "evil.pt: refused", "would run code", "Nothing was run")
    assert not mark.exists()


def test_files_that_are_no_checkpoint(bring: Import, corpus: Path, tmp_path: Path) -> None:
    check(bring(given=[corpus]), 1, tmp_path / "out", "not a checkpoint")
    check(bring(given=[tmp_path / "nowhere.pt"]), 1, tmp_path / "out", "found none")


def test_checkpoint_of_another_donor(bring: Import, files: list[Path], tmp_path: Path) -> None:
    torch.save({name: t[:2] if "feature" in name else t for name, t in distilled().items()}, files[0])
    check(bring(), 1, tmp_path / "out", "H = 4 heads", "got [2, 8, 4]", "another donor")


def test_donor_of_another_type(bring: Import, donor: Path, tmp_path: Path) -> None:
    place = tmp_path / "qwen"
    tiny_model("qwen2", vocab_size=300).save_pretrained(place)
    AutoTokenizer.from_pretrained(donor).save_pretrained(place)
    check(bring(source=place), 2, tmp_path / "out", "llama, mistral", "got qwen2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layout", "rolling"), ("terraced", "rolling")),
        (("--window", 0), ("--window",)),
        (("--window", 512), ("context of 512",)),
        (("--feature-map", "exp"), ("feature_map", "only hedgehog")),
        (("--lora-alpha", 0), ("lora_alpha", "greater than 0")),
    ],
    ids=str,
)
def test_options_that_cannot_be_used(
    bring: Import, tmp_path: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    check(bring(*options), 2, tmp_path / "out", *words)


def test_output_that_is_not_empty(bring: Import, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    done = bring()
    assert done.exit_code == 2
    assert "exists and is not empty" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("missing", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=str)
def test_nothing_half_written_stays(
    bring: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise missing

    monkeypatch.setattr("equipoise.models.storage.save_file", fail, raising=False)
    monkeypatch.setattr("equipoise.models.auto.save_file", fail)
    done = bring()
    assert done.exit_code == (130 if missing is KeyboardInterrupt else 1)
    assert ("interrupted" if missing is KeyboardInterrupt else "disk is full") in done.stderr
    assert not (tmp_path / "out").exists()
