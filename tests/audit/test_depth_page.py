"""Attribution in depth as JSON, Markdown and HTML."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.audit.depth import DepthSettings, RandomControl, attribute_depth
from equipoise.audit.depth_page import control_sentence, depth_page, summary
from equipoise.audit.depth_plots import heat_map
from equipoise.audit.depth_report import DepthReport, to_dict
from equipoise.audit.depth_units import likelihood
from equipoise.audit.measures import MEASURES, measure
from equipoise.config import HybridConfig
from equipoise.data.packing import EvaluationWindow
from equipoise.models.surgery import hybridize
from equipoise.pages import write_results
from equipoise.statistics import Estimate
from support import random_tokens, tiny_model


@pytest.fixture(scope="module")
def report() -> DepthReport:
    texts = []
    for index in range(3):
        ids = random_tokens(14, seed=index)
        texts.append(EvaluationWindow(document=index, start=0, input_ids=ids, labels=ids.clone()))
    model = hybridize(tiny_model(), HybridConfig(window=4))
    settings = DepthSettings(resamples=20, games=("window", "linear", "all"))
    return DepthReport(
        model="ssd", data="noise", context_length=14,
        depth=attribute_depth(model, likelihood(texts), settings),
        measures=measure(model, texts, resamples=20)[0],
    )  # fmt: skip


def test_files_hold_the_same_figures(report: DepthReport, tmp_path: Path) -> None:
    paths = write_results(tmp_path, "attribution", depth_page(report), to_dict(report))
    data = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert data["metric"]["documents"] == 3
    assert len(data["layers"]) == 2 * 2 * 2
    assert len(data["heads"]) == 2 * 16
    assert {(e["branch"], e["reading"]) for e in data["heads"]} == {
        (branch, reading) for branch in ("window", "linear") for reading in ("literal", "renormalised")
    }
    for game in data["shapley"]:
        total = sum(value["value"] for value in game["values"])
        assert total == pytest.approx(game["total"]["value"], abs=1e-9)
        assert game["standard_errors_trusted"]
    assert {one["name"] for one in data["measures"]} == set(MEASURES)
    assert len(data["random_layers"]) == 4
    assert data["random_layers"][0]["answer"] in ("more", "less", "no clear difference")
    html, text = (paths[suffix].read_text(encoding="utf-8") for suffix in ("html", "md"))
    # a map for cost and gain of each branch and reading, one for each measure, 4 bar charts
    assert html.count("<svg") == 8 + len(MEASURES) + 4
    for page in (html, text):
        for words in ("Where do the branches work?", "literal", "renormalised", "Is it this branch"):
            assert words in page
    assert "than removing random ones" in text


def test_summary_names_the_dearest_layer(report: DepthReport) -> None:
    mine = [e for e in report.depth.layers if (e.unit.branch, e.reading) == ("linear", "renormalised")]
    top = max(mine, key=lambda effect: effect.cost.value)
    where = f"most in layer {top.unit.layer}: {top.cost.value:.3f}"
    for low, words in (
        (0.01, "the linear branch is missed"),
        (-0.01, "the linear branch is clearly missed in none;"),
    ):
        cost = Estimate(top.cost.value, (low, 1.0))
        layers = [replace(effect, cost=cost) if effect is top else effect for effect in report.depth.layers]
        changed = replace(report, depth=replace(report.depth, layers=layers))
        assert f"{words} {where}" in summary(changed)


def control(cost: float, answer: Any, draws: list[float]) -> RandomControl:
    excess = None if not draws else Estimate(0.1, (0.05, 0.15))
    return RandomControl(
        branch="linear", reading="literal", removed=4, units=8, cost=Estimate(cost, (cost, cost)),
        draws=draws, excess=excess, answer=answer,
    )  # fmt: skip


def test_control_in_words() -> None:
    words = control_sentence(control(0.5, "more", [0.2, 0.4]), "nats/token")
    assert "costs 0.500 [0.500, 0.500] nats/token, more than removing random ones" in words
    assert "4 random of 8 branches costs 0.300 (0.200 to 0.400 over 2 draws)" in words
    assert "less than" in control_sentence(control(0.1, "less", [0.2]), "nats/token")
    assert "neither clearly more nor less" in control_sentence(
        control(0.1, "no clear difference", [0.2]), "nats/token"
    )
    assert "cannot be compared" in control_sentence(control(0.1, None, []), "nats/token")


def test_sampled_values_say_how_well_they_are_known(report: DepthReport, tmp_path: Path) -> None:
    game = replace(
        report.depth.shapley[0], stopped_by="budget", pairs=3, evaluations=20, trusted=False,
        standard_errors=[0.01, 0.02], tolerance=0.005,
    )  # fmt: skip
    page = depth_page(replace(report, depth=replace(report.depth, shapley=[game])))
    paths = write_results(tmp_path, "attribution", page, {})
    text = paths["md"].read_text(encoding="utf-8")
    assert "3 pairs of permutations" in text
    assert "largest standard error 0.0200, stopped by budget (wanted: 0.0050)" in text
    assert "raise the budget" in text


def test_maps_are_equal_for_equal_figures_and_survive_holes() -> None:
    values = [[0.1, -0.2, math.nan], [0.0, 0.3, 0.4]]
    one, again = (heat_map(values, [2, 5], unit="nats", salt="a", signed=True) for _ in range(2))
    assert one == again
    assert one.startswith("<svg")
    assert heat_map([[math.nan]], [0], unit="nats", salt="a", signed=False).startswith("<svg")
    assert heat_map([[0.0] * 40] * 40, list(range(40)), unit="nats", salt="a", signed=True).startswith("<svg")


def test_what_is_missing_is_said(report: DepthReport, tmp_path: Path) -> None:
    page = depth_page(replace(report, measures=(), missing="the adapters are merged"))
    text = write_results(tmp_path, "attribution", page, {})["md"].read_text(encoding="utf-8")
    assert "the adapters are merged" in text
