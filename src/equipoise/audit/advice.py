"""What to try next after a verdict, as one concrete sentence.

The settings named here are the ones that moved the branch in question, in arXiv 2510.05901 or in our own
miniatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Imbalance = Literal[
    "neither_stands", "linear_used", "linear_weak", "window_weak", "linear_idle", "window_idle"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the advice depends on.

    Attributes:
        use, benefit: the verdict's two words.
        imbalance: the kind of imbalance, where `use` is `imbalanced`.
        window_lead: recovered(window alone) - recovered(both) where that is clearly positive, otherwise None.
        control_is_better: an untrained window with sinks at equal bytes scores better on the same text.
    """

    use: str
    benefit: str
    imbalance: Imbalance | None
    window_lead: float | None
    control_is_better: bool


def advise(case: Situation) -> str:
    """One sentence: what to change, and to what."""
    if case.use == "balanced":
        return _balanced(case)
    if case.imbalance is not None:
        return _BY_IMBALANCE[case.imbalance]
    return _BY_USE[case.use]


_BY_USE = {
    "window_only": (
        "Use this run as the bar: a hybrid with the same state bytes is worth having only if it beats it on "
        "answers that lie beyond the window's reach."
    ),
    "linear_only": (
        "Add a window at inference, which needs no training: convex mixing with g = 0.5 for windows of a few "
        "tokens, 0.7 at 8 to 16, 0.9 at 32 and more."
    ),
    "collapsed": (
        "Train the linear branch on its own target (`weights` or `output` transfer with convex mixing "
        "instead of `hybrid-output` with a shared denominator, as the hedgecats recipe does), then fine-tune "
        "with window dropout 0.9 → 0.75 → 0.5 (the ssd recipe)."
    ),
    "redundant": (
        "Spend the bytes elsewhere: a much smaller window, or a smaller state (D_φ = D, maps per key/value "
        "head), should cost nothing here; then test recall beyond reach, where the two branches differ."
    ),
    "inconclusive": (
        "Evaluate at least four times as many documents, which halves the intervals, and make sure that the "
        "donor clearly beats no attention on this text and that training did not diverge."
    ),
}


_BY_IMBALANCE: dict[Imbalance, str] = {
    "neither_stands": (
        "Strengthen each branch: a wider window with 4 sinks, and transfer of the linear branch on its own "
        "target for 300 or more steps at lr 3e-2 with D_φ = 4D."
    ),
    "linear_used": (
        "Fine-tune with window dropout (the ssd recipe), or on the joint hybrid plus linear-only loss, so "
        "that the linear branch, which the hybrid does use, learns to answer on its own."
    ),
    "linear_weak": (
        "Give the linear branch a longer transfer on its own target (`weights`, 300 or more steps at lr "
        "3e-2, D_φ = 4D), then fine-tune with window dropout 0.9 → 0.75 → 0.5 (the ssd recipe)."
    ),
    "window_weak": (
        "Widen the window or add 4 sinks if local precision matters; otherwise drop the window and run the "
        "linear branch alone."
    ),
    "linear_idle": (
        "Make the hybrid use what it has: learn g per head or per token and fine-tune with window dropout, "
        "so that the linear branch is not left at a weight that hardly counts."
    ),
    "window_idle": (
        "Lower the linear branch's weight (raise g, or learn it per head), so that the window counts as well."
    ),
}


def _balanced(case: Situation) -> str:
    if case.window_lead is not None:
        return (
            f"On this text the window alone at weight 1 recovers {100 * case.window_lead:.1f} points more "
            "than the hybrid: raise the window's weight (g = 0.9 at windows of 32 and more, or learned per "
            "head or per token), or train the hybrid longer before calling the linear branch an asset."
        )
    if case.control_is_better:
        return (
            "The branches share the work, but an untrained window of equal bytes predicts this text better: "
            "keep the hybrid only if recall beyond reach improves, and move bytes from the first two layers' "
            "windows to later layers."
        )
    by_benefit = {
        "beneficial": "Keep this conversion; before relying on it, check generation as well as likelihood.",
        "not_beneficial": (
            "Give the linear branch something only it can answer: train on sequences longer than the reach, "
            "with a write gate and a per-token g, and keep windows in the first two layers small."
        ),
    }
    return by_benefit.get(
        case.benefit,
        "Now test the benefit: score recall items that lie beyond the reach of this model and of SWA + sinks "
        "at equal bytes.",
    )
