"""Comparisons of planted audits: intervals that cover, differences that are found, nulls that are not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from equipoise.audit.attribution import attribute, recovered
from equipoise.audit.compare import AuditFile, CompareError, compare, read_audit
from equipoise.audit.compare_page import console_table, make_page, significant, summary, write_comparison
from equipoise.audit.compare_statistics import Resampled, RunScores, holm, p_value
from equipoise.audit.documents import on_one_line, text_fingerprint
from equipoise.audit.report import (
    CONTROL,
    AuditReport,
    ControlSetting,
    Donor,
    Layers,
    Metric,
    RunFacts,
    audit_run,
    to_json,
    validate_audit,
    write_audit,
)
from equipoise.data.packing import EvaluationWindow
from equipoise.statistics import ScoreTable, bootstrap
from support import random_tokens

DONOR, NONE = 3.0, 6.0
BOTH = frozenset({"window", "linear"})
# Recovered shares: both, window literal and renormalised, linear literal and renormalised.
LOLCATS = (0.96, 0.956, 0.96, -0.05, 0.02)
SSD = (0.95, 0.80, 0.91, 0.35, 0.63)


def planted(
    shares: tuple[float, ...] = SSD,
    *,
    seed: int = 0,
    seed_sd: float = 0.0,
    documents: int = 40,
    text: int = 0,
    noise: float = 0.02,
    name: str = "",
) -> ScoreTable:
    """Sums of one run: documents differ alike in all runs of a text, seeds differ by `seed_sd` nats.

    Every state's NLL is its share's place between no attention and donor, plus the document's difficulty,
    plus the seed's own deviation, plus noise of this run on this document.
    """
    both, s0, s1, l0, l1 = shares
    texts = np.random.default_rng(text)
    tokens = texts.integers(200, 1000, documents).astype(float)
    difficulty = texts.normal(0, 0.4, documents)
    rng = np.random.default_rng((text, seed, sum(map(ord, name)), 17))
    deviation = rng.normal(0, seed_sd)
    nll = {
        state: tokens * (NONE - share * (NONE - DONOR) + difficulty)
        for state, share in (("softmax", 1.0), ("none", 0.0), ("sinks", 0.04), (CONTROL, 0.93))
    }
    states = ("both", "window", "window_renormalised", "linear", "linear_renormalised")
    for state, share in zip(states, (both, s0, s1, l0, l1), strict=True):
        own = deviation + rng.normal(0, noise, documents)
        nll[state] = tokens * (NONE - share * (NONE - DONOR) + difficulty + own)
    return ScoreTable.from_nll(nll, tokens)


def report(table: ScoreTable, recipe: str, seed: int = 0, **metric: Any) -> AuditReport:
    """The audit of one run."""
    made = {"state_bytes": 1000, "reach": 252, "layers": Layers(converted=(0, 1))} | metric.pop("made", {})
    run = audit_run(
        table, recipe=recipe, seed=seed, has_window=True, has_linear=metric.pop("has_linear", True),
        facts=RunFacts(train_tokens=10, train_seconds=1.0, **made),
        control=ControlSetting(window=144, sinks=4, state_bytes=1000), benefit_reason="not scored",
        resamples=50,
    )  # fmt: skip
    name, extra = metric.pop("donor", "tiny"), metric.pop("extra", {})
    settings = {"context_length": 256, "data": "text", "text_sha256": "ab", **metric}
    donor = replace(Donor.of(table, name=name, resamples=50), extra=extra)
    return AuditReport(donor=donor, metric=Metric.of(table, resamples=50, **settings), runs=(run,))


@pytest.fixture
def audited(tmp_path: Path) -> Callable[..., AuditFile]:
    """An audit that was written to disk and read again."""

    def write(table: ScoreTable, recipe: str, seed: int = 0, **metric: Any) -> AuditFile:
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        place.write_text(to_json(report(table, recipe, seed, **metric)), encoding="utf-8")
        return read_audit(place)

    return write


def drawn(rows: dict[str, list[ScoreTable]], *, resamples: int = 500, seed: int = 0) -> Resampled:
    runs = {
        name: [RunScores(i, table, BOTH) for i, table in enumerate(tables)] for name, tables in rows.items()
    }
    return Resampled(runs, resamples=resamples, seed=seed)


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
