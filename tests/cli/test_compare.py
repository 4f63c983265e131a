"""`equipoise compare`: audits in, one comparison out, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from equipoise.audit.report import AuditReport, Donor, Layers, Metric, RunFacts, audit_run, to_json
from equipoise.statistics import ScoreTable

from .conftest import Cli

Plant = Callable[..., Path]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Write an audit of one run whose linear branch recovers `linear`; returns its directory."""

    def make(recipe: str, seed: int, linear: float, *, text: str = "text") -> Path:
        tokens = np.linspace(200, 900, 30)
        rng = np.random.default_rng(seed + round(100 * linear))
        difficulty = np.random.default_rng(0).normal(0, 0.4, 30)
        shares = {
            "softmax": 1,
            "none": 0,
            "sinks": 0,
            "both": 0.95,
            "window": 0.9,
            "window_renormalised": 0.9,
        }
        shares |= {"linear": 0.1, "linear_renormalised": linear}
        nll = {
            state: tokens * (6 - 3 * share + difficulty + (state in ("both", "linear_renormalised")) * noise)
            for state, share in shares.items()
            for noise in [rng.normal(0, 0.02, 30)]
        }
        table = ScoreTable.from_nll(nll, tokens)
        facts = RunFacts(state_bytes=1000, reach=9, train_tokens=1, train_seconds=1.0, layers=Layers())
        run = audit_run(
            table, recipe=recipe, seed=seed, has_window=True, has_linear=True, facts=facts,
            benefit_reason="not scored", resamples=50,
        )  # fmt: skip
        report = AuditReport(
            donor=Donor.of(table, name="tiny", resamples=50), runs=(run,),
            metric=Metric.of(table, context_length=64, data=text, resamples=50),
        )  # fmt: skip
        place = tmp_path / f"{recipe}-{seed}"
        place.mkdir()
        (place / "audit.json").write_text(to_json(report), encoding="utf-8")
        return place

    return make


def test_merges_seeds_and_recipes(cli: Cli, plant: Plant, tmp_path: Path) -> None:
    runs = [
        plant(recipe, seed, share) for recipe, share in (("ssd", 0.6), ("lolcats", 0.2)) for seed in range(3)
    ]
    runs[0] /= "audit.json"  # the file will do
    out = tmp_path / "out"
    done = cli("compare", *runs, "--output", out, "--judge", "linear_alone", "--resamples", 500)
    assert done.exit_code == 0, done.stderr
    assert "Best by linear alone: ssd, 60." in done.stdout
    assert "differs from every other row" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:8])) <= 100
    data = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert [(row["name"], row["seeds"]) for row in data["rows"]] == [
        ("ssd", [0, 1, 2]),
        ("lolcats", [0, 1, 2]),
    ]
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.md", "compare.html"}


def test_json_on_stdout_is_the_whole_comparison(cli: Cli, plant: Plant, tmp_path: Path) -> None:
    done = cli("compare", plant("ssd", 0, 0.5), "--output", tmp_path / "out", "--resamples", 100, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["name"] == "ssd"


def test_names_tell_runs_of_one_recipe_apart(cli: Cli, plant: Plant, tmp_path: Path) -> None:
    first = plant("ssd", 0, 0.5)
    second = first.rename(tmp_path / "elsewhere")
    first = plant("ssd", 0, 0.3)
    done = cli("compare", first, second, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "one run of ssd with seed 0, got two" in done.stderr
    done = cli("compare", f"low={first}", f"high={second}", "--output", tmp_path / "out", "--resamples", 100)
    assert done.exit_code == 0, done.stderr
    data = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert {row["name"] for row in data["rows"]} == {"low", "high"}


def test_a_path_with_an_equals_sign_is_a_path(cli: Cli, plant: Plant, tmp_path: Path) -> None:
    place = plant("ssd", 0, 0.5).rename(tmp_path / "window=8")
    done = cli("compare", place, "--output", tmp_path / "out", "--resamples", 100)
    assert done.exit_code == 0, done.stderr


def test_refusals_exit_2_and_leave_nothing(cli: Cli, plant: Plant, tmp_path: Path) -> None:
    one, two, out = plant("ssd", 0, 0.5), plant("ssd", 1, 0.5, text="other"), tmp_path / "out"
    for arguments, told in (
        ((one, two), "differ in data (text and other)"),
        ((tmp_path / "none",), "expected a directory with an audit.json"),
        ((f"={one}",), "expected NAME=RUN"),
        ((one, "--judge", "linear_alon"), "Did you mean 'linear_alone'"),
        ((one, "--resamples", 5), "100"),
    ):
        done = cli("compare", *arguments, "--output", out)
        assert done.exit_code == 2, done.output
        assert told in " ".join(done.stderr.split())
        assert not out.exists()


def test_help_fits_a_screen(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("compare", "--help")
    assert "\n  equipoise compare" in done.stdout
    assert len(done.stdout.splitlines()) <= 32
