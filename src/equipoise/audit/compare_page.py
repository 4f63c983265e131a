"""A `Comparison` for people and machines: compare.json, compare.md, compare.html, a terminal table."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.audit.compare import Comparison, Row
from equipoise.audit.compare_statistics import CONTROL_MEASURE, MEASURES, Measure, Test, Value
from equipoise.pages import (
    Cell,
    Figure,
    Page,
    Section,
    Table,
    Text,
    bytes_in_words,
    number,
    percent,
    write_results,
)
from equipoise.pages.format import UNDEFINED
from equipoise.statistics import INTERVAL, Estimate

if TYPE_CHECKING:
    from rich.table import Table as RichTable

LEVEL = 0.05
"""Corrected p-values below it are called a difference."""
_PLOTTED = ("linear_alone", "window_gap", "nll", "linear_share")
_IN_TERMINAL = ("nll", "recovered", "window_alone", "linear_alone", "linear_share")
_FEW = 20
_METHOD = (
    "Rows are recipes or variants; each figure is the mean over the row's seeds. Recovered is 0 without "
    "attention and 100% at the donor; alone is at weight 1 (renormalised). The linear share is the linear "
    "branch's part of the two branches' Shapley values. Gains are in nats per token, positive where the "
    "hybrid is better: on its own window alone at weight 1, and on its control, an untrained window with "
    "sinks at the same state bytes.",
    "Intervals (95%) cover the variation of documents and of seeds: documents are resampled, the same "
    "ones for every run, and the mean over n seeds moves by Student's t with n - 1 degrees of freedom "
    "times its standard error. A row with one seed says nothing about other seeds; its interval is over "
    "documents alone.",
    "Tests compare rows paired by document, and by seed where two rows share at least two. p-values come "
    "from the same resamples; Holm's correction is among all tests of one measure. A difference is called "
    f"one where the corrected p-value is below {LEVEL}.",
)


def write_comparison(
    comparison: Comparison,
    directory: str | os.PathLike[str],
    *,
    title: str = "Comparison",
    question: str = "",
    missing: Sequence[str] = (),
) -> dict[str, Path]:
    """Write compare.json, compare.md and compare.html; returns their paths by suffix.

    Args:
        comparison: what to write.
        directory: where.
        title: the page's heading.
        question: what was asked, in a sentence.
        missing: what should be in it and is not, since it failed.
    """
    page = make_page(comparison, title=title, question=question, missing=missing)
    data = {"title": title, "question": question, **to_dict(comparison), "missing": list(missing)}
    return write_results(directory, "compare", page, data)


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """compare.json's contents: rows with every figure and its seeds, and all tests."""
    published = comparison.published
    return {
        "schema_version": 1,
        "donor": dict(comparison.donor),
        "metric": dict(comparison.metric),
        "judge": comparison.judge,
        "interval": INTERVAL,
        "resamples": comparison.resamples,
        "rows": [
            {
                "name": row.name, "rank": rank, "seeds": list(row.seeds), "state_bytes": row.state_bytes,
                "use": dict(row.uses), "benefit": dict(row.benefits),
                "values": {name: _value(value) for name, value in row.values.items()},
                "published": None if published is None else published[1].get(row.name),
            }
            for rank, row in enumerate(comparison.rows, 1)
        ],
        "published": None if published is None else published[0],
        "tests": [
            {
                "measure": test.measure, "row": test.row, "other": test.other, **_estimate(test.difference),
                "p": test.p, "p_holm": test.p_holm, "paired_seeds": test.seeds, "covers": test.covers,
            }
            for test in comparison.tests
        ],
    }  # fmt: skip


def make_page(
    comparison: Comparison, *, title: str = "Comparison", question: str = "", missing: Sequence[str] = ()
) -> Page:
    """The comparison as a page: summary, plots, the table, the tests, how to read them."""
    metric = comparison.metric
    seeds = sorted({seed for row in comparison.rows for seed in row.seeds})
    plotted = [comparison.judge, *(name for name in _PLOTTED if name != comparison.judge)]
    figures = [figure for name in plotted if (figure := _figure(comparison, name)) is not None]
    sections: list[Section] = [*figures[:4], _rows_table(comparison)]
    tested = [name for name in MEASURES if any(test.measure == name for test in comparison.tests)]
    sections += [_tests_table(comparison, name) for name in tested]
    notes = [*_METHOD, *_cautions(comparison)]
    if missing:
        notes.insert(0, f"Failed, and not in this comparison: {', '.join(missing)}.")
    return Page(
        title=title,
        subtitle=(
            f"Donor {comparison.donor['name']}; {metric['documents']:,} documents, {metric['tokens']:,} "
            f"tokens of {metric['data']}, context {metric['context_length']:,}; seeds "
            f"{', '.join(map(str, seeds))}."
        ),
        summary=f"{question} {summary(comparison)}".strip(),
        sections=[*sections, Text("How to read this", notes)],
    )


