"""From an ablation of whole mixers to a word: which kind of mixer the model leans on.

Thresholds are those of the audit of converted models (`Thresholds`): shares of the way from none to both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from equipoise.audit.evidence import Thresholds
from equipoise.audit.native_scores import Fill
from equipoise.audit.native_types import ROLES, Role
from equipoise.pages import percent
from equipoise.statistics import Estimate

Lean = Literal[
    "linear_unused",
    "attention_unused",
    "redundant",
    "balanced",
    "attention_led",
    "linear_led",
    "interdependent",
    "inconclusive",
]
Answer = Literal["yes", "no", "unclear"]

WORDS: dict[Lean, str] = {
    "linear_unused": "Nothing is lost without the linear mixers, and much without attention.",
    "attention_unused": "Nothing is lost without attention, and much without the linear mixers.",
    "redundant": "Nothing is lost without either kind of mixer alone: each does the other's work.",
    "balanced": "Each kind of mixer stands alone, and losing either costs something.",
    "attention_led": "Attention stands alone and the linear mixers do not; losing either costs something.",
    "linear_led": "The linear mixers stand alone and attention does not; losing either costs something.",
    "interdependent": "Neither kind of mixer stands alone: they work only together.",
    "inconclusive": "The intervals do not settle it, or the mixers are not clearly worth anything.",
}
"""What each word says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeVerdict:
    """A word for each kind of ablation, and a sentence with the figures of zero ablation."""

    word: Lean
    mean_word: Lean
    reason: str


def judge_native(
    recovered: Mapping[Fill, Mapping[Role, Estimate]],
    worth: Mapping[Fill, Estimate],
    thresholds: Thresholds | None = None,
) -> NativeVerdict:
    """The verdict. Zero ablation decides; mean ablation has its word beside it, where it says otherwise.

    Args:
        recovered: by fill, what the mixers of one role alone recover: 0 is none, 1 both.
        worth: by fill, v(both) - v(none) in the metric's unit.
        thresholds: None for the defaults.
    """
    limits = thresholds or Thresholds()
    words: dict[Fill, tuple[Lean, str]] = {
        fill: lean(recovered[fill], worth[fill], limits) for fill in recovered
    }
    (word, why), (mean_word, _) = words["zero"], words["mean"]
    reason = f"{_facts(recovered['zero'], worth['zero'])} {why}".strip()
    if mean_word != word:
        means = recovered["mean"]
        reason += (
            f" With mean outputs in their place instead of zeros it is {mean_word.replace('_', ' ')}: "
            f"attention alone keeps {percent(means['attention'])}, the linear mixers alone "
            f"{percent(means['linear'])}."
        )
    return NativeVerdict(word=word, mean_word=mean_word, reason=reason)


def lean(recovered: Mapping[Role, Estimate], worth: Estimate, limits: Thresholds) -> tuple[Lean, str]:
    """The word for one kind of ablation, and why.

    Every question is settled by its interval or left open, and an open one that matters is `inconclusive`.
    A role is *missed* if the other alone falls short of both by more than `window_tolerance`; it *stands
    alone* if it recovers more than `stands_alone`.
    """
    if not _worth_something(worth) or not all(recovered[role].defined for role in ROLES):
        return "inconclusive", "There is nothing to share out."
    attention_missed = _above(_short_of_both(recovered["linear"]), limits.window_tolerance)
    linear_missed = _above(_short_of_both(recovered["attention"]), limits.window_tolerance)
    if "unclear" in (attention_missed, linear_missed):
        return _open("losing {} costs anything", attention_missed, linear_missed)
    if (attention_missed, linear_missed) != ("yes", "yes"):
        return _told(_UNUSED[attention_missed, linear_missed])
    attention_stands = _above(recovered["attention"], limits.stands_alone)
    linear_stands = _above(recovered["linear"], limits.stands_alone)
    if "unclear" in (attention_stands, linear_stands):
        return _open("{} can stand alone", attention_stands, linear_stands)
    return _told(_MISSED[attention_stands, linear_stands])


# By the answers on attention and on the linear mixers: are they missed, and do they stand alone?
_UNUSED: dict[tuple[Answer, Answer], Lean] = {
    ("no", "no"): "redundant",
    ("yes", "no"): "linear_unused",
    ("no", "yes"): "attention_unused",
}
_MISSED: dict[tuple[Answer, Answer], Lean] = {
    ("yes", "yes"): "balanced",
    ("yes", "no"): "attention_led",
    ("no", "yes"): "linear_led",
    ("no", "no"): "interdependent",
}


def _told(word: Lean) -> tuple[Lean, str]:
    return word, WORDS[word]


def _open(claim: str, attention: Answer, linear: Answer) -> tuple[Lean, str]:
    names = {"attention": attention, "the linear mixers": linear}
    claims = " and whether ".join(claim.format(name) for name, answer in names.items() if answer == "unclear")
    return "inconclusive", f"The intervals do not settle whether {claims}: score more documents."


def _worth_something(worth: Estimate) -> bool:
    return worth.defined and worth.ci95[0] > 0


def _short_of_both(recovered: Estimate) -> Estimate:
    low, high = recovered.ci95
    return Estimate(1 - recovered.value, (1 - high, 1 - low))


def _above(value: Estimate, limit: float) -> Answer:
    low, high = value.ci95
    if low > limit:
        return "yes"
    return "no" if high <= limit else "unclear"


def _facts(recovered: Mapping[Role, Estimate], worth: Estimate) -> str:
    if not _worth_something(worth):
        return "The model is not clearly better with its mixers than without any."
    return (
        f"Of what all mixers are worth ({worth.value:.3f} nats per token), attention alone keeps "
        f"{percent(recovered['attention'])} and the linear mixers alone {percent(recovered['linear'])}."
    )
