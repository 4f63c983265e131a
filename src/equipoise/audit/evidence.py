"""What the use-verdict rests on: the evidence measured, and the thresholds it is held against.

All shares live on the recovered scale: 0 is the model without attention, 1 is the donor. Where layers or
heads keep a branch whatever is ablated, 0 is what they do by themselves (docs/adr/0032).
"""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.audit.attribution import KEPT, UNTRAINED, empty, recovered_difference
from equipoise.statistics import Draws, Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Where the verdicts change; shares of the recovered scale unless stated otherwise.

    Attributes:
        window_tolerance: two states closer than this do equally well. The collapsed hybrids that arXiv
            2510.05901 measures lose nothing without their linear branch (Mistral-7B, Llama-3.1-8B; but
            Llama-3-8B loses 0.04 of this scale), those in miniatures at most 0.004; a branch that is used
            adds several points.
        dead_linear: a linear branch that recovers no more than this alone is no better than no attention;
            nor has one learned anything that recovers no more than this above its own untrained maps.
        stands_alone: a branch that recovers at least this much alone can do the work. Not a natural constant:
            it lies below what the linear branch of Mistral-7B recovers alone after one epoch of `weights`
            transfer (0.37) and far above the same after `hybrid-output` (0.03; both from arXiv 2510.05901,
            above no attention).
        far: a straddled threshold is decided by the point estimate only if that lies at least this many times
            the threshold away from it; at 1 that means at or below zero, or at or above twice the threshold.
        lean: ... and only if the threshold cuts off no more than the outer part of the interval: the distance
            from value to threshold is at least this share of the distance from value to bound. 0.5 is about
            one standard error.
        benefit_margin: an advantage over the control smaller than this, in the metric's unit, is not worth
            the work.
    """

    window_tolerance: float = 0.015
    dead_linear: float = 0.05
    stands_alone: float = 0.33
    far: float = 1.0
    lean: float = 0.5
    benefit_margin: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.window_tolerance <= self.dead_linear < self.stands_alone < 1:
            raise ValueError(
                "expected 0 < window_tolerance <= dead_linear < stands_alone < 1, got "
                f"{self.window_tolerance}, {self.dead_linear}, {self.stands_alone}; order them"
            )
        if min(self.far, self.lean, self.benefit_margin) < 0:
            raise ValueError(
                "expected far, lean and benefit_margin to be zero or positive, got "
                f"{self.far}, {self.lean}, {self.benefit_margin}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the use-verdict is decided on: shares of the recovered scale, differences paired by document.

    Attributes:
        both: the hybrid.
        window_alone, linear_alone: one branch at weight 1 (renormalised).
        linear_adds: both - window_alone; negative where the window alone is better than the hybrid.
        window_adds: both - linear_alone.
        linear_removed: both - window (literal): what the hybrid loses without its linear term.
        window_removed: both - linear (literal).
        linear_live: what the linear branch alone recovers beyond no attention, or beyond the same branch with
            untrained maps where those were scored and recover anything (docs/adr/0006).
        partial: whether some layers or heads keep a branch whatever is ablated, and 0 is what they do.
        control_adds: the hybrid minus the untrained window with sinks at equal state bytes, on the same text,
            if it was measured. It flavours the advice; benefit is decided beyond both reaches only.
    """

    both: Estimate
    window_alone: Estimate
    linear_alone: Estimate
    linear_adds: Estimate
    window_adds: Estimate
    linear_removed: Estimate
    window_removed: Estimate
    linear_live: Estimate
    partial: bool = False
    control_adds: Estimate | None = None


def gather(draws: Draws, *, control: str | None = None) -> Evidence:
    """The evidence in bootstrap draws; `control` names the control's state, if it was measured."""
    zero = empty(draws)

    def more(state: str, other: str = zero) -> Estimate:
        return recovered_difference(draws, state, other, zero=zero)

    live = more("linear_renormalised")
    if UNTRAINED in draws.scores and more(UNTRAINED).value > 0:
        live = more("linear_renormalised", UNTRAINED)
    return Evidence(
        linear_live=live,
        both=more("both"),
        window_alone=more("window_renormalised"),
        linear_alone=more("linear_renormalised"),
        linear_adds=more("both", "window_renormalised"),
        window_adds=more("both", "linear_renormalised"),
        linear_removed=more("both", "window"),
        window_removed=more("both", "linear"),
        partial=zero == KEPT,
        control_adds=None if control is None else more("both", control),
    )
