"""The verdict on a hybrid: which branch does the work, whether the linear one pays, what to try next.

All use-thresholds live on the recovered scale: 0 is the model without attention, 1 is the donor; where layers
or heads keep a branch in any ablation, 0 is the model with nothing but these. "Alone"
without a word is the renormalised reading (the branch at weight 1), "removed" is the literal reading (the
other branch keeps the weight it has in the hybrid). Both are needed: failing alone is no proof of being
unused, and standing alone is no proof of being used.

Questions ("does linear alone recover more than 5%?") are answered from an interval: yes or no if it lies
wholly on one side of the threshold, else unclear, unless the point estimate lies far off (`Thresholds.far`,
`Thresholds.lean`) and decides; the reason then says so. The first rule that holds names the verdict; an
unclear one makes it `inconclusive`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.audit import advice
from equipoise.audit.evidence import Evidence, Thresholds, gather
from equipoise.statistics import Estimate

__all__ = [
    "Answer",
    "Benefit",
    "Evidence",
    "Finding",
    "Imbalance",
    "Thresholds",
    "Use",
    "Verdict",
    "decide_benefit",
    "decide_use",
    "exceeds",
    "gather",
    "judge",
]

Use = Literal[
    "window_only", "collapsed", "linear_only", "imbalanced", "redundant", "balanced", "inconclusive"
]
Benefit = Literal["beneficial", "not_beneficial", "untested", "inconclusive"]
Answer = Literal["yes", "no", "unclear"]
Imbalance = advice.Imbalance


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Two words, why, and one sentence on what to do next."""

    use: Use
    benefit: Benefit
    reason: str
    advice: str


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question, with the claim it settles.

    `by_point` marks an answer that the point estimate gave where the interval alone did not settle it.
    """

    claim: str
    answer: Answer
    by_point: bool = False

    def __invert__(self) -> Finding:
        flipped: dict[Answer, Answer] = {"yes": "no", "no": "yes", "unclear": "unclear"}
        return Finding(self.claim, flipped[self.answer], self.by_point)


def judge(
    evidence: Evidence,
    *,
    has_window: bool,
    has_linear: bool,
    benefit_difference: Estimate | None = None,
    benefit_reason: str | None = None,
    thresholds: Thresholds | None = None,
) -> Verdict:
    """Verdict on one run.

    Args:
        evidence: from `gather`.
        has_window, has_linear: which branches the model has at all.
        benefit_difference: score of the hybrid minus that of SWA + sinks at equal bytes, paired, on items
            beyond both reaches, in the metric's unit. None where there is none.
        benefit_reason: why there is none; required then.
        thresholds: None for the defaults.
    """
    limits = thresholds or Thresholds()
    use, use_reason, imbalance = decide_use(
        evidence, has_window=has_window, has_linear=has_linear, thresholds=limits
    )
    benefit, benefit_why = decide_benefit(benefit_difference, benefit_reason, thresholds=limits)
    window_better = _window_better(evidence, limits).answer == "yes"
    situation = advice.Situation(
        use=use,
        benefit=benefit,
        imbalance=imbalance,
        window_lead=-evidence.linear_adds.value if window_better else None,
        control_is_better=evidence.control_adds is not None and evidence.control_adds.ci95[1] < 0,
    )
    return Verdict(
        use=use, benefit=benefit, reason=f"{use_reason} {benefit_why}", advice=advice.advise(situation)
    )


def decide_use(
    evidence: Evidence, *, has_window: bool, has_linear: bool, thresholds: Thresholds
) -> tuple[Use, str, Imbalance | None]:
    """The use-verdict, its reason, and the kind of imbalance if it is one (`window_dead` with `linear_only`,
    where there is a window). Definitions, in the order they are
    asked:

    - `window_only`, `linear_only`: the model has no other branch (`linear_only`: or one that does nothing,
      see below).
    - `inconclusive`: no branch, an undefined scale, or neither branch nor both recover anything.
    - `redundant`: each branch alone is as good as both.
    - `collapsed`: the window alone is as good as both, and the linear branch alone is dead: no better
      than no attention, or than its own untrained maps, and not shown to stand alone either.
    - `linear_only`, of a model with both: the linear branch alone is as good as both, and the window alone is
      dead. A window has no maps to train, so no attention is all it is compared with.
    - `balanced`: each branch stands alone, and removing either from the hybrid costs something.
    - `imbalanced`: all else that is decided: a branch that cannot stand alone (a dead-looking linear branch
      that the hybrid nevertheless uses is here), or that can but is not used.
    """
    if not (has_window and has_linear):
        return (*_one_branch(has_window=has_window, has_linear=has_linear), None)
    if not all(part.defined for part in (evidence.both, evidence.window_alone, evidence.linear_alone)):
        less = "what cannot be ablated" if evidence.partial else "the model without attention"
        reason = f"Recovered performance is undefined: the donor does not clearly beat {less}."
        return "inconclusive", reason, None
    facts = _facts(evidence)
    if _window_better(evidence, thresholds).answer == "yes":
        facts += " The window alone, at weight 1, is better than the hybrid."
    findings = _findings(evidence, thresholds)
    by_point = False
    for use, needs in _RULES:
        asked = [findings[need] if wanted else ~findings[need] for need, wanted in needs.items()]
        rule = _all_of(asked)
        by_point = by_point or rule.by_point
        if rule.answer == "unclear":
            return "inconclusive", f"{facts} The intervals do not settle whether {rule.claim}.", None
        if rule.answer == "yes":
            dead: Imbalance | None = "window_dead" if use == "linear_only" else None
            return use, f"{facts} {_CONCLUSIONS[use]}{_CAVEAT if by_point else ''}", dead
    imbalance = _imbalance(findings)
    return "imbalanced", f"{facts} {_IMBALANCES[imbalance]}{_CAVEAT if by_point else ''}", imbalance


def decide_benefit(
    difference: Estimate | None, reason: str | None, *, thresholds: Thresholds
) -> tuple[Benefit, str]:
    """Benefit over SWA + sinks at equal state bytes on items beyond both reaches, and its reason.

    `not_beneficial`: the interval's upper bound lies below `benefit_margin`. `beneficial`: otherwise, if its
    lower bound lies above zero. `untested`: no difference was measured.

    Raises:
        ValueError: both or neither of a difference and a reason for its absence.
    """
    if (difference is None) == (reason is None):
        raise ValueError(
            "expected either a difference from the control or the reason why there is none, got "
            f"{'neither' if reason is None else 'both'}; pass exactly one"
        )
    if difference is None:
        return "untested", f"Benefit is untested: {(reason or '').removesuffix('.')}."
    low, high = difference.ci95
    against = "against SWA + sinks at equal bytes, beyond both reaches"
    measured = f"{difference.value:+.3f} [{low:+.3f}, {high:+.3f}] {against}"
    if not difference.defined:
        return "inconclusive", "The difference from SWA + sinks at equal bytes is undefined."
    if high < thresholds.benefit_margin:
        return "not_beneficial", f"The hybrid does not beat its control: {measured}."
    if low > 0:
        return "beneficial", f"The hybrid beats its control: {measured}."
    return "inconclusive", f"The interval does not settle a benefit: {measured}."


def exceeds(value: Estimate, limit: float, claim: str, thresholds: Thresholds) -> Finding:
    """Whether `value` is above `limit`: by its interval, or by a point estimate far off (`Thresholds`)."""
    low, high = value.ci95
    if not value.defined:
        return Finding(claim, "unclear")
    if low > limit:
        return Finding(claim, "yes")
    if high <= limit:
        return Finding(claim, "no")
    distance = abs(value.value - limit)
    towards_limit = value.value - low if value.value > limit else high - value.value
    if distance >= thresholds.far * abs(limit) and distance >= thresholds.lean * towards_limit:
        return Finding(claim, "yes" if value.value > limit else "no", by_point=True)
    return Finding(claim, "unclear")


def _findings(evidence: Evidence, limits: Thresholds) -> dict[str, Finding]:
    """Every question a rule may ask, answered."""
    tolerance, dead, alone = limits.window_tolerance, limits.dead_linear, limits.stands_alone

    # the burden of proof is the branch's: a dead one is not shown to stand alone
    shown: Answer = "yes" if evidence.linear_alone.ci95[0] > alone else "no"

    def above(value: Estimate, limit: float, claim: str) -> Finding:
        return exceeds(value, limit, claim, limits)

    return {
        "both_work": above(evidence.both, dead, "the hybrid recovers anything"),
        "window_works": above(evidence.window_alone, dead, "the window alone recovers anything"),
        "linear_works": above(
            evidence.linear_live, dead, "the linear branch alone does more than with untrained maps"
        ),
        "linear_adds": above(evidence.linear_adds, tolerance, "both do better than the window at weight 1"),
        "window_adds": above(
            evidence.window_adds, tolerance, "both do better than the linear branch at weight 1"
        ),
        "window_stands": above(evidence.window_alone, alone, "the window stands alone"),
        "linear_stands": above(evidence.linear_alone, alone, "the linear branch stands alone"),
        "linear_shown": Finding("the linear branch is shown to stand alone", shown),
        "linear_removed_costs": above(
            evidence.linear_removed, tolerance, "removing the linear branch costs anything"
        ),
        "window_removed_costs": above(
            evidence.window_removed, tolerance, "removing the window costs anything"
        ),
    }


def _window_better(evidence: Evidence, limits: Thresholds) -> Finding:
    claim = "the window alone is better than the hybrid"
    return exceeds(-evidence.linear_adds, limits.window_tolerance, claim, limits)


# In order; the first rule whose findings all have the wanted answer (True: yes) names the verdict. What no
# rule claims is `imbalanced`.
_RULES: tuple[tuple[Use, dict[str, bool]], ...] = (
    ("inconclusive", {"both_work": False, "window_works": False, "linear_works": False}),
    ("redundant", {"linear_adds": False, "window_adds": False}),
    ("collapsed", {"linear_adds": False, "linear_works": False, "linear_shown": False}),
    ("linear_only", {"window_adds": False, "window_works": False}),
    (
        "balanced",
        {
            "window_stands": True,
            "linear_stands": True,
            "linear_removed_costs": True,
            "window_removed_costs": True,
        },
    ),
)

_CONCLUSIONS: dict[Use, str] = {
    "inconclusive": "No state recovers anything, so there is no work to share out.",
    "redundant": "Either branch alone does nearly everything that both do.",
    "collapsed": (
        "The window does the work: alone it is as good as both, and the linear branch alone is no better "
        "than nothing, or than its untrained maps."
    ),
    "linear_only": (
        "The linear branch does the work: alone it is as good as both, and the window alone is no better "
        "than nothing."
    ),
    "balanced": "Each branch stands alone, and removing either costs the hybrid something.",
}


_IMBALANCES: dict[Imbalance, str] = {
    "neither_stands": "Neither branch stands alone: they work only together.",
    "linear_used": (
        "The linear branch is used but cannot stand alone: together the two do more than the window at "
        "weight 1."
    ),
    "linear_weak": "The window does most of the work: the linear branch is alive but cannot stand alone.",
    "window_weak": "The linear branch does most of the work: the window cannot stand alone.",
    "linear_idle": (
        "The linear branch could stand alone but the hybrid does not use it: removing it costs nothing."
    ),
    "window_idle": "The window could stand alone but the hybrid does not use it: removing it costs nothing.",
}

_CAVEAT = (
    " Some of this rests on point estimates far from their thresholds, not on the intervals: evaluate more "
    "documents."
)


def _all_of(findings: list[Finding]) -> Finding:
    """Three-valued conjunction: one no settles it, otherwise one unclear leaves it open."""
    noes = [finding for finding in findings if finding.answer == "no"]
    open_questions = [finding for finding in findings if finding.answer == "unclear"]
    if noes:
        return Finding("", "no", by_point=all(finding.by_point for finding in noes))
    if open_questions:
        return Finding(" and whether ".join(finding.claim for finding in open_questions), "unclear")
    return Finding("", "yes", by_point=any(finding.by_point for finding in findings))


def _one_branch(*, has_window: bool, has_linear: bool) -> tuple[Use, str]:
    if has_window:
        return "window_only", "The model has no linear branch."
    if has_linear:
        return "linear_only", "The model has no window branch."
    return "inconclusive", "No layer was converted, so there is no branch to judge."


def _imbalance(findings: dict[str, Finding]) -> Imbalance:
    """What is out of balance, most telling first. One part of `balanced` is a no here, or it would hold."""
    no = {name for name, finding in findings.items() if finding.answer == "no"}
    if {"linear_stands", "window_stands"} <= no:
        return "neither_stands"
    if "linear_stands" in no:
        return "linear_used" if findings["linear_adds"].answer == "yes" else "linear_weak"
    if "window_stands" in no:
        return "window_weak"
    return "linear_idle" if "linear_removed_costs" in no else "window_idle"


def _facts(evidence: Evidence) -> str:
    both, window, linear = (
        _percent(part) for part in (evidence.both, evidence.window_alone, evidence.linear_alone)
    )
    nothing = "the layers and heads that keep a branch (0%)" if evidence.partial else "no attention (0%)"
    return (
        f"Between {nothing} and the donor (100%), both branches recover {both}, the window alone "
        f"{window}, the linear branch alone {linear}{_beside_untrained(evidence)}."
    )


def _beside_untrained(evidence: Evidence) -> str:
    untrained = evidence.linear_alone.value - evidence.linear_live.value
    return f" (with untrained maps {untrained:.1%})" if untrained > 0 else ""


def _percent(part: Estimate) -> str:
    low, high = part.ci95
    return f"{part.value:.1%} [{low:.1%}, {high:.1%}]"
