"""Comparisons as files and on the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from equipoise.audit.compare import AuditFile, compare
from equipoise.audit.compare_page import console_table, make_page, significant, write_comparison
from planted_audits import LOLCATS, planted


class TestPage:
    @pytest.fixture
    def audits(self, audited: Callable[..., AuditFile]) -> list[AuditFile]:
        made = [audited(planted(LOLCATS, seed=i, name="l", documents=12), "lolcats", i) for i in range(2)]
        made += [audited(planted((0.93, 0.93, 0.93, 0, 0), documents=12), "swa $_$ <b>", has_linear=False)]
        return made

    def test_files_hold_all_figures(self, audits: list[AuditFile], tmp_path: Path) -> None:
        found = compare(audits, resamples=200, published=("elsewhere", {"lolcats": 34.5}))
        paths = write_comparison(found, tmp_path / "out", title="T", question="Which?", missing=["x-seed0"])
        data = json.loads(paths["json"].read_text(encoding="utf-8"))
        assert [row["name"] for row in data["rows"]] == [row.name for row in found.rows]
        lolcats = next(row for row in data["rows"] if row["name"] == "lolcats")
        assert lolcats["published"] == 34.5
        assert lolcats["use"] == {"collapsed": 2}
        assert len(lolcats["values"]["nll"]["seeds"]) == 2
        assert lolcats["values"]["nll"]["seed_sd"] > 0
        assert data["missing"] == ["x-seed0"]
        assert {test["covers"] for test in data["tests"] if test["other"]} == {"documents"}
        html, text = (paths[kind].read_text(encoding="utf-8") for kind in ("html", "md"))
        assert html.count("<svg") == 4
        assert "<b>" not in html
        assert "collapsed 2/2" in text
        assert "One seed only" in text
        assert "x-seed0" in text
        assert "34.5" in text
        assert "12 documents are too few" in text

    def test_terminal_table_fits(self, audits: list[AuditFile]) -> None:
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(console_table(compare(audits, resamples=100, judge="window_gap")))
        text = console.export_text()
        assert "collapsed 2/2" in text.replace("\n", " ")
        assert "swa $_$ <b>" in text
        assert max(map(len, text.splitlines())) <= 100

    def test_undefined_shares_are_dashes(self, audited: Callable[..., AuditFile]) -> None:
        """A hybrid worse than no attention has no linear share to speak of, and no test of it."""
        bad = (-0.2, -0.1, 0.5, -0.3, -0.1)
        found = compare([audited(planted(bad), "bad"), audited(planted(name="g"), "good")], resamples=100)
        shares = [test for test in found.tests if test.measure == "linear_share"]
        assert [test.p for test in shares] == [None]
        assert not significant(shares[0])
        table = next(s for s in make_page(found).sections if getattr(s, "title", "") == "All figures")
        row = next(row for row in table.rows if row[0] == "bad")  # type: ignore[union-attr]
        assert row[table.columns.index("linear share")].text == "–"  # type: ignore[union-attr]
