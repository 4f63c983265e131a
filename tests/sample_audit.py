"""An audit report from planted scores, for tests of what is made of one."""

from __future__ import annotations

import numpy as np

from equipoise.audit.report import (
    AuditReport,
    ControlSetting,
    Donor,
    Guards,
    Layers,
    Metric,
    RunFacts,
    audit_run,
)
from equipoise.statistics import Estimate, ScoreTable

DONOR, NONE = 3.0, 6.0
# Recovered shares: both, window literal and renormalised, linear literal and renormalised.
PATTERNS = {
    "swa-sinks": (0.93, 0.93, 0.93, 0.0, 0.0),
    "lolcats": (0.96, 0.956, 0.96, -0.05, -0.54),
    "hedgecats": (0.926, 0.83, 0.96, 0.18, 0.52),
    "ssd": (0.95, 0.80, 0.91, 0.35, 0.63),
    "dead-but-used": (0.85, 0.60, 0.62, 0.0, 0.01),
}


def scores(pattern: tuple[float, ...], *, seed: int = 0, documents: int = 40) -> ScoreTable:
    """NLL sums per document that recover what the pattern says, in every branch state."""
    both, s0, s1, l0, l1 = pattern
    shares = {"softmax": 1.0, "none": 0.0, "sinks": 0.04, "both": both, "window": s0, "linear": l0}
    shares |= {"window_renormalised": s1, "linear_renormalised": l1, "swa_sinks_equal_bytes": 0.945}
    rng = np.random.default_rng(seed)
    tokens = rng.integers(200, 1000, documents).astype(float)
    difficulty = rng.normal(0, 0.4, documents)
    nll = {
        state: tokens * (NONE - share * (NONE - DONOR) + difficulty + rng.normal(0, 0.01, documents))
        for state, share in shares.items()
    }
    if s1 == both:  # no linear branch: the same forward pass, not the same value twice
        nll["window"] = nll["window_renormalised"] = nll["both"]
    return ScoreTable.from_nll(nll, tokens)


def facts() -> RunFacts:
    """Four layers, one of them local."""
    layers = Layers(converted=(0, 1, 3), local=(2,), softmax=())
    return RunFacts(
        state_bytes=1_572_864, reach=252, train_tokens=1_000_000, train_seconds=62.5, layers=layers,
        guards=Guards(windows=4, features=0, denominators=3, state=0.0005, layers=(1,)),
    )  # fmt: skip


def make_report(patterns: dict[str, tuple[float, ...]] = PATTERNS) -> AuditReport:
    """One run per pattern, by name; `swa-sinks` has no linear branch, `ssd` a benefit that was measured."""
    runs = [
        audit_run(
            scores(pattern),
            recipe=recipe,
            seed=0,
            has_window=True,
            has_linear=recipe != "swa-sinks",
            facts=facts(),
            control=None
            if recipe == "swa-sinks"
            else ControlSetting(window=144, sinks=4, state_bytes=1_500_000),
            benefit_difference=Estimate(0.21, (0.14, 0.28)) if recipe == "ssd" else None,
            benefit_reason=None if recipe == "ssd" else "no item was scored beyond both reaches",
            resamples=200,
        )
        for recipe, pattern in patterns.items()
    ]
    table = scores(next(iter(patterns.values())))
    return AuditReport(
        donor=Donor(
            name="tiny-donor", nll=Donor.of(table, name="x", resamples=200).nll, extra={"revision": None}
        ),
        metric=Metric.of(table, context_length=1024, data="held-out standard library sources", resamples=200),
        runs=runs,
        equipoise_version="0.1.0",
    )
