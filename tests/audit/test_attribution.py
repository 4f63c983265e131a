"""Attribution: Shapley values against their definition, and a bootstrap that covers and pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from equipoise.audit.attribution import (
    HYBRID_STATES,
    KEPT,
    READINGS,
    Reading,
    attribute,
    check_states,
    recovered,
    recovered_difference,
)
from equipoise.audit.evidence import gather
from equipoise.statistics import Draws, Estimate, ScoreTable, bootstrap, difference, estimate, score

LEVELS = {
    "softmax": 3.0, "both": 3.1, "window": 3.3, "linear": 4.5, "none": 6.0, "sinks": 5.8,
    "window_renormalised": 3.2, "linear_renormalised": 4.2,
}  # fmt: skip


def table(*, documents: int = 60, seed: int = 0, levels: dict[str, float] = LEVELS) -> ScoreTable:
    """Documents of unequal length and difficulty; states differ by `levels` and a little noise."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 400, documents).astype(float)
    difficulty = rng.normal(0, 0.5, documents)
    nll = {
        state: tokens * (level + difficulty + rng.normal(0, 0.02, documents))
        for state, level in levels.items()
    }
    return ScoreTable.from_nll(nll, tokens)


def test_scores_are_token_weighted_and_negated() -> None:
    nll = {state: [10.0, 90.0] for state in ("softmax", *HYBRID_STATES)}
    draws = bootstrap(ScoreTable.from_nll(nll, [10, 30]), resamples=10)
    assert score(draws, "both").value == -2.5  # 100 nats over 40 tokens, not the mean of 1 and 3


@pytest.mark.parametrize("reading", READINGS)
def test_shapley_values_are_efficient_and_match_the_definition(reading: str) -> None:
    draws = bootstrap(table(), resamples=50)
    suffix = "" if reading == "literal" else "_renormalised"
    v = {
        frozenset[str](): draws["none"][0],
        frozenset({"window"}): draws[f"window{suffix}"][0],
        frozenset({"linear"}): draws[f"linear{suffix}"][0],
        frozenset({"window", "linear"}): draws["both"][0],
    }
    expected = dict.fromkeys(("window", "linear"), 0.0)
    orders = list(itertools.permutations(expected))
    for order in orders:
        for position, player in enumerate(order):
            before = frozenset(order[:position])
            expected[player] += (v[before | {player}] - v[before]) / len(orders)

    got = attribute(draws, reading)  # pyright: ignore[reportArgumentType]
    assert got.window.value == pytest.approx(expected["window"], abs=1e-14)
    assert got.linear.value == pytest.approx(expected["linear"], abs=1e-14)
    assert got.window.value + got.linear.value == pytest.approx(
        draws["both"][0] - draws["none"][0], abs=1e-14
    )
    assert got.linear.value == pytest.approx(
        (got.linear_alone.value + got.linear_given_window.value) / 2, abs=1e-14
    )
    assert got.interaction.value == pytest.approx(
        got.window_given_linear.value - got.window_alone.value, abs=1e-14
    )


@pytest.mark.parametrize("reading", READINGS)
def test_what_kept_layers_earn_is_no_branchs(reading: Reading) -> None:
    draws = bootstrap(table(levels={**LEVELS, KEPT: 4.6}), resamples=50)
    found = attribute(draws, reading)
    earned = found.window.value + found.linear.value
    assert math.isclose(earned, draws["both"][0] - draws[KEPT][0])
    assert math.isclose(earned, 1.5, abs_tol=0.02)


def test_evidence_starts_from_what_kept_layers_do() -> None:
    whole = gather(bootstrap(table(), resamples=50))
    partial = gather(bootstrap(table(levels={**LEVELS, KEPT: 4.6}), resamples=50))
    assert not whole.partial
    assert partial.partial
    assert whole.linear_alone.value > 0.5  # (6 - 4.2) / (6 - 3)
    assert math.isclose(partial.linear_alone.value, 0.4 / 1.6, abs_tol=0.02)  # of what was not there before
    assert math.isclose(partial.linear_removed.value, 0.2 / 1.6, abs_tol=0.02)


def test_efficiency_is_exact_where_the_sums_are_representable() -> None:
    levels = {"softmax": 0.0, "both": 1.0, "window": 2.0, "linear": 4.0, "none": 8.0, "sinks": 8.0}
    levels |= {"window_renormalised": 2.0, "linear_renormalised": 3.0}
    nll = {state: np.array([level, level]) for state, level in levels.items()}
    for reading in READINGS:
        got = attribute(bootstrap(ScoreTable.from_nll(nll, [1, 1]), resamples=5), reading)
        assert got.window.value + got.linear.value == 7.0


