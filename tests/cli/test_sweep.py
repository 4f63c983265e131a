"""`equipoise sweep`: lists, plans, runs, and says what failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from equipoise import sweep as sweep_module

from .conftest import Cli


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


TWO_WINDOWS = """
summary: Which window?
recipe: zero-shot
base: {data.context_length: 64, transfer.max_steps: 2}
axes: {hybrid.window: [4, 8]}
seeds: [0]
audit: {documents: 6}
"""


def test_alone_it_lists_what_ships(cli: Cli) -> None:
    done = cli("sweep")
    assert done.exit_code == 0, done.stderr
    assert "activation (15 cells): Which feature map" in done.stdout
    assert "base" not in done.stdout.replace("baseline", "")


def test_dry_run_lists_rows_and_runs_nothing(cli: Cli, tmp_path: Path) -> None:
    done = cli("sweep", "objectives", "--dry-run", "--seeds", "4,5", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "4 rows × 2 seeds (4, 5) = 8 cells" in done.stdout
    assert 'output: transfer; transfer.objectives {"output": 1000.0}' in done.stdout
    assert "untrained: nothing trained" in done.stdout
    assert not (tmp_path / "out").exists()


def test_scale_goes_with_the_donor_or_by_name(cli: Cli, tmp_path: Path) -> None:
    name = write(
        tmp_path, "recipe: zero-shot\naxes: {hybrid.sinks: [0, 1]}\n"
        "variants: [{name: a}, {name: b, recipe: ssd}]\n"
        "scales: {demo: {transfer.epochs: 3}, big: {transfer.epochs: 7}}",
    )  # fmt: skip

    def epochs(*options: object) -> set[str]:
        done = cli("sweep", name, "--dry-run", *options)
        assert done.exit_code == 0, done.stderr
        return {word for word in ("1.0", "2.0", "3.0", "7.0") if f"transfer.epochs {word}" in done.stdout}

    assert epochs() == set()  # equal in all rows: 3
    assert epochs("--donor", "gpt") == {"1.0", "2.0"}
    assert epochs("--donor", "gpt", "--scale", "big") == set()
    done = cli("sweep", name, "--dry-run", "--scale", "bigger")
    assert done.exit_code == 2
    assert "Did you mean 'big'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("activation",), "expected --output DIR"),
        (("activatoin", "--dry-run"), "Did you mean 'activation'"),
        (("activation", "--dry-run", "--seeds", "1,1"), "different whole numbers"),
        (("activation", "--dry-run", "--set", "hybrid.feature_map=exp"), "is an axis"),
        (("activation", "--dry-run", "--set", "hybrid.windwo=8"), "Did you mean 'window'"),
        (("activation", "--donor", "./nowhere", "--output", "out"), "nowhere"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = cli("sweep", *(str(tmp_path / a) if a == "out" else a for a in arguments))
    assert done.exit_code in (1, 2)
    assert told in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_runs_and_compares(cli: Cli, donor: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("sweep", write(tmp_path, TWO_WINDOWS), "--donor", donor, "--data", corpus, "--output", out)
    done = cli(*command)
    assert done.exit_code == 0, done.stderr
    assert "cell 2 of 2: window=8, seed 0" in done.stderr
    assert "window=8" in done.stdout
    assert len(json.loads((out / "compare.json").read_text(encoding="utf-8"))["rows"]) == 2
    done = cli(*command)
    assert "2 of 2 cells are done already" in done.stderr
    done = cli(*command, "--set", "transfer.max_steps=1")
    assert done.exit_code == 2
    assert "--redo" in done.stderr
    audits = sorted((out / "cells").iterdir())
    done = cli("compare", *audits, "--output", tmp_path / "again", "--resamples", 100)
    assert done.exit_code == 0, done.stderr


@pytest.mark.slow
def test_failures_exit_1_after_the_comparison(
    cli: Cli, donor: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = sweep_module.convert

    def failing(donor: str, run: Any, output: Path, **options: Any) -> Any:
        if run.hybrid.window == 4:
            raise RuntimeError("out of luck")
        return convert(donor, run, output, **options)

    monkeypatch.setattr(sweep_module, "convert", failing)
    out = tmp_path / "out"
    done = cli("sweep", write(tmp_path, TWO_WINDOWS), "--donor", donor, "--data", corpus, "--output", out)
    assert done.exit_code == 1
    assert "1 of 2 cells failed" in done.stderr
    assert "window=4-seed0: RuntimeError: out of luck" in done.stderr
    assert (out / "compare.html").is_file()


@pytest.mark.slow
def test_interrupted(
    cli: Cli, donor: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "convert", stopped)
    out = tmp_path / "out"
    done = cli("sweep", write(tmp_path, TWO_WINDOWS), "--donor", donor, "--data", corpus, "--output", out)
    assert done.exit_code == 130
    assert "goes on where this one stopped" in done.stderr


def test_help_fits_a_screen(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("sweep", "--help")
    assert "\n  equipoise sweep" in done.stdout
    assert len(done.stdout.splitlines()) <= 32
