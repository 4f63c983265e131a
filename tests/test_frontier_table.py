"""The tables of docs/research/02."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from test_frontier import tool


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return tool("frontier_table")


def entry(run: str, nll: list[float], far: list[list[int]], **more: Any) -> dict[str, Any]:
    of = {"nll": nll, "answers": [far, far]}
    about = {
        "run": run, "name": "source", "donor": "new", "length": 512, "split": "test", "tokens": 36, "seed": 0,
        "steps": 8, "reach": 100, "both": of, "more": of,
    }  # fmt: skip
    return {**about, **more}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    hybrid = entry("ours", [1.5, 3.5], [[90, 0], [150, 1], [250, 1]], reach=300)
    lines = [
        entry("ours", [0.0, 0.0], [[1, 1]], donor="old"),
        entry("rival", [1.0, 3.0], [[90, 1], [150, 1], [250, 0]], reach=200),
        hybrid | {"linear alone": hybrid["both"]},
        entry("donor", [2.0, 4.0], [[90, 1], [250, 1]], reach=None),
    ]
    place = tmp_path / "results.jsonl"
    place.write_text("".join(json.dumps(of) + "\n" for of in lines))
    return place


def test_of_the_last_donor_beyond_what_controls_reach(tables: Any, results: Path) -> None:
    """A hybrid's own reach does not count, or a long window of its own would spare it questions."""
    shown = list(tables.table(tables.runs_of(results, "source", 512, 36, "test"), "rival", 512))
    assert "within 200" in shown[0]
    ours = next(row for row in shown if "`ours`" in row)
    cells = [cell.strip() for cell in ours.split("|")[2:-1]]
    assert cells[:4] == ["1", "2.500", "0.500 [0.500, 0.500]", "0.500"]  # texts differ by 2, runs by a half
    assert cells[4:] == ["1.000 [1.000, 1.000]"] * 3
    rival = next(row for row in shown if "`rival`" in row)
    assert "| 2.000 |  | 1.000 | 0.000 [0.000, 0.000] |" in rival
    assert rival.endswith(" |  |")  # it has no linear branch


def test_runs_are_shown_as_they_are_named(tables: Any, results: Path) -> None:
    found = tables.runs_of(results, "source", 512, 36, "test")
    rows = list(tables.table(found, "rival", 512, ["rival", "donor"]))[2:]
    assert [row.split("`")[1] for row in rows] == ["rival", "donor"]
    assert len(tables.runs_of(results, "source", 512, 36, "test", "old")) == 1


def test_nothing_run_is_said(tables: Any, results: Path) -> None:
    with pytest.raises(typer.BadParameter, match="36 tokens a head, found none"):
        tables.runs_of(results, "docstrings", 512, 36, "test")
