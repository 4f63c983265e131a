"""Comparisons of planted audits: intervals that cover, differences that are found, nulls that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from equipoise.audit.attribution import attribute, recovered
from equipoise.audit.compare import AuditFile, CompareError, compare, read_audit
from equipoise.audit.compare_page import significant, summary
from equipoise.audit.compare_statistics import Resampled, RunScores, holm, p_value
from equipoise.audit.documents import on_one_line, text_fingerprint
from equipoise.audit.report import (
    to_json,
    validate_audit,
    write_audit,
)
from equipoise.data.packing import EvaluationWindow
from equipoise.statistics import ScoreTable, bootstrap
from planted_audits import BOTH, DONOR, LOLCATS, NONE, SSD, drawn, planted, report
from support import random_tokens


class TestSums:
    def test_an_audit_holds_the_sums_behind_it(self, tmp_path: Path) -> None:
        table = planted()
        write_audit(report(table, "ssd"), tmp_path)
        text = (tmp_path / "audit.json").read_text(encoding="utf-8")
        validate_audit(json.loads(text))
        read = read_audit(tmp_path).runs[0].scores.table
        np.testing.assert_array_equal(read.weights, table.weights)
        assert read.sums.keys() == table.sums.keys()
        for state, sums in table.sums.items():
            np.testing.assert_allclose(read.sums[state], sums, atol=1e-6)
        assert '"tokens": [' in text
        assert len(text.splitlines()) < 400  # not one a number

    def test_lists_of_numbers_alone_are_joined(self) -> None:
        value = {"a": [1, -2.5, 3e-7, None], "b": ["x", "[\n1,\n2\n]"], "c": [[1, 2], []], "d": {"e": [0.5]}}
        text = on_one_line(json.dumps(value, indent=2))
        assert json.loads(text) == value
        assert '"a": [1, -2.5, 3e-07, null]' in text
        assert '"e": [0.5]' in text

    def test_fingerprint_is_of_tokens_labels_and_documents(self) -> None:
        ids = random_tokens(8)
        window = EvaluationWindow(document=0, start=0, input_ids=ids, labels=ids.clone())
        unlabelled = ids.clone()
        unlabelled[3] = -100
        others = [
            replace(window, document=1), replace(window, start=8), replace(window, labels=unlabelled),
            replace(window, input_ids=random_tokens(8, seed=1)),
        ]  # fmt: skip
        prints = [text_fingerprint([each]) for each in [window, *others]]
        prints += [text_fingerprint([window, window])]
        assert len(set(prints)) == len(prints)
        assert text_fingerprint([replace(window, labels=ids.clone())]) == prints[0]


class TestFigures:
    def test_one_run_has_the_audits_own_figures(self) -> None:
        table = planted()
        rows = drawn({"a": [table]}, resamples=300, seed=3)
        draws = bootstrap(table, resamples=300, seed=3)
        share = attribute(draws, "renormalised").linear_share
        for measure, expected in (
            ("linear_alone", recovered(draws, "linear_renormalised")),
            ("linear_share", share),
        ):
            value = rows.value("a", measure)
            assert value is not None
            assert value.estimate.value == pytest.approx(expected.value)
            assert value.estimate.ci95 == pytest.approx(expected.ci95)

    def test_mean_over_seeds(self) -> None:
        tables = [planted(seed=i, seed_sd=0.3) for i in range(3)]
        value = drawn({"a": tables}).value("a", "nll")
        assert value is not None
        nll = [float(-t.sums["both"].sum() / t.weights.sum()) for t in tables]
        assert value.seeds == pytest.approx(nll)
        assert value.estimate.value == pytest.approx(np.mean(nll))
        assert value.estimate.ci95[0] < value.estimate.value < value.estimate.ci95[1]

    def test_seeds_that_agree_add_nothing_to_the_interval(self) -> None:
        table = planted()
        one, three = drawn({"a": [table]}).value("a", "nll"), drawn({"a": [table] * 3}).value("a", "nll")
        assert one is not None
        assert three is not None
        assert three.estimate.ci95 == pytest.approx(one.estimate.ci95)

    def test_seeds_alone_give_students_interval(self) -> None:
        """Documents that are all alike leave the seeds: mean +- t s / sqrt(n)."""
        tokens = np.full(30, 100.0)
        means = [3.0, 3.1, 3.3, 3.15]
        tables = [
            ScoreTable.from_nll({"both": tokens * m, "none": tokens, "softmax": tokens}, tokens)
            for m in means
        ]
        value = drawn({"a": tables}, resamples=40_000).value("a", "nll")
        assert value is not None
        expected = stats.t.interval(0.95, 3, loc=np.mean(means), scale=stats.sem(means))
        assert value.estimate.ci95 == pytest.approx(expected, abs=0.01)

    @pytest.mark.slow
    @pytest.mark.parametrize("seeds", [1, 2, 3, 5])
    def test_intervals_cover_the_mean_over_all_seeds_and_documents(self, seeds: int) -> None:
        """200 seeded repetitions; seeds vary about as much as the mean over documents does.

        One seed knows nothing of the others, and covers too rarely: that is what the page warns of.
        """
        truth = NONE - SSD[0] * (NONE - DONOR)
        covered = 0
        for repetition in range(200):
            tables = [
                planted(seed=i, seed_sd=0.06, documents=64, text=1000 + repetition) for i in range(seeds)
            ]
            value = drawn({"a": tables}, resamples=400, seed=repetition).value("a", "nll")
            assert value is not None
            covered += value.estimate.ci95[0] <= truth <= value.estimate.ci95[1]
        share = covered / 200
        assert (share < 0.93) == (seeds == 1)


class TestTests:
    @staticmethod
    def found(
        first: tuple[float, ...], second: tuple[float, ...], *, seeds: int, repetitions: int, paired: bool
    ) -> dict[str, float]:
        """Share of seeded repetitions in which a difference is found at 0.05, by measure."""
        found = dict.fromkeys(("nll", "linear_alone", "linear_share"), 0.0)
        for repetition in range(repetitions):
            rows = {
                name: [
                    RunScores(
                        i if paired else i + 10 * ord(name),
                        planted(shares, seed=i, seed_sd=0.03, documents=64, text=repetition, name=name), BOTH,
                    )
                    for i in range(seeds)
                ]
                for name, shares in (("a", first), ("b", second))
            }  # fmt: skip
            resampled = Resampled(rows, resamples=300, seed=repetition)
            for measure in found:
                test = resampled.between("a", "b", measure)
                assert test is not None
                assert test.p is not None
                found[measure] += (test.p < 0.05) / repetitions
        return found

    @pytest.mark.slow
    @pytest.mark.parametrize(("seeds", "paired"), [(3, True), (3, False), (5, True)])
    def test_null_differences_are_rarely_found(self, seeds: int, paired: bool) -> None:
        """About 5% of the time, or less; documents counted twice make it less."""
        found = self.found(SSD, SSD, seeds=seeds, repetitions=200, paired=paired)
        assert max(found.values()) <= 0.08

    @pytest.mark.parametrize("paired", [True, False])
    def test_planted_differences_are_found(self, paired: bool) -> None:
        worse = (0.80, 0.70, 0.91, 0.20, 0.40)
        found = self.found(SSD, worse, seeds=3, repetitions=20, paired=paired)
        assert min(found.values()) >= 0.95

    def test_documents_pair_runs(self) -> None:
        """Documents differ by 0.4 nats, runs on the same document by 0.02: only paired is 0.02 found."""
        better = (SSD[0] + 0.02 / 3, *SSD[1:])
        rows = {"a": [planted(better, name="a")], "b": [planted(name="b")]}
        test = drawn(rows, resamples=2000).between("a", "b", "nll")
        assert test is not None
        assert test.p is not None
        assert test.p < 0.01
        assert test.difference.value == pytest.approx(-0.02, abs=0.01)
        assert (test.seeds, test.covers) == (0, "documents")

    def test_seeds_pair_runs_where_shared(self) -> None:
        """Both rows move with the seed by 0.5 nats; their difference of 0.2 does not."""
        tables = {
            name: [
                ScoreTable.from_nll(
                    {
                        state: -sums + table.weights * (shift + (i - 1) * 0.5)
                        for state, sums in table.sums.items()
                    },
                    table.weights,
                )
                for i, table in enumerate(planted(seed=i, name=name) for i in range(3))
            ]
            for name, shift in (("a", 0.0), ("b", 0.2))
        }
        shared = drawn(tables, resamples=2000).between("a", "b", "nll")
        apart = {
            n: [RunScores(i + 10 * ord(n), t, BOTH) for i, t in enumerate(ts)] for n, ts in tables.items()
        }
        unshared = Resampled(apart, resamples=2000).between("a", "b", "nll")
        assert shared is not None
        assert unshared is not None
        assert shared.p is not None
        assert unshared.p is not None
        assert shared.seeds == 3
        assert shared.p < 0.05
        assert unshared.p > 0.2
        assert unshared.covers == "seeds and documents"

    def test_a_row_with_one_seed_leaves_the_documents(self) -> None:
        tables = [planted(seed=i, seed_sd=0.05) for i in range(3)]
        test = drawn({"a": tables, "b": tables[:1]}).between("a", "b", "nll")
        assert test is not None
        assert test.covers == "documents"

    def test_p_value(self) -> None:
        assert p_value(np.array([1.0, *range(1, 100)])) == pytest.approx(2 / 100)
        assert p_value(np.array([-1.0, *range(-99, 0)])) == pytest.approx(2 / 100)
        assert p_value(np.zeros(11)) == 1
        assert p_value(np.array([1.0, 1.0, np.nan])) is None

    def test_holm(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.9, 0.8]) == [1.0, 1.0]
        assert holm([]) == []

    def test_holm_keeps_false_findings_rare_among_many_rows(self) -> None:
        """Five equal rows, ten pairs: without the correction about every third comparison finds something."""
        plain = adjusted = 0
        for repetition in range(60):
            rows = {n: [planted(documents=64, text=repetition, name=n)] for n in ("a", "b", "c", "d", "e")}
            resampled = drawn(rows, resamples=1000, seed=repetition)
            pairs = [(a, b) for a in rows for b in rows if a < b]
            tests = [resampled.between(a, b, "linear_alone") for a, b in pairs]
            values = [test.p for test in tests if test is not None and test.p is not None]
            plain += min(values) < 0.05
            adjusted += min(holm(values)) < 0.05
        assert plain / 60 > 0.15
        assert adjusted / 60 <= 0.1


class TestComparison:
    def test_seeds_and_recipes_become_rows(self, audited: Callable[..., AuditFile]) -> None:
        audits = [audited(planted(LOLCATS, seed=i, name="l"), "lolcats", i) for i in range(3)]
        audits += [audited(planted(SSD, seed=i, name="s"), "ssd", i) for i in (0, 1, 2)]
        found = compare(audits, judge="linear_alone", resamples=1000)
        assert [(row.name, row.seeds) for row in found.rows] == [("ssd", (0, 1, 2)), ("lolcats", (0, 1, 2))]
        assert found.rows[1].uses == {"collapsed": 3}
        assert found.rows[0].uses == {"balanced": 3}
        assert compare(audits, judge="nll", resamples=100).rows[0].name == "lolcats"
        by_measure = {test.measure: test for test in found.tests if test.other is not None}
        assert by_measure.keys() == {"nll", "linear_alone", "linear_share", "window_gap"}
        alone = by_measure["linear_alone"]
        assert alone.difference.value == pytest.approx(0.61, abs=0.01)
        assert significant(alone)
        against = {test.row: test for test in found.tests if test.measure == "control"}
        assert against["ssd"].difference.value == pytest.approx(0.02 * 3, abs=0.01)
        assert "Best by linear alone: ssd" in summary(found)
        assert "differs from every other row" in summary(found)

    def test_an_absent_branch_has_no_figures(self, audited: Callable[..., AuditFile]) -> None:
        window_only = planted((0.93, 0.93, 0.93, 0.0, 0.0), name="w")
        found = compare(
            [audited(window_only, "swa", has_linear=False), audited(planted(), "ssd")], judge="linear_share",
            resamples=100,
        )  # fmt: skip
        assert [row.name for row in found.rows] == ["ssd", "swa"]
        assert found.rows[1].values.keys() == {"nll", "recovered", "window_alone", "control"}
        assert {test.measure for test in found.tests if test.other} == {"nll"}

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"donor": "other"}, "the donor's name (tiny and other)"),
            ({"context_length": 512, "text_sha256": "cd"}, "context_length (256 and 512)"),
            ({"data": "other", "text_sha256": None}, "data (text and other)"),
            ({"text_sha256": "cd"}, "the scored tokens"),
            ({"extra": {"revision": "r2"}}, "the donor's revision (None and r2)"),
        ],
    )
    def test_other_donors_and_texts_are_refused(
        self, change: dict[str, Any], told: str, audited: Callable[..., AuditFile]
    ) -> None:
        audits = [audited(planted(), "a"), audited(planted(name="b"), "b", **change)]
        with pytest.raises(CompareError) as error:
            compare(audits)
        assert told in str(error.value)

    def test_equal_text_in_other_words_is_the_same(self, audited: Callable[..., AuditFile]) -> None:
        audits = [audited(planted(), "a"), audited(planted(name="b"), "b", data="the same text")]
        assert len(compare(audits, resamples=100).rows) == 2

    def test_other_documents_or_weights_are_refused_whatever_the_names(
        self, audited: Callable[..., AuditFile]
    ) -> None:
        with pytest.raises(CompareError, match="expected the documents of"):
            compare([audited(planted(), "a"), audited(planted(text=1), "b")])
        sums = {s: v * (1.1 if s == "softmax" else 1) for s, v in planted().sums.items()}
        other = ScoreTable.from_nll({s: -v for s, v in sums.items()}, planted().weights)
        with pytest.raises(CompareError, match="likelihood of the same documents differs"):
            compare([audited(planted(), "a"), audited(other, "b")])

    def test_runs_given_twice_or_made_otherwise_are_refused(self, audited: Callable[..., AuditFile]) -> None:
        with pytest.raises(CompareError, match="one run of a with seed 0, got two"):
            compare([audited(planted(), "a"), audited(planted(), "a")])
        with pytest.raises(CompareError, match="state_bytes 1000 and 2000"):
            compare([audited(planted(), "a"), audited(planted(), "a", 1, made={"state_bytes": 2000})])
        with pytest.raises(CompareError, match="at least one"):
            compare([])

    def test_a_label_names_the_row(self, tmp_path: Path) -> None:
        both = report(planted(), "ssd")
        place = tmp_path / "audit.json"
        place.write_text(to_json(both))
        assert read_audit(tmp_path, label="w64").runs[0].recipe == "w64"
        place.write_text(to_json(replace(both, runs=[*both.runs, *report(planted(LOLCATS), "lolcats").runs])))
        assert [r.recipe for r in read_audit(tmp_path, label="w64").runs] == ["w64 ssd", "w64 lolcats"]

    def test_what_is_no_audit_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CompareError, match=r"expected a directory with an audit\.json"):
            read_audit(tmp_path)
        (tmp_path / "audit.json").write_text("{}")
        with pytest.raises(CompareError, match="expected an audit, got something else"):
            read_audit(tmp_path)
        whole = report(planted(), "a")
        (tmp_path / "audit.json").write_text(
            to_json(replace(whole, runs=[replace(whole.runs[0], scores=None)]))
        )
        with pytest.raises(CompareError, match="per-document sums"):
            read_audit(tmp_path)
