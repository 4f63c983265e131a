"""Audits of several seeds and recipes of one donor on one text, merged into one comparison.

Runs of one recipe are the seeds of one row. What cannot be compared is refused, and the refusal says what
differs: another donor, another text, a recipe whose runs were not made alike, a run given twice.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.audit.attribution import DONOR
from equipoise.audit.compare_statistics import (
    CONTROL_MEASURE,
    MEASURES,
    RESAMPLES,
    Resampled,
    RunScores,
    Test,
    Value,
    holm,
)
from equipoise.audit.documents import read_sums
from equipoise.audit.schema import validate_audit
from equipoise.config import ConfigError

AUDIT = "audit.json"
_SAME_DONOR = 0.01
"""Share by which two audits' likelihoods of the donor may differ on a document: precision, not weights."""
_LACKS = {"window_only": "linear", "linear_only": "window"}


class CompareError(ConfigError):
    """Audits that cannot be compared; the message says what differs."""


@dataclass(frozen=True)
class AuditedRun:
    """One run of an audit file."""

    recipe: str
    scores: RunScores
    use: str
    benefit: str
    made: Mapping[str, Any]
    """What the runs of one recipe have in common: state bytes, reach, layers."""
    origin: str


@dataclass(frozen=True)
class AuditFile:
    """An `audit.json` as far as comparisons need it."""

    origin: str
    donor: Mapping[str, Any]
    metric: Mapping[str, Any]
    runs: tuple[AuditedRun, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe: all of its seeds.

    Attributes:
        values: by name in `MEASURES`; without those it has no branch or score for.
        uses, benefits: how many seeds got each verdict.
        state_bytes: of its decode state.
    """

    name: str
    seeds: tuple[int, ...]
    values: Mapping[str, Value]
    uses: Mapping[str, int]
    benefits: Mapping[str, int]
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows ranked by `judge` (best first), and every test between them."""

    donor: Mapping[str, Any]
    metric: Mapping[str, Any]
    rows: tuple[Row, ...]
    tests: tuple[Test, ...]
    judge: str
    published: tuple[str, Mapping[str, float]] | None = None
    resamples: int = RESAMPLES


def read_audit(path: str | Path, *, label: str | None = None) -> AuditFile:
    """Read an audit from its directory or file.

    Args:
        path: an `audit.json`, or the directory it lies in.
        label: what to call its recipe; where it holds several, put before each.

    Raises:
        CompareError: no audit, or one without per-document sums.
    """
    place = Path(path) / AUDIT if Path(path).is_dir() else Path(path)
    try:
        audit: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        validate_audit(audit)
    except OSError as error:
        raise CompareError(
            f"{path}: expected a directory with an {AUDIT}, or such a file ({error.strerror}: {place}). "
            "`equipoise audit MODEL… --output DIR` makes one."
        ) from None
    except (UnicodeDecodeError, ValueError) as error:
        raise CompareError(f"{place}: expected an audit, got something else: {error}") from None
    if any("documents" not in run for run in audit["runs"]):
        raise CompareError(
            f"{place}: expected per-document sums, got an audit without (written by an earlier version). "
            "Audit the models again."
        )
    recipes = {run["recipe"] for run in audit["runs"]}
    named = {recipe: recipe if label is None else f"{label} {recipe}" for recipe in recipes}
    if label is not None and len(recipes) == 1:
        named = dict.fromkeys(recipes, label)
    runs = tuple(_read_run(run, named[run["recipe"]], str(place)) for run in audit["runs"])
    return AuditFile(str(place), audit["donor"], audit["metric"], runs)


def _read_run(run: Mapping[str, Any], recipe: str, origin: str) -> AuditedRun:
    use = run["verdict"]["use"]
    try:
        table = read_sums(run["documents"])
    except ValueError as error:
        raise CompareError(f"{origin}, {recipe} (seed {run['seed']}): {error}") from None
    branches = frozenset({"window", "linear"} - {_LACKS.get(use)})
    made = {name: run[name] for name in ("state_bytes", "reach", "layers")}
    scores = RunScores(run["seed"], table, branches)
    return AuditedRun(recipe, scores, use, run["verdict"]["benefit"], made, origin)


def compare(
    audits: Sequence[AuditFile],
    *,
    judge: str = "nll",
    published: tuple[str, Mapping[str, float]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Merge audits into rows, and test every pair of rows.

    Args:
        audits: of one donor on one text.
        judge: what rows are ranked by, a name in `MEASURES`.
        published: figures from elsewhere, by row: what they are, and the values.
        resamples, seed: of the bootstrap.

    Raises:
        CompareError: audits that cannot be compared.
    """
    _check_same(audits)
    rows = _rows(audits)
    drawn = Resampled(
        {name: [run.scores for run in runs] for name, runs in rows.items()}, resamples=resamples, seed=seed
    )
    made = [_row(name, runs, drawn) for name, runs in rows.items()]
    ranked = sorted(made, key=lambda row: _rank(row, judge))
    return Comparison(
        donor=audits[0].donor, metric=audits[0].metric, rows=tuple(ranked), judge=judge,
        tests=tuple(_tests([row.name for row in ranked], drawn)), published=published, resamples=resamples,
    )  # fmt: skip


def _row(name: str, runs: Sequence[AuditedRun], drawn: Resampled) -> Row:
    found = {measure: drawn.value(name, measure) for measure in MEASURES}
    return Row(
        name=name,
        seeds=tuple(sorted(run.scores.seed for run in runs)),
        values={measure: value for measure, value in found.items() if value is not None},
        uses=dict(Counter(run.use for run in runs).most_common()),
        benefits=dict(Counter(run.benefit for run in runs).most_common()),
        state_bytes=runs[0].made["state_bytes"],
    )


def _rank(row: Row, judge: str) -> float:
    """Sort key: best first, undefined last."""
    value = row.values[judge].estimate.value if judge in row.values else float("nan")
    if not np.isfinite(value):
        return float("inf")
    return -value if MEASURES[judge].best == "high" else value


def _tests(names: Sequence[str], drawn: Resampled) -> list[Test]:
    """All pairs on every tested measure, and every row against its control; corrected within a measure."""
    tests: list[Test] = []
    for measure, about in MEASURES.items():
        family: list[Test | None] = []
        if about.tested:
            pairs = itertools.combinations(names, 2)
            family = [drawn.between(row, other, measure) for row, other in pairs]
        elif measure == CONTROL_MEASURE:
            family = [drawn.against_zero(name, measure) for name in names]
        tests += corrected([test for test in family if test is not None])
    return tests


def corrected(family: Sequence[Test]) -> list[Test]:
    """Tests with Holm's correction among them; undefined ones do not count."""
    defined = [test.p for test in family if test.p is not None]
    adjusted = iter(holm(defined))
    return [test if test.p is None else replace(test, p_holm=next(adjusted)) for test in family]


def _rows(audits: Sequence[AuditFile]) -> dict[str, list[AuditedRun]]:
    """Runs by recipe.

    Raises:
        CompareError: a run given twice, or runs of one recipe that were not made alike.
    """
    rows: dict[str, list[AuditedRun]] = {}
    for run in itertools.chain.from_iterable(audit.runs for audit in audits):
        members = rows.setdefault(run.recipe, [])
        for other in members:
            if other.scores.seed == run.scores.seed:
                raise CompareError(
                    f"expected one run of {run.recipe} with seed {run.scores.seed}, got two, from "
                    f"{other.origin} and {run.origin}. Tell them apart: NAME={run.origin}"
                )
            differing = [name for name in run.made if run.made[name] != other.made[name]]
            if differing:
                told = "; ".join(f"{name} {other.made[name]} and {run.made[name]}" for name in differing)
                raise CompareError(
                    f"expected the runs of {run.recipe} to differ in their seed alone, but {other.origin} "
                    f"and {run.origin} differ in {told}. Tell them apart: NAME={run.origin}"
                )
        members.append(run)
    return rows


def _check_same(audits: Sequence[AuditFile]) -> None:
    """Raise unless all audits are of one donor on one text.

    Raises:
        CompareError: none at all, or some that differ; says in what.
    """
    if not audits:
        raise CompareError("expected at least one audit to compare, got none.")
    first = audits[0]
    for other in audits[1:]:
        if differing := _donor_differences(first, other) or _text_differences(first, other):
            raise CompareError(
                f"expected audits of one donor on one text, but {first.origin} and {other.origin} differ in "
                f"{'; '.join(differing)}. Audit the models with the same --data and --context-length."
            )
    table = first.runs[0].scores.table
    donor = table.sums[DONOR]
    for run in itertools.chain.from_iterable(audit.runs for audit in audits):
        mine = run.scores.table
        if not np.array_equal(mine.weights, table.weights):
            raise CompareError(f"{run.origin}: expected the documents of {first.origin}, got others.")
        if not np.allclose(mine.sums[DONOR], donor, rtol=_SAME_DONOR):
            raise CompareError(
                f"expected audits of one donor, but its likelihood of the same documents differs between "
                f"{first.origin} and {run.origin}. Audit the models in the same precision."
            )


def _donor_differences(one: AuditFile, two: AuditFile) -> list[str]:
    if one.donor.get("fingerprint") and two.donor.get("fingerprint"):
        names = ["fingerprint"]
    else:
        names = ["name", "revision"]
    return [
        f"the donor's {name} ({one.donor.get(name)} and {two.donor.get(name)})"
        for name in names
        if one.donor.get(name) != two.donor.get(name)
    ]


def _text_differences(one: AuditFile, two: AuditFile) -> list[str]:
    names = ("data", "context_length", "documents", "tokens")
    known = one.metric.get("text_sha256"), two.metric.get("text_sha256")
    if all(known) and known[0] == known[1]:
        return []
    told = [
        f"{name} ({one.metric[name]} and {two.metric[name]})"
        for name in names
        if one.metric[name] != two.metric[name]
    ]
    if not told and all(known):
        told = ["the scored tokens (metric.text_sha256)"]
    return told