def test_recovered_is_zero_for_none_and_one_for_the_donor() -> None:
    draws = bootstrap(table(), resamples=200)
    assert recovered(draws, "none") == Estimate(0.0, (0.0, 0.0))
    assert recovered(draws, "softmax") == Estimate(1.0, (1.0, 1.0))
    both = recovered(draws, "both")
    assert both.value == pytest.approx(2.9 / 3.0, abs=0.01)
    gap = recovered_difference(draws, "both", "window_renormalised")
    assert gap.value == pytest.approx(both.value - recovered(draws, "window_renormalised").value)


def test_bootstrap_is_seeded_and_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = (score(bootstrap(table(), resamples=300, seed=4), "both") for _ in range(2))
    assert first == again
    assert first != score(bootstrap(table(), resamples=300, seed=5), "both")
    monkeypatch.setattr("equipoise.statistics._COUNTS_AT_ONCE", 60 * 7)
    chunked = score(bootstrap(table(), resamples=300, seed=4), "both")
    assert chunked.ci95 == pytest.approx(first.ci95, abs=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    tokens = np.full(60, 100.0)
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        nll = tokens * (3.0 + rng.normal(0, 0.5, tokens.size))
        states = dict.fromkeys(("softmax", *HYBRID_STATES), nll)
        low, high = score(
            bootstrap(ScoreTable.from_nll(states, tokens), resamples=300, seed=trial), "both"
        ).ci95
        hits += low <= -3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_differences_are_paired() -> None:
    draws = bootstrap(table(), resamples=1000)

    def width(of: Estimate) -> float:
        return of.ci95[1] - of.ci95[0]

    unpaired = math.hypot(width(score(draws, "both")), width(score(draws, "window")))
    assert width(difference(draws, "both", "window")) < unpaired / 10


def test_an_undefined_scale_is_nan_not_infinite() -> None:
    draws = bootstrap(table(levels=dict.fromkeys(LEVELS, 3.0) | {"softmax": 4.0}), resamples=50)
    assert not recovered(draws, "both").defined
    assert math.isnan(recovered(draws, "both").value)


def test_one_undefined_resample_makes_the_interval_undefined() -> None:
    draws = np.array([0.5, 0.4, math.nan, 0.6])
    assert estimate(draws).value == 0.5
    assert not estimate(draws).defined


def test_linear_share_of_a_model_without_a_linear_branch_is_zero() -> None:
    sums = dict(table().sums)
    sums |= {
        "both": sums["window"],
        "window_renormalised": sums["window"],
        "linear": sums["none"],
        "linear_renormalised": sums["none"],
    }
    alone = ScoreTable(metric="nll", unit="nats/token", sums=sums, weights=table().weights)
    share = attribute(bootstrap(alone, resamples=50), "renormalised").linear_share
    assert share.value == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [1.0]}, "at least two documents"),
        ({"tokens": [1.0, 0.0]}, "positive"),
        ({"both": [1.0, math.inf]}, "finite sums for state 'both'"),
        ({"both": [1.0]}, "expected 2 sums for state 'both'"),
    ],
)
def test_bad_tables_are_refused(change: dict[str, list[float]], message: str) -> None:
    nll: dict[str, list[float]] = {state: [1.0, 2.0] for state in ("softmax", *HYBRID_STATES)}
    tokens = change.get("tokens") or [1.0, 1.0]
    for state, values in change.items():
        if state == "tokens":
            continue
        nll[state] = values
    with pytest.raises(ValueError, match=message):
        ScoreTable.from_nll(nll, tokens)


def test_an_audit_needs_every_branch_state() -> None:
    measured = {state: [1.0, 2.0] for state in ("softmax", *HYBRID_STATES) if state != "both"}
    with pytest.raises(ValueError, match="none for both"):
        check_states(ScoreTable.from_nll(measured, [1.0, 1.0]))


def test_unmeasured_states_and_no_resamples_are_refused() -> None:
    draws = bootstrap(table(), resamples=5)
    assert isinstance(draws, Draws)
    assert draws.resamples == 5
    with pytest.raises(KeyError, match="swa_sinks"):
        score(draws, "swa_sinks_equal_bytes")
    with pytest.raises(ValueError, match="resamples >= 1"):
        bootstrap(table(), resamples=0)
