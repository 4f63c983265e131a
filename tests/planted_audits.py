"""Audits with known answers: per-document sums drawn from given shares, and their reports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from equipoise.audit.compare_statistics import Resampled, RunScores
from equipoise.audit.report import (
    CONTROL,
    AuditReport,
    ControlSetting,
    Donor,
    Layers,
    Metric,
    RunFacts,
    audit_run,
)
from equipoise.statistics import ScoreTable

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


def drawn(rows: dict[str, list[ScoreTable]], *, resamples: int = 500, seed: int = 0) -> Resampled:
    runs = {
        name: [RunScores(i, table, BOTH) for i, table in enumerate(tables)] for name, tables in rows.items()
    }
    return Resampled(runs, resamples=resamples, seed=seed)
