"""The word for a native hybrid, from intervals made by hand."""

from __future__ import annotations

import math

import pytest

from equipoise.audit.native_verdict import WORDS, judge_native
from equipoise.statistics import Estimate

WORTH = Estimate(2.0, (1.9, 2.1))


def about(value: float, width: float = 0.01) -> Estimate:
    return Estimate(value, (value - width, value + width))


def word(attention: Estimate, linear: Estimate, worth: Estimate = WORTH) -> str:
    recovered = {"attention": attention, "linear": linear}
    verdict = judge_native({"zero": recovered, "mean": recovered}, {"zero": worth, "mean": worth})
    assert verdict.word == verdict.mean_word
    settled = verdict.word != "inconclusive"
    assert (WORDS[verdict.word] in verdict.reason) == settled
    return verdict.word


@pytest.mark.parametrize(
    ("attention", "linear", "expected"),
    [
        (Estimate(1.0, (1.0, 1.0)), Estimate(0.0, (0.0, 0.0)), "linear_unused"),
        (Estimate(0.0, (0.0, 0.0)), Estimate(1.0, (1.0, 1.0)), "attention_unused"),
        (about(1.0, 0.005), about(1.0, 0.005), "redundant"),
        (about(1.2), about(1.1), "redundant"),
        (about(0.6), about(0.7), "balanced"),
        (about(0.6), about(0.1), "attention_led"),
        (about(-0.5), about(0.6), "linear_led"),
        (about(0.1), about(-0.4), "interdependent"),
        (about(0.985), about(0.2), "inconclusive"),  # straddles the tolerance
        (about(0.33), about(0.1), "inconclusive"),  # straddles what stands alone
        (about(0.33), about(0.99, 0.002), "attention_unused"),  # which nobody asks then
        (Estimate(math.nan, (math.nan, math.nan)), about(0.5), "inconclusive"),
    ],
)
def test_words(attention: Estimate, linear: Estimate, expected: str) -> None:
    assert word(attention, linear) == expected


@pytest.mark.parametrize(
    "worth", [Estimate(0.1, (-0.1, 0.3)), Estimate(-1.0, (-2.0, -0.5)), Estimate(1.0, (0.0, 2.0))]
)
def test_mixers_that_are_worth_nothing_for_sure(worth: Estimate) -> None:
    assert word(about(1.0), about(0.0), worth) == "inconclusive"
    recovered = {"attention": about(1.0), "linear": about(0.0)}
    verdict = judge_native({"zero": recovered, "mean": recovered}, {"zero": worth, "mean": worth})
    assert verdict.reason == (
        "The model is not clearly better with its mixers than without any. There is nothing to share out."
    )


@pytest.mark.parametrize(
    ("attention", "linear", "claim"),
    [
        (about(0.985), about(0.2), "whether losing the linear mixers costs anything: score"),
        (about(0.2), about(0.985), "whether losing attention costs anything: score"),
        (about(0.98), about(0.985), "whether losing attention costs anything and whether losing the linear"),
        (about(0.33), about(0.1), "whether attention can stand alone: score"),
        (about(0.1), about(0.33), "whether the linear mixers can stand alone: score"),
    ],
)
def test_open_questions_are_named(attention: Estimate, linear: Estimate, claim: str) -> None:
    recovered = {"attention": attention, "linear": linear}
    verdict = judge_native({"zero": recovered, "mean": recovered}, {"zero": WORTH, "mean": WORTH})
    assert claim in verdict.reason


def test_reason_has_the_figures() -> None:
    recovered = {"attention": about(0.6), "linear": about(0.1)}
    verdict = judge_native({"zero": recovered, "mean": recovered}, {"zero": WORTH, "mean": WORTH})
    assert verdict.reason == (
        "Of what all mixers are worth (2.000 nats per token), attention alone keeps 60.0% [59.0, 61.0] and "
        f"the linear mixers alone 10.0% [9.0, 11.0]. {WORDS['attention_led']}"
    )


def test_means_that_say_otherwise_are_told() -> None:
    verdict = judge_native(
        {
            "zero": {"attention": about(0.1), "linear": about(0.1)},
            "mean": {"attention": about(0.5), "linear": about(0.6)},
        },
        {"zero": WORTH, "mean": WORTH},
    )
    assert (verdict.word, verdict.mean_word) == ("interdependent", "balanced")
    assert "instead of zeros it is balanced: attention alone keeps 50.0%" in verdict.reason
