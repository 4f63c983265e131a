"""`equipoise recall` on tiny conversions: files, numbers of items, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from equipoise.cli import app

from .conftest import Cli

QUICK = ("--tasks", "passkey,multivalue", "--lengths", "300", "--needles", 4, "--examples", 2,
         "--resamples", 20)  # fmt: skip


@pytest.fixture(scope="module")
def models(donor: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two conversions of the tiny donor, nothing trained."""
    folder = tmp_path_factory.mktemp("hybrids")
    for recipe in ("zero-shot", "swa-sinks"):
        extra = ["--set", "transfer=null"] if recipe == "zero-shot" else []
        done = CliRunner().invoke(
            app,
            ["convert", str(donor), "--recipe", recipe, "--output", str(folder / recipe), "--data",
             str(corpus), "--set", "hybrid.window=8", *extra],
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
    return {recipe: folder / recipe for recipe in ("zero-shot", "swa-sinks")}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = (json.dumps({"body": f"the quick brown fox number {i} jumps\n" * 20}) for i in range(6))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_recall_writes_curves_numbers_and_items(
    cli: Cli, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "recall"
    done = cli(
        "recall", models["zero-shot"], models["swa-sinks"], "--output", out, "--data", text,
        "--text-column", "body", *QUICK,
        "--branches", "softmax,both,swa_sinks_equal_bytes", "--tasks", "passkey,multikey",
        "--lengths", "300,340",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "Within and beyond reach" in done.stdout
    assert str(out / "recall.html") in done.stdout
    data = json.loads((out / "recall.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in data["runs"]] == ["zero-shot", "swa-sinks"]
    assert len(data["items"]) == 2 * 2 * 2
    assert {item["length"] for item in data["items"]} == {300, 340}
    states = data["groups"][0]["states"]
    assert states["both"]["reach"] == 14
    assert states["softmax"]["reach"] is None
    assert states["swa_sinks_equal_bytes"]["window"] > 8
    assert data["settings"]["settings"]["needles"] == 4
    assert "<svg" in (out / "recall.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--tasks", "paskey"), 2, "Did you mean 'passkey'"),
        (("--branches", "both,windw"), 2, "Did you mean 'window'"),
        (("--lengths", "300,9000"), 2, "expected at most 512, the donor's context, got 9000"),
        (("--lengths", "300,many"), 2, "--lengths: expected different numbers"),
        (("--lengths", "40"), 2, "length of at least"),
        (("--wording", "pairs"), 2, "cannot be said in bare pairs"),
        (("--options", "2"), 2, "several answers at once"),
        (("--text-column", "nothing"), 1, "expected a column 'nothing'"),
    ],
)
def test_mistakes_are_explained(
    cli: Cli, models: dict[str, Path], text: Path, tmp_path: Path,
    options: tuple[str, ...], code: int, words: str,
) -> None:  # fmt: skip
    out = tmp_path / "recall"
    done = cli(
        "recall",
        models["swa-sinks"],
        "--output",
        out,
        "--data",
        text,
        "--text-column",
        "body",
        *QUICK,
        *options,
    )
    assert (done.exit_code, words in done.stderr) == (code, True), done.stderr
    assert not out.exists()


def test_a_model_without_a_tokenizer_or_branches_is_refused(
    cli: Cli, models: dict[str, Path], donor: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(models["swa-sinks"], bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    done = cli("recall", bare, "--output", tmp_path / "out", *QUICK)
    assert (done.exit_code, "no tokenizer" in done.stderr) == (1, True), done.stderr
    done = cli("recall", donor, "--output", tmp_path / "out", *QUICK)
    assert (done.exit_code, "expected a converted model" in done.stderr) == (2, True), done.stderr


def test_help_fits_a_screen_and_has_an_example(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("recall", "--help")
    assert done.exit_code == 0
    assert "\n  equipoise recall" in done.stdout
    assert len(done.stdout.splitlines()) <= 48


def test_the_demo_checks_its_seeds_first(cli: Cli, tmp_path: Path) -> None:
    done = cli("recall-demo", "--output", tmp_path / "out", "--seeds", "0,0")
    assert (done.exit_code, "different whole numbers" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
