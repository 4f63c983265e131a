"""Verdicts: published patterns get the words they deserve, and thin evidence gets none."""

from __future__ import annotations

import math

import pytest

from equipoise.audit.verdict import (
    Evidence,
    Thresholds,
    Verdict,
    decide_benefit,
    exceeds,
    judge,
)
from equipoise.statistics import Estimate


def near(value: float, half: float = 0.004) -> Estimate:
    return Estimate(value, (value - half, value + half))


def evidence(
    *,
    both: float,
    s0: float,
    s1: float,
    l0: float,
    l1: float,
    half: float = 0.004,
    control: float | None = None,
    untrained: float = 0.0,
) -> Evidence:
    """From recovered shares: literal window and linear (s0, l0), renormalised ones (s1, l1)."""
    return Evidence(
        linear_live=near(l1 - max(0.0, untrained), half),
        both=near(both, half),
        window_alone=near(s1, half),
        linear_alone=near(l1, half),
        linear_adds=near(both - s1, half),
        window_adds=near(both - l1, half),
        linear_removed=near(both - s0, half),
        window_removed=near(both - l0, half),
        control_adds=None if control is None else near(both - control, half),
    )


def verdict(of: Evidence, *, has_window: bool = True, has_linear: bool = True) -> Verdict:
    return judge(of, has_window=has_window, has_linear=has_linear, benefit_reason="nothing lies beyond reach")


COLLAPSED = evidence(both=0.96, s0=0.956, s1=0.96, l0=-0.05, l1=-0.54)
REPAIRED = evidence(both=0.926, s0=0.88, s1=0.96, l0=0.30, l1=0.52)
USED_BUT_DEAD = evidence(both=0.85, s0=0.60, s1=0.62, l0=0.0, l1=0.01)


@pytest.mark.parametrize(
    ("of", "use"),
    [
        (COLLAPSED, "collapsed"),
        # arXiv 2510.05901, LoLCATs' own Llama-3.1-8B and the paper's Mistral-7B, above no attention.
        (evidence(both=0.951, s0=0.960, s1=0.960, l0=0.001, l1=0.001), "collapsed"),
        (evidence(both=0.918, s0=0.920, s1=0.920, l0=0.011, l1=0.011), "collapsed"),
        # no better than its untrained maps: nothing was learned, whatever those recover
        (evidence(both=0.96, s0=0.956, s1=0.96, l0=0.04, l1=0.24, untrained=0.25), "collapsed"),
        (evidence(both=0.96, s0=0.956, s1=0.96, l0=0.04, l1=0.40, untrained=0.25), "imbalanced"),
        # not shown to stand alone: the interval reaches over a third, but not its lower bound
        (evidence(both=0.96, s0=0.956, s1=0.96, l0=0.04, l1=0.329, untrained=0.35), "collapsed"),
        # able to stand alone, if only as well as untrained: not dead, whatever the training did
        (evidence(both=0.96, s0=0.956, s1=0.96, l0=0.04, l1=0.40, untrained=0.37), "imbalanced"),
        (REPAIRED, "balanced"),
        (USED_BUT_DEAD, "imbalanced"),
        (evidence(both=0.95, s0=0.9, s1=0.945, l0=0.1, l1=0.2), "imbalanced"),  # alive, weak, adds nothing
        (evidence(both=0.95, s0=0.1, s1=0.2, l0=0.9, l1=0.9), "imbalanced"),  # the window is the weak one
        (evidence(both=0.90, s0=0.1, s1=0.2, l0=0.1, l1=0.2), "imbalanced"),  # only together
        (evidence(both=0.93, s0=0.925, s1=0.95, l0=0.1, l1=0.6), "imbalanced"),  # able but not used
        (evidence(both=0.95, s0=0.8, s1=0.948, l0=0.8, l1=0.947), "redundant"),
        (evidence(both=0.01, s0=0.0, s1=0.01, l0=0.0, l1=-0.2), "inconclusive"),  # nothing works
        # collapse the other way round: the linear branch alone is as good as both, the window is dead
        (evidence(both=0.95, s0=0.0, s1=0.01, l0=0.95, l1=0.955), "linear_only"),
        (evidence(both=0.95, s0=0.0, s1=0.01, l0=0.7, l1=0.95, untrained=0.9), "linear_only"),
        (evidence(both=0.95, s0=0.0, s1=0.12, l0=0.95, l1=0.95), "imbalanced"),  # alive, if only just
        (evidence(both=0.95, s0=0.0, s1=0.01, l0=0.5, l1=0.60), "imbalanced"),  # dead alone, but used
    ],
)
def test_patterns(of: Evidence, use: str) -> None:
    assert verdict(of).use == use


def test_a_repaired_hybrid_is_told_that_its_window_alone_is_better() -> None:
    got = verdict(REPAIRED)
    assert "better than the hybrid" in got.reason
    assert "3.4 points more than the hybrid" in got.advice
    assert "weight" in got.advice


def test_used_but_dead_is_told_to_drop_windows_in_training() -> None:
    got = verdict(USED_BUT_DEAD)
    assert "used but cannot stand alone" in got.reason
    assert "window dropout" in got.advice


