"""Cells know their figure, tables their columns; figures in words."""

from __future__ import annotations

import math

import pytest

from equipoise.pages import Badge, Cell, Table, bytes_in_words, number, percent
from equipoise.statistics import Estimate

NOTHING = Estimate(math.nan, (math.nan, math.nan))


@pytest.mark.parametrize(
    ("cell", "key", "missing"),
    [
        (Cell("96.0% [95.1, 96.8]", 0.96), 0.96, False),
        (Cell("1.5 MiB", 1_572_864.0), 1_572_864.0, False),
        (Cell("96.0% [95.1, 96.8]"), 96.0, False),
        (Cell("-1,024.5"), -1024.5, False),
        (Cell("−3"), -3.0, False),
        (Cell("64"), 64.0, False),
        (Cell(".5"), 0.5, False),
        (Cell("1e5"), None, False),
        (Cell("1.5 MiB"), None, False),
        (Cell("lolcats"), None, False),
        (Cell("–"), None, True),
        (Cell(""), None, True),
        (Cell("", badges=[Badge("collapsed")]), None, False),
        (Cell("diverged", math.nan), None, True),
        (Cell("∞", math.inf), None, True),
    ],
)
def test_sort_keys(cell: Cell, key: float | None, missing: bool) -> None:
    assert (float(cell.key) if cell.key else None) == key
    assert cell.missing == missing


def test_intervals_are_told_apart_from_other_brackets() -> None:
    assert (Cell("3.1 [3.0, 3.2]").point, Cell("3.1 [3.0, 3.2]").interval) == ("3.1", "[3.0, 3.2]")
    for text in ("run [red]", "a b [1]", "[1, 2]", "x[1]"):
        assert (Cell(text).point, Cell(text).interval) == (text, "")


def test_columns_of_figures() -> None:
    table = Table(
        "t", ["run", "seed", "size", "note", "empty"],
        [["a", "0", Cell("1 KiB", 1024), "x", "–"], ["1", "–", Cell("–", math.nan), "7", "–"]],
    )  # fmt: skip
    assert table.numeric == [False, True, True, False, True]
    assert Table("t", ["a", "b"], []).numeric == [False, False]


def test_short_wide_tables_stack_on_a_phone() -> None:
    row = ["1"] * 4
    assert Table("t", "abcd", [row] * 8).stacks
    assert not Table("t", "abcd", [row] * 9).stacks
    assert not Table("t", "abc", [row[:3]] * 8).stacks


def test_rows_must_fit_the_columns() -> None:
    with pytest.raises(ValueError, match="expected 2 cells a row in 'Runs', got 3"):
        Table("Runs", ["a", "b"], [["1", "2", "3"]])


def test_figures_in_words() -> None:
    assert percent(Estimate(0.96, (0.951, 0.968))) == "96.0% [95.1, 96.8]"
    assert percent(Estimate(0.96, (0.951, 0.968)), interval=False) == "96.0%"
    assert percent(Estimate(0.96, (math.nan, 1.0))) == percent(0.96) == "96.0%"
    assert number(Estimate(3.0614, (3.012, 3.107))) == "3.061 [3.012, 3.107]"
    assert number(Estimate(0.2, (-0.1, 0.5)), digits=1, signed=True) == "+0.2 [-0.1, +0.5]"
    assert percent(NOTHING) == number(NOTHING) == percent(math.inf) == "–"


def test_sizes_are_binary() -> None:
    assert [bytes_in_words(count) for count in (12, 2048, 1_572_864)] == ["12 B", "2.0 KiB", "1.5 MiB"]
