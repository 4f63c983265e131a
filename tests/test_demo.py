"""The embedded default: small enough to check its plumbing, and once in full for the pattern it must show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from equipoise.audit.report import validate_audit
from equipoise.demo import RECIPES, demo_recipe, run_demo
from equipoise.demo_donor import DonorSettings
from equipoise.train.convert import OutputError

STATES = {"both", "window", "linear", "none", "sinks", "window_renormalised", "linear_renormalised"}


def test_every_trained_recipe_sees_the_same_tokens_at_the_same_rates() -> None:
    runs = [demo_recipe(name, 40) for name in RECIPES]
    trained = [run for run in runs if run.transfer is not None]
    assert len(trained) == 4
    for run in trained:
        stages = [stage for stage in (run.transfer, run.finetune) if stage is not None]
        assert sum((stage.max_steps or 0) * stage.batch_size for stage in stages) == 40 * 8
        assert run.hybrid is not None
        assert run.hybrid.window == 64
    assert len({run.transfer.learning_rate for run in trained if run.transfer}) == 1
    assert len({run.finetune.learning_rate for run in trained if run.finetune}) == 1


def test_somebody_elses_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(OutputError, match="not empty"):
        run_demo(tmp_path, console=Console(quiet=True))
    assert (tmp_path / "thesis.txt").read_text() == "three years"


@pytest.mark.slow
def test_the_plumbing_with_a_barely_trained_donor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    settings = DonorSettings(steps=6, hidden_size=32, intermediate_size=64, layers=2, heads=2, batch_size=2)
    place = tmp_path / "demo"
    for _ in range(2):  # the second time over the first, with the donor from the cache
        run_demo(place, console=Console(quiet=True), settings=settings, budget=4)
    found = json.loads((place / "audit.json").read_text(encoding="utf-8"))
    validate_audit(found)
    assert [run["recipe"] for run in found["runs"]] == list(RECIPES)
    assert all(set(run["states"]) >= STATES for run in found["runs"])
    assert len(list((tmp_path / "cache" / "donors").glob("*/config.json"))) == 1
    assert "<svg" in (place / "audit.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_published_pattern_shows(tmp_path: Path) -> None:
    """`make demo` itself: LoLCATs collapses, the remedies do not (arXiv 2510.05901, tables 1 to 4)."""
    report = run_demo(tmp_path / "demo", console=Console(quiet=True))
    runs = {run.recipe: run for run in report.runs}
    lolcats = runs["lolcats"]
    assert lolcats.verdict.use == "collapsed"
    assert abs(lolcats.states["window_renormalised"].value - lolcats.states["both"].value) < 0.03
    assert abs(lolcats.states["linear"].value - lolcats.states["none"].value) < 0.1
    for recipe in ("zero-shot", "hedgecats", "ssd"):
        low, _ = runs[recipe].recovered["linear_renormalised"].ci95
        assert runs[recipe].verdict.use != "collapsed"
        assert low > 0.33
    assert runs["swa-sinks"].verdict.use == "window_only"
