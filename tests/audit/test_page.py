"""An audit for people: a page that holds every figure and takes no injection, and a table that fits."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from equipoise.audit import plots
from equipoise.audit.page import audit_page
from equipoise.audit.plots import MANY, attribution_chart, recovered_chart
from equipoise.audit.render import console_table, summary
from equipoise.audit.report import AuditReport, Reference, to_dict
from equipoise.pages import Cards, Figures, Table, Terms, Text, render_html, render_markdown
from equipoise.statistics import Estimate
from sample_audit import PATTERNS, make_report


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return make_report()


@pytest.fixture(scope="module")
def page(report: AuditReport) -> str:
    return render_html(audit_page(report))


def with_run(report: AuditReport, index: int, **changes: Any) -> AuditReport:
    """A report of one of its runs, changed."""
    return replace(report, runs=[replace(report.runs[index], **changes)])


def test_order_of_the_page(report: AuditReport) -> None:
    kinds = [type(section) for section in audit_page(report).sections]
    assert kinds == [Figures, Table, Cards, Terms]


def test_every_figure_of_a_run_is_on_the_page_and_in_the_data(report: AuditReport) -> None:
    runs = next(section for section in audit_page(report).sections if isinstance(section, Cards)).details
    data = to_dict(report)["runs"]
    assert [card.title for card in runs] == list(PATTERNS)
    for card, run, known in zip(runs, report.runs, data, strict=True):
        assert run.verdict.advice in card.lead
        words = [
            paragraph for part in card.sections if isinstance(part, Text) for paragraph in part.paragraphs
        ]
        assert run.verdict.reason in words
        assert "1.5 MiB" in " ".join(words)
        assert "252 tokens" in " ".join(words)
        shown = {
            float(cell.key)
            for part in card.sections if isinstance(part, Table)
            for row in part.cells for cell in row if cell.key
        }  # fmt: skip
        figures = set(
            _figures({name: known[name] for name in ("states", "recovered", "attribution", "control")})
        )
        assert figures - shown == set()
        assert shown - figures == {1.0, report.donor.nll.value}  # the donor's row


def _figures(value: Any) -> Iterator[float]:
    """Values and likelihoods, not the bounds of their intervals; of a control no sizes."""
    if isinstance(value, list):
        for part in value:
            yield from _figures(part)
    if isinstance(value, dict):
        for name, part in value.items():
            if name in ("nll", "value") and isinstance(part, float):
                yield part
            elif name != "ci95":
                yield from _figures(part)


def test_plotted_figures_are_in_the_data(report: AuditReport, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setattr(plots, "_draw", lambda axes, y, value, bar, limits: drawn.append(value.value))
    audit_page(report)
    assert len(drawn) == len(report.runs) * 12
    assert set(drawn) <= set(_figures(to_dict(report)))


def test_references_are_compared(report: AuditReport) -> None:
    other = Reference(
        name="lora-only", train_tokens=1_234, nll=Estimate(3.111, (3.0, 3.2)),
        recovered=Estimate(0.987, (0.98, 0.99)), difference=Estimate(-0.222, (-0.3, -0.1)),
    )  # fmt: skip
    text = render_markdown(audit_page(with_run(report, 3, references=(other,))))
    assert "| softmax, lora-only (1,234 tokens) | – | 3.111 [3.000, 3.200] |" in text
    assert "-0.222 [-0.300, -0.100]" in text


def test_the_page_says_what_matters(page: str) -> None:
    for text in ("lolcats", "collapsed", "untested", "Literal and renormalised", "Reach", "1.5%"):
        assert text in page
    assert page.count("<svg") == 2


def test_undefined_figures_are_dashes(report: AuditReport) -> None:
    run = report.runs[3]
    nothing = Estimate(math.nan, (-math.inf, math.inf))
    text = render_markdown(audit_page(with_run(report, 3, recovered={**run.recovered, "both": nothing})))
    row = next(line for line in text.splitlines() if line.startswith("| ssd |"))
    assert row.split(" | ")[3] == "–"


def test_recipe_names_cannot_inject() -> None:
    evil = "<script>alert(1)</script>|$\\frac$ [red] \"' --> 漢 `<b>`"
    report = make_report({evil: PATTERNS["ssd"]})
    page = render_html(audit_page(report))
    assert "<script>alert" not in page
    assert "<b>`" not in page
    assert page.count("<script") == 1
    text = render_markdown(audit_page(report))
    assert "<script" not in text.replace("\\<", "")
    table = text[text.index("## Runs") : text.index("## Run by run")]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "[red]" in _printed(report).replace("\n", "")


def test_markdown_holds_every_run(report: AuditReport) -> None:
    text = render_markdown(audit_page(report))
    assert text.startswith("# Which branch does the work?\n")
    assert "tiny-donor" in text
    assert all(f"### {run.recipe}: " in text for run in report.runs)
    assert "&#39;" not in text
    assert "| lolcats | collapsed, untested |" in text


def test_charts_are_reproducible_and_survive_outliers(report: AuditReport) -> None:
    labels = [run.recipe for run in report.runs]
    assert recovered_chart(report, labels) == recovered_chart(report, labels)
    far = {
        **report.runs[1].recovered,
        "linear": Estimate(-40.0, (-50.0, -30.0)),
        "window": Estimate(math.nan, (0.0, 1.0)),
    }
    outlier = with_run(report, 1, recovered=far)
    assert "40.00" in recovered_chart(outlier, ["x"])
    assert attribution_chart(outlier, ["x"]).startswith("<svg")


def test_many_runs_have_smaller_charts_and_say_so(report: AuditReport) -> None:
    run = report.runs[1]
    many = replace(report, runs=[replace(run, seed=seed) for seed in range(MANY)])
    few = replace(report, runs=many.runs[:-1])
    assert "literal" not in recovered_chart(many, ["x"] * MANY)
    assert "literal" in recovered_chart(few, ["x"] * (MANY - 1))
    assert "literal reading is shown run by run" in render_markdown(audit_page(many))
    assert "literal reading is shown run by run" not in render_markdown(audit_page(few))


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


def test_the_summary_names_verdicts_first_and_seeds_where_they_differ(report: AuditReport) -> None:
    window, lolcats, _, ssd, _ = report.runs
    seeds = [replace(lolcats, seed=1), replace(lolcats, seed=2), replace(ssd, recipe="lolcats", seed=0)]
    mixed = summary(replace(report, runs=[*seeds, window, replace(window, seed=1)]))
    assert mixed.startswith("In lolcats (seed 0), both branches carry the work.")
    assert "In lolcats (seeds 1 and 2), the window does all the work" in mixed
    assert "In swa-sinks (all 2 seeds), there is only a window." in mixed
    assert "beats an untrained window of equal bytes in lolcats (seed 0)." in mixed
    assert "The best likelihood is that of lolcats (seed 1)" in mixed
    alone = summary(replace(report, runs=[lolcats]))
    assert "seed" not in alone
    assert "It scores 3." in alone
    assert "was not tested here" in alone
