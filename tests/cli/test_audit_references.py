"""`equipoise audit HYBRID LORA-ONLY`: the softmax donor after the same LoRA, beside the hybrid."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from equipoise.audit.evaluate import score_documents
from equipoise.audit.report import validate_audit
from equipoise.commands.audit import AuditOptions, inspect, read_text
from equipoise.models.load import load_model


@pytest.fixture
def pair(convert: Cli, tmp_path: Path) -> tuple[Path, Path]:
    """A hybrid and the softmax donor after LoRA."""
    for recipe in ("ssd", "lora-only"):
        done: Result = convert(recipe, output=tmp_path / recipe)
        assert done.exit_code == 0, done.output
    return tmp_path / "ssd", tmp_path / "lora-only"


def test_lora_only_is_a_reference_of_every_run(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "audit"
    done = cli("audit", *pair, "--output", out, "--context-length", 64, "--resamples", 50)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "audit.json").read_text())
    validate_audit(report)
    (run,) = report["runs"]
    (reference,) = run["references"]
    assert (run["recipe"], reference["name"]) == ("ssd", "lora-only")
    assert reference["train_tokens"] > 0
    difference = reference["nll"] - run["states"]["both"]["nll"]
    assert math.isclose(reference["difference"]["value"], difference, abs_tol=1e-9)
    options = AuditOptions(None, None, 64, 200, 4, 8, 0, 50)
    windows, _ = read_text([inspect(str(pair[1]))], options, 64)
    with torch.no_grad():
        model = load_model(str(pair[1]))
        scores = score_documents(model, windows, beyond=None, batch_size=8, tick=lambda: None)
    assert math.isclose(reference["nll"], scores.nll.sum() / scores.tokens.sum(), rel_tol=1e-6)
    assert not math.isclose(reference["nll"], report["donor"]["nll"], rel_tol=1e-6)  # the adapters are on
    assert "lora-only" in done.stdout
    assert "lora-only" in (out / "audit.md").read_text()
    assert "lora-only" in (out / "audit.html").read_text()


def test_order_does_not_matter(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, models in (("one", pair), ("two", pair[::-1])):
        done = cli("audit", *models, "--output", tmp_path / name, "--context-length", 64, "--resamples", 20)
        assert done.exit_code == 0, done.output
    one, two = ((tmp_path / name / "audit.json").read_text() for name in ("one", "two"))
    assert one == two


def test_a_reference_alone_is_refused(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = cli("audit", pair[1], "--output", tmp_path / "audit")
    assert done.exit_code == 2
    assert "expected at least one hybrid" in done.stderr
    assert not (tmp_path / "audit" / "audit.json").exists()


def test_a_reference_of_another_donor_is_refused(
    cli: Cli, convert: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from support import tiny_model, tiny_tokenizer

    other = tmp_path / "other"
    tiny_model("llama", vocab_size=300, seed=7).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    assert convert("lora-only", source=other, output=tmp_path / "else").exit_code == 0
    done = cli("audit", pair[0], tmp_path / "else", "--output", tmp_path / "audit")
    assert done.exit_code == 2
    assert "models of one donor" in done.stderr