def test_a_dead_window_is_told_apart_from_none() -> None:
    dead = verdict(evidence(both=0.95, s0=0.0, s1=0.01, l0=0.95, l1=0.955))
    assert "The linear branch does the work" in dead.reason
    assert "hybrid.window=null" in dead.advice
    absent = verdict(COLLAPSED, has_window=False)
    assert "no window branch" in absent.reason
    assert "hybrid.window=null" not in absent.advice


def test_a_window_that_may_be_dead_leaves_it_open() -> None:
    got = verdict(evidence(both=0.95, s0=0.0, s1=0.045, l0=0.95, l1=0.955, half=0.01))
    assert got.use == "inconclusive"
    assert "whether the window alone recovers anything" in got.reason


def test_collapse_gets_a_recipe() -> None:
    assert "hedgecats" in verdict(COLLAPSED).advice


def test_a_better_control_is_mentioned() -> None:
    plain = evidence(both=0.95, s0=0.8, s1=0.85, l0=0.3, l1=0.6)
    beaten = evidence(both=0.95, s0=0.8, s1=0.85, l0=0.3, l1=0.6, control=0.97)
    assert "untrained window of equal bytes" not in verdict(plain).advice
    assert "untrained window of equal bytes predicts this text better" in verdict(beaten).advice


@pytest.mark.parametrize(
    ("has_window", "has_linear", "use"),
    [(True, False, "window_only"), (False, True, "linear_only"), (False, False, "inconclusive")],
)
def test_models_without_a_branch(has_window: bool, has_linear: bool, use: str) -> None:
    got = verdict(COLLAPSED, has_window=has_window, has_linear=has_linear)
    assert got.use == use
    assert got.advice


def test_a_straddled_threshold_is_inconclusive_and_named() -> None:
    got = verdict(evidence(both=0.95, s0=0.8, s1=0.7, l0=0.1, l1=0.34, half=0.02))
    assert got.use == "inconclusive"
    assert "whether the linear branch stands alone" in got.reason


def test_tiny_samples_do_not_hide_what_lies_far_from_every_threshold() -> None:
    of = evidence(both=0.96, s0=0.956, s1=0.97, l0=-0.05, l1=-0.54, half=0.03)
    assert of.linear_adds.ci95[1] > Thresholds().window_tolerance
    got = verdict(of)
    assert got.use == "collapsed"
    assert "point estimates" in got.reason


def test_noise_is_not_evidence() -> None:
    assert verdict(evidence(both=0.96, s0=0.956, s1=0.96, l0=-0.05, l1=-0.54, half=0.5)).use == "inconclusive"


def test_an_undefined_scale_is_inconclusive() -> None:
    nothing = Estimate(math.nan, (math.nan, math.nan))
    of = Evidence(
        both=nothing, window_alone=nothing, linear_alone=nothing, linear_adds=nothing,
        window_adds=nothing, linear_removed=nothing, window_removed=nothing, linear_live=nothing,
    )  # fmt: skip
    got = verdict(of)
    assert got.use == "inconclusive"
    assert "undefined" in got.reason


@pytest.mark.parametrize(
    ("value", "answer", "by_point"),
    [
        (Estimate(0.40, (0.36, 0.44)), "yes", False),
        (Estimate(0.20, (0.15, 0.25)), "no", False),
        (Estimate(0.40, (0.30, 0.50)), "unclear", False),  # near the threshold
        (Estimate(0.70, (0.20, 1.20)), "yes", True),  # far, and the threshold cuts off an outer part only
        (Estimate(0.70, (-0.60, 2.0)), "unclear", False),  # far, but noise
        (Estimate(-0.10, (-0.60, 0.40)), "no", True),
        (Estimate(0.40, (math.nan, math.nan)), "unclear", False),
    ],
)
def test_exceeds(value: Estimate, answer: str, by_point: bool) -> None:
    finding = exceeds(value, 0.33, "it does", Thresholds())
    assert (finding.answer, finding.by_point) == (answer, by_point)


@pytest.mark.parametrize(
    ("difference", "benefit"),
    [
        (Estimate(0.10, (0.05, 0.15)), "beneficial"),
        (Estimate(-0.10, (-0.15, -0.05)), "not_beneficial"),
        (Estimate(0.002, (0.001, 0.003)), "not_beneficial"),  # certain, and too small to matter
        (Estimate(0.05, (-0.05, 0.15)), "inconclusive"),
        (Estimate(math.nan, (math.nan, math.nan)), "inconclusive"),
    ],
)
def test_benefit(difference: Estimate, benefit: str) -> None:
    assert decide_benefit(difference, None, thresholds=Thresholds())[0] == benefit


def test_benefit_wants_a_difference_or_a_reason() -> None:
    assert decide_benefit(None, "it covers the context.", thresholds=Thresholds()) == (
        "untested",
        "Benefit is untested: it covers the context.",
    )
    with pytest.raises(ValueError, match="got neither"):
        decide_benefit(None, None, thresholds=Thresholds())
    with pytest.raises(ValueError, match="got both"):
        decide_benefit(near(0.1), "no", thresholds=Thresholds())


def test_thresholds_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="order them"):
        Thresholds(dead_linear=0.5)
    with pytest.raises(ValueError, match="zero or positive"):
        Thresholds(far=-1.0)


def test_advice_is_one_sentence() -> None:
    for of in (COLLAPSED, REPAIRED, USED_BUT_DEAD):
        advice = verdict(of).advice
        assert advice.endswith(".")
        assert ". " not in advice.replace("0.9 ", "")
