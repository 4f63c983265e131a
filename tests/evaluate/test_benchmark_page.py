"""A benchmark run as JSON and as a page, from made-up scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from equipoise.evaluate.benchmark_page import BenchmarkRun, summary, to_data, to_page
from equipoise.evaluate.benchmarks import benchmark_table
from equipoise.evaluate.entries import Aggregate, Entry, TaskFacts
from equipoise.evaluate.scores import MetricScores, StateScores, TaskScores
from equipoise.evaluate.states import branch_state
from equipoise.pages import Table, render_html, render_markdown

SIZES = {"first": 40, "small": 10, "large": 30}
ENTRIES = (
    Entry(name="first", tasks=("first",)),
    Entry(name="mmlu", tasks=("small", "large"), aggregates=(Aggregate(metric="acc"),)),
)


def scores(share: float, *notes: str) -> StateScores:
    def task(count: int) -> TaskScores:
        right = (np.arange(count) < round(share * count)).astype(np.float64)
        metric = MetricScores(sums=right, weights=np.ones(count), chance=np.full(count, 0.25))
        return TaskScores(
            documents=("x",) * count, metrics={"acc,none": metric}, reported={"acc,none": share}
        )

    return StateScores(tasks={name: task(n) for name, n in SIZES.items()}, seconds=2.0, notes=notes)


def run(entries: tuple[Entry, ...] = ENTRIES, **shares: float) -> BenchmarkRun:
    shares = shares or {"softmax": 0.8, "both": 0.7, "window": 0.7, "none": 0.2}
    known = {name: scores(share) for name, share in shares.items()}
    known["both"] = scores(shares.get("both", 0.5), "Left truncation applied (3 times)")
    facts = {
        name: TaskFacts(
            version="1.5", output_type="multiple_choice", num_fewshot=5, documents=n, of=100, definition="d",
            data="e", dataset="json",
        )
        for name, n in SIZES.items()
    }  # fmt: skip
    return BenchmarkRun(
        model="out/ssd", states=tuple(branch_state(name) for name in known), scores=known, facts=facts,
        table=benchmark_table(entries, known, resamples=100),
        settings={"lm_eval": "0.4.13", "limit": 40, "resamples": 100},
    )  # fmt: skip


def tables(page: Any) -> dict[str, Table]:
    return {section.title: section for section in page.sections if isinstance(section, Table)}


def test_table_is_the_published_one() -> None:
    table = tables(to_page(run()))["Scores"]
    # the group on its own after the average, in which it counts once
    assert list(table.columns) == ["branch state", "first", "average", "mmlu", "recovered", "above chance"]
    names = [row[0].text for row in table.cells]
    assert names == ["softmax (donor)", "both", "window", "none", "guessing"]
    both = dict(zip(table.columns, table.cells[1], strict=True))
    assert both["average"].value == pytest.approx(0.7)
    assert both["recovered"].value == pytest.approx(0.7 / 0.8)
    assert both["above chance"].value == pytest.approx(0.45 / 0.55)
    assert "87.5% [" in both["recovered"].text
    guessing = dict(zip(table.columns, table.cells[-1], strict=True))
    assert (guessing["average"].text, guessing["recovered"].text) == ("25.0%", "–")


def test_difference_table() -> None:
    table = tables(to_page(run()))["Differences of the average"]
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in table.cells}
    assert cells["both"][0].startswith("+10.0 [")
    assert cells["window"][1] == "+0.0 [+0.0, +0.0]"


def test_single_column_has_no_average() -> None:
    made = run(ENTRIES[:1])
    assert list(tables(to_page(made))["Scores"].columns) == [
        "branch state",
        "first",
        "recovered",
        "above chance",
    ]
    assert "donor's score on first of 80.0%" in summary(made)


def test_without_a_donor_nothing_is_recovered() -> None:
    made = run(both=0.7, window=0.6)
    assert list(tables(to_page(made))["Scores"].columns) == ["branch state", "first", "average", "mmlu"]
    assert summary(made).startswith("`both`: average 70.0%")
    assert list(tables(to_page(made))["Differences of the average"].columns) == ["branch state", "below both"]


def test_summary_names_what_taking_the_linear_branch_away_costs() -> None:
    text = summary(run())
    assert "Recovered of the donor's average of 80.0%: `both` 87.5%" in text
    assert "Taking the linear branch away changes it by +0.0 [+0.0, +0.0] points." in text
    assert "-20.0" in summary(run(softmax=0.8, both=0.7, window=0.5))


def test_warnings_and_tasks_are_on_the_page() -> None:
    text = render_markdown(to_page(run()))
    assert "both: Left truncation applied (3 times)" in text
    assert "at most 40 of each task" in text
    assert "40 of 100" in text
    html = render_html(to_page(run()))
    assert "<svg" in html
    assert "softmax (donor)" in html


def test_json_has_everything() -> None:
    data = to_data(run())
    assert data["settings"]["lm_eval"] == "0.4.13"
    assert data["tasks"]["small"] == {
        "version": "1.5", "output_type": "multiple_choice", "num_fewshot": 5, "documents": 10, "of": 100,
        "definition": "d", "data": "e", "dataset": "json",
    }  # fmt: skip
    assert [(c["label"], c["metric"], c["chance"]) for c in data["columns"]] == [
        ("first", "acc", 0.25), ("mmlu", "acc", 0.25)
    ]  # fmt: skip
    window = data["states"]["window"]
    assert (window["state"], window["reading"], window["seconds"]) == ("window", "literal", 2.0)
    assert window["scores"]["mmlu"]["value"] == pytest.approx(0.7)
    assert len(window["recovered"]["ci95"]) == 2
    assert window["reported"]["large"] == {"acc,none": 0.7}