def summary(comparison: Comparison) -> str:
    """What came out, in a sentence or two."""
    judge, best = MEASURES[comparison.judge], comparison.rows[0]
    if comparison.judge not in best.values:
        return f"No row has a figure for {judge.title}."
    told = f"Best by {judge.title}: {best.name}, {shown(judge, best.values[comparison.judge].estimate)}."
    tests = [t for t in comparison.tests if t.measure == comparison.judge and best.name in (t.row, t.other)]
    if comparison.judge == CONTROL_MEASURE or not tests:
        return told
    level = [t.other if t.row == best.name else t.row for t in tests if not significant(t)]
    if not level:
        return f"{told} It differs from every other row ({len(tests)} of {len(tests)} tests, Holm-corrected)."
    return f"{told} Not shown to differ from it: {', '.join(str(name) for name in level)}."


def console_table(comparison: Comparison) -> RichTable:
    """One line a row for a terminal of 100 columns; intervals are in the files."""
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    extra = [] if comparison.judge in _IN_TERMINAL else [comparison.judge]
    table = RichTable(title=RichText(f"Donor: {comparison.donor['name']}"), title_justify="left")
    table.add_column("row", overflow="fold", min_width=12)
    table.add_column("seeds", justify="right")
    for name in (*_IN_TERMINAL, *extra):
        table.add_column(MEASURES[name].title.replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", min_width=12)
    for row in comparison.rows:
        cells = [_console_value(row, name) for name in (*_IN_TERMINAL, *extra)]
        table.add_row(RichText(row.name), str(len(row.seeds)), *cells, RichText(_counts(row.uses)))
    table.caption = (
        "Means over seeds. Recovered: 0% no attention, 100% donor. Alone: at weight 1 (renormalised)."
    )
    table.caption_justify = "left"
    return table


def significant(test: Test) -> bool:
    """Whether a difference is shown at the level, after correction."""
    return test.p_holm is not None and test.p_holm < LEVEL


def shown(measure: Measure, value: Estimate, *, signed: bool = False) -> str:
    """A figure with its interval, in the measure's unit; a signed share is a difference, in points."""
    if measure.unit == "nats":
        return number(value, signed=signed)
    if not signed:
        return percent(value)
    low, high = value.ci95
    return number(Estimate(100 * value.value, (100 * low, 100 * high)), digits=1, signed=True)


def _console_value(row: Row, name: str) -> str:
    if name not in row.values:
        return UNDEFINED
    value = row.values[name].estimate.value
    return number(value) if MEASURES[name].unit == "nats" else percent(value)


def _counts(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{word.replace('_', ' ')} {count}/{total}" for word, count in counts.items())


def _rows_table(comparison: Comparison) -> Table:
    """Every figure; what rows are ranked by comes first, and published figures beside it."""
    known = [name for name in MEASURES if any(name in row.values for row in comparison.rows)]
    others = [name for name in known if name != comparison.judge]
    label, published = comparison.published or ("", {})
    rows: list[list[Cell | str]] = []
    for row in comparison.rows:
        cells: list[Cell | str] = [row.name, Cell(str(len(row.seeds)), len(row.seeds))]
        cells.append(_cell(row.values.get(comparison.judge), MEASURES[comparison.judge]))
        if label:
            value = published.get(row.name, math.nan)
            cells.append(Cell(UNDEFINED if math.isnan(value) else f"{value:g}", value))
        cells += [_counts(row.uses), _counts(row.benefits)]
        cells += [_cell(row.values.get(name), MEASURES[name]) for name in others]
        rows.append([*cells, Cell(bytes_in_words(row.state_bytes), row.state_bytes)])
    columns = ["row", "seeds", MEASURES[comparison.judge].title, *(["published"] if label else []), "use"]
    columns += ["benefit", *(MEASURES[name].title for name in others), "state"]
    told = [
        f"Ranked by {MEASURES[comparison.judge].title}. NLL and gains in nats per token; the donor's NLL is "
        f"{comparison.donor['nll']:.3f}."
    ]
    return Table("All figures", columns, rows, " ".join(told + [f"Published: {label}."] * bool(label)))


def _cell(value: Value | None, measure: Measure) -> Cell:
    if value is None:
        return Cell(UNDEFINED, math.nan)
    signed = "gain" in measure.title
    return Cell(shown(measure, value.estimate, signed=signed), value.estimate.value)


def _tests_table(comparison: Comparison, name: str) -> Table:
    measure = MEASURES[name]
    rows: list[list[Cell | str]] = []
    for test in (test for test in comparison.tests if test.measure == name):
        against = "its control" if test.other is None else test.other
        values = [_p(test.p), _p(test.p_holm)]
        verdict = Cell("differs", tone="fair") if significant(test) else Cell("not shown")
        pairing = f"documents, {test.seeds} seeds" if test.seeds else "documents"
        difference = Cell(shown(measure, test.difference, signed=True), test.difference.value)
        rows.append([f"{test.row} − {against}", difference, *values, pairing, verdict])
    columns = [
        "difference",
        f"in {'nats' if measure.unit == 'nats' else 'points'}",
        "p",
        "p, Holm",
        "paired by",
        "",
    ]
    title = f"Tests: {measure.title}"
    return Table(
        title, columns, rows, "Intervals of differences are not corrected; p-values in the Holm column are."
    )


def _p(value: float | None) -> Cell:
    if value is None:
        return Cell(UNDEFINED, math.nan)
    return Cell(f"{value:.4f}" if value < 0.1 else f"{value:.2f}", value)


def _cautions(comparison: Comparison) -> list[str]:
    told: list[str] = []
    single = [row.name for row in comparison.rows if len(row.seeds) == 1]
    if single:
        told.append(f"One seed only, so nothing is known about others: {', '.join(single)}.")
    documents = comparison.metric["documents"]
    if documents < _FEW:
        told.append(
            f"{documents} documents are too few for intervals that resample documents to be relied on; below "
            f"about {_FEW} they are unverified."
        )
    return told


def _figure(comparison: Comparison, name: str) -> Figure | None:
    """Seeds as points, the mean and its interval, one line a row; best on top."""
    from equipoise.pages.plotting import FONT, INK, LINEAR, NEUTRAL, as_svg, canvas, printable

    measure = MEASURES[name]
    rows = [row for row in comparison.rows if name in row.values]
    if not rows:
        return None
    figure, axes = canvas(0.9 + 0.34 * len(rows))
    scale = 100 if measure.unit == "share" else 1
    for place, row in enumerate(rows):
        value = row.values[name]
        points = [scale * seed for seed in value.seeds]
        axes.plot(points, [place - 0.16] * len(points), "o", color=NEUTRAL, markersize=4, alpha=0.8)
        if value.estimate.defined:
            axes.plot([scale * end for end in value.estimate.ci95], [place, place], color=INK, linewidth=1.4)
        axes.plot([scale * value.estimate.value], [place], "D", color=LINEAR, markersize=5.5)
    names = [printable(row.name) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=FONT - 1, parse_math=False)  # a row may be called a$b$c
    axes.set_ylim(len(rows) - 0.5, -0.5)
    unit = "percent" if measure.unit == "share" else "nats per token"
    axes.set_xlabel(f"{measure.title}, {unit}", fontsize=FONT)
    if name in ("window_gap", CONTROL_MEASURE):
        axes.axvline(0, color=INK, linewidth=0.8)
    told = "; ".join(f"{row.name} {shown(measure, row.values[name].estimate)}" for row in rows)
    return Figure(
        title=measure.title[:1].upper() + measure.title[1:],
        svg=as_svg(figure, salt=f"compare-{name}"),
        description=f"{measure.title} of each row: {told}.",
        note="Dots: seeds. Diamond: their mean. Line: 95% interval over seeds and documents.",
    )


def _value(value: Value) -> dict[str, Any]:
    spread = _spread(value.seeds)
    return {**_estimate(value.estimate), "seeds": list(value.seeds), "seed_sd": spread}


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _estimate(value: Estimate) -> dict[str, Any]:
    return {"value": value.value, "ci95": list(value.ci95)}
