"""Reports: a fixed JSON layout, a self-contained page that takes no injection, files that appear at once."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from equipoise.audit.plots import attribution_chart, recovered_chart
from equipoise.audit.render import render_html, render_markdown, size, summary
from equipoise.audit.report import (
    AuditReport,
    ControlSetting,
    Donor,
    Layers,
    Metric,
    RunFacts,
    audit_run,
    console_table,
    to_dict,
    to_json,
    validate_audit,
    write_audit,
)
from equipoise.statistics import Estimate, ScoreTable

DONOR, NONE = 3.0, 6.0
# Recovered shares: both, window literal and renormalised, linear literal and renormalised.
PATTERNS = {
    "swa-sinks": (0.93, 0.93, 0.93, 0.0, 0.0),
    "lolcats": (0.96, 0.956, 0.96, -0.05, -0.54),
    "hedgecats": (0.926, 0.83, 0.96, 0.18, 0.52),
    "ssd": (0.95, 0.80, 0.91, 0.35, 0.63),
    "dead-but-used": (0.85, 0.60, 0.62, 0.0, 0.01),
}


def scores(pattern: tuple[float, ...], *, seed: int = 0, documents: int = 40) -> ScoreTable:
    both, s0, s1, l0, l1 = pattern
    shares = {"softmax": 1.0, "none": 0.0, "sinks": 0.04, "both": both, "window": s0, "linear": l0}
    shares |= {"window_renormalised": s1, "linear_renormalised": l1, "swa_sinks_equal_bytes": 0.945}
    rng = np.random.default_rng(seed)
    tokens = rng.integers(200, 1000, documents).astype(float)
    difficulty = rng.normal(0, 0.4, documents)
    nll = {
        state: tokens * (NONE - share * (NONE - DONOR) + difficulty + rng.normal(0, 0.01, documents))
        for state, share in shares.items()
    }
    if s1 == both:  # no linear branch: the same forward pass, not the same value twice
        nll["window"] = nll["window_renormalised"] = nll["both"]
    return ScoreTable.from_nll(nll, tokens)


def facts() -> RunFacts:
    layers = Layers(converted=(0, 1, 3), local=(2,), softmax=())
    return RunFacts(
        state_bytes=1_572_864, reach=252, train_tokens=1_000_000, train_seconds=62.5, layers=layers
    )


def make_report(patterns: dict[str, tuple[float, ...]] = PATTERNS) -> AuditReport:
    runs = [
        audit_run(
            scores(pattern),
            recipe=recipe,
            seed=0,
            has_window=True,
            has_linear=recipe != "swa-sinks",
            facts=facts(),
            control=None
            if recipe == "swa-sinks"
            else ControlSetting(window=144, sinks=4, state_bytes=1_500_000),
            benefit_difference=Estimate(0.21, (0.14, 0.28)) if recipe == "ssd" else None,
            benefit_reason=None if recipe == "ssd" else "no item was scored beyond both reaches",
            resamples=200,
        )
        for recipe, pattern in patterns.items()
    ]
    table = scores(next(iter(patterns.values())))
    return AuditReport(
        donor=Donor(
            name="tiny-donor", nll=Donor.of(table, name="x", resamples=200).nll, extra={"revision": None}
        ),
        metric=Metric.of(table, context_length=1024, data="held-out standard library sources", resamples=200),
        runs=runs,
        equipoise_version="0.1.0",
    )


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return make_report()


@pytest.fixture(scope="module")
def page(report: AuditReport) -> str:
    return render_html(report)


def test_verdicts_come_from_the_scores(report: AuditReport) -> None:
    uses = {run.recipe: run.verdict.use for run in report.runs}
    assert uses == {
        "swa-sinks": "window_only",
        "lolcats": "collapsed",
        "hedgecats": "balanced",
        "ssd": "balanced",
        "dead-but-used": "imbalanced",
    }


def test_json_round_trips_and_validates(report: AuditReport) -> None:
    audit = json.loads(to_json(report))
    validate_audit(audit)
    assert audit == to_dict(report)
    run = audit["runs"][1]
    assert run["states"]["none"]["nll"] > run["states"]["both"]["nll"]
    assert run["recovered"]["linear_renormalised"]["value"] == pytest.approx(-0.54, abs=0.01)
    control = run["control"]
    assert control["difference"]["value"] == pytest.approx(control["nll"] - run["states"]["both"]["nll"])
    assert audit["runs"][0]["control"] is None
    assert audit["donor"]["revision"] is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("runs",), []),
        (("runs", 0, "verdict", "use"), "great"),
        (("runs", 0, "states", "both", "nll"), None),
        (("runs", 0, "states", "both", "ci95"), [1.0]),
        (("runs", 0, "surprise"), 1),
        (("metric", "interval"), 0.9),
    ],
)
def test_schema_rejects(report: AuditReport, path: tuple[str | int, ...], value: object) -> None:
    audit = json.loads(to_json(report))
    target = audit
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ValueError, match="violation"):
        validate_audit(audit)


def test_schema_wants_every_state(report: AuditReport) -> None:
    audit = json.loads(to_json(report))
    del audit["runs"][0]["recovered"]["linear_renormalised"]
    with pytest.raises(ValueError, match="runs/0/recovered"):
        validate_audit(audit)


def test_undefined_figures_are_null_and_unmeasured_ones_an_error(report: AuditReport) -> None:
    run = report.runs[0]
    nothing = Estimate(math.nan, (-math.inf, math.inf))
    gaps = replace(report, runs=[replace(run, recovered={**run.recovered, "both": nothing})])
    audit = json.loads(to_json(gaps))
    validate_audit(audit)
    assert audit["runs"][0]["recovered"]["both"] == {"value": None, "ci95": [None, None]}
    assert "–" in render_html(gaps)
    broken = replace(report, runs=[replace(run, states={**run.states, "both": nothing})])
    with pytest.raises(ValueError, match="finite NLL"):
        to_dict(broken)


def test_empty_reports_and_shadowed_fields_are_refused(report: AuditReport) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        to_dict(replace(report, runs=[]))
    with pytest.raises(ValueError, match="rename"):
        to_dict(replace(report, donor=replace(report.donor, extra={"nll": 0.0})))


def test_only_likelihoods_are_reported() -> None:
    table = replace(scores(PATTERNS["ssd"]), metric="accuracy")
    with pytest.raises(ValueError, match="'accuracy'"):
        audit_run(
            table, recipe="x", seed=0, has_window=True, has_linear=True, facts=facts(), benefit_reason="none"
        )


def test_a_control_must_be_measured() -> None:
    with pytest.raises(KeyError, match="missing_control"):
        audit_run(
            scores(PATTERNS["ssd"]), recipe="x", seed=0, has_window=True, has_linear=True, facts=facts(),
            benefit_reason="none", resamples=5,
            control=ControlSetting(window=1, sinks=0, state_bytes=1, state="missing_control"),
        )  # fmt: skip


class _Links(HTMLParser):
    """Collects what a page would load or follow, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data", "action"}
        ]
        if tag not in {"meta", "br", "link", "img"}:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_the_page_stands_alone(page: str) -> None:
    parser = _Links()
    parser.feed(page)
    assert not parser.stack
    assert {link for link in parser.links if not link.startswith("#")} == {"audit.json", "audit.md"}
    assert parser.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert page.count("<svg") == 2


def test_the_page_says_what_matters(page: str) -> None:
    for text in (
        "lolcats",
        "collapsed",
        "untested",
        "prefers-color-scheme",
        "Literal and renormalised",
        "Reach",
    ):
        assert text in page


def test_recipe_names_cannot_inject() -> None:
    evil = "<script>alert(1)</script>|$\\frac$ [red] \"' --> 漢"
    report = make_report({evil: PATTERNS["ssd"]})
    assert "<script" not in render_html(report)
    text = render_markdown(report)
    assert "<script" not in text.replace("\\<", "")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "[red]" in _printed(report).replace("\n", "")


def test_markdown_holds_every_run(report: AuditReport) -> None:
    text = render_markdown(report)
    assert text.startswith("# Which branch does the work? tiny-donor\n")
    assert all(f"## {run.recipe.replace('_', chr(92) + '_')}" in text for run in report.runs)
    assert "&#39;" not in text
    assert "| lolcats | collapsed, untested |" in text


def test_charts_are_reproducible_and_survive_outliers(report: AuditReport) -> None:
    labels = [run.recipe for run in report.runs]
    assert recovered_chart(report, labels) == recovered_chart(report, labels)
    run = report.runs[1]
    far = {
        **run.recovered,
        "linear": Estimate(-40.0, (-50.0, -30.0)),
        "window": Estimate(math.nan, (0.0, 1.0)),
    }
    outlier = replace(report, runs=[replace(run, recovered=far)])
    assert "40.00" in recovered_chart(outlier, ["x"])
    assert attribution_chart(outlier, ["x"]).startswith("<svg")


def _printed(report: AuditReport) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    with console.file:
        console.print(console_table(report))
    return console.export_text()


def test_the_console_table_fits(report: AuditReport) -> None:
    lines = _printed(report).splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert all(run.recipe in text for run in report.runs)
    assert "…" not in text


def test_seeds_are_named_where_a_recipe_repeats(report: AuditReport) -> None:
    run = report.runs[1]
    twice = replace(report, runs=[run, replace(run, seed=1), report.runs[3]])
    assert "lolcats (seed 0) and lolcats (seed 1)" in summary(twice)
    assert "ssd (seed" not in summary(twice)


def test_writing(report: AuditReport, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    paths = write_audit(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["audit.html", "audit.json", "audit.md"]
    validate_audit(json.loads(paths["json"].read_text(encoding="utf-8")))
    assert paths["json"].stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_report(
    report: AuditReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_audit(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_audit(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_that_cannot_be_rendered_writes_nothing(report: AuditReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_audit(replace(report, runs=[]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_are_binary() -> None:
    assert [size(count) for count in (12, 2048, 1_572_864)] == ["12 B", "2.0 KiB", "1.5 MiB"]
