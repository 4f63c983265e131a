"""What to try next after a verdict, as one concrete sentence.

The settings named here are the ones that moved the branch in question, in arXiv 2510.05901 or in our own
miniatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Imbalance = Literal[
    "neither_stands", "linear_used", "linear_weak", "window_weak", "linear_idle", "window_idle", "window_dead"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the advice depends on.

    Attributes:
        use, benefit: the verdict's two words.
        imbalance: the kind of imbalance, where `use` is `imbalanced`; `window_dead` where it is `linear_only`
            although there is a window.
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
        "text that lies beyond the window's reach."
    ),
    "linear_only": (
        "Convert by the zero-shot recipe, whose maps are trained without a window, and let one join: "
        "`hybrid.gate_value=0.9` at a `hybrid.window` of 32 and more, 0.7 at 8 to 16, 0.5 at fewer tokens."
    ),
    "collapsed": (
        "Train the linear branch on its own target (`transfer.objectives` of weights or output instead of "
        "hybrid-output, with `hybrid.mixing=convex`, as the hedgecats recipe does), then fine-tune with "
        "window dropout (`finetune.window_dropout`, as the ssd recipe does)."
    ),
    "redundant": (
        "Spend the bytes elsewhere: a much smaller `hybrid.window`, or a smaller state "
        "(`hybrid.feature_multiple=1`, `hybrid.map_heads=key_value`), should cost nothing on this text."
    ),
    "inconclusive": (
        "Audit at least four times as many documents (`--documents`), which halves the intervals, and make "
        "sure that the donor clearly beats no attention on this text and that training did not diverge."
    ),
}


_BY_IMBALANCE: dict[Imbalance, str] = {
    "neither_stands": (
        "Strengthen each branch: a wider `hybrid.window` with `hybrid.sinks=4`, and transfer of the linear "
        "branch on its own target (`transfer.objectives` of weights) with `transfer.max_steps=300` or more, "
        "`transfer.learning_rate=3e-2` and `hybrid.feature_multiple=4`."
    ),
    "linear_used": (
        "Fine-tune with window dropout (`finetune.window_dropout`, as the ssd recipe does), so that the "
        "linear branch, which the hybrid does use, learns to answer on its own."
    ),
    "linear_weak": (
        "Give the linear branch a longer transfer on its own target (`transfer.objectives` of weights, "
        "`transfer.max_steps=300` or more, `transfer.learning_rate=3e-2`, `hybrid.feature_multiple=4`), then "
        "fine-tune with window dropout (`finetune.window_dropout`, as the ssd recipe does)."
    ),
    "window_weak": (
        "Widen `hybrid.window` or set `hybrid.sinks=4` if local precision matters; otherwise drop the window "
        "(`hybrid.window=null`) and run the linear branch alone."
    ),
    "linear_idle": (
        "Make the hybrid use what it has: learn its mixing weight (`hybrid.gate=per_head` or "
        "`hybrid.gate=per_token`) and fine-tune with window dropout (`finetune.window_dropout`), so that the "
        "linear branch is not left at a weight that hardly counts."
    ),
    "window_idle": (
        "Give the window more weight (`hybrid.gate_value=0.9`, or learned by `hybrid.gate=per_head`), so "
        "that it counts as well."
    ),
    "window_dead": (
        "Drop the window (`hybrid.window=null`), whose bytes buy nothing on this text, or give it something "
        "to see: a wider `hybrid.window`, or `hybrid.sinks=4`."
    ),
}


def _balanced(case: Situation) -> str:
    if case.window_lead is not None:
        return (
            f"On this text the window alone at weight 1 recovers {100 * case.window_lead:.1f} points more "
            "than the hybrid: give the window more weight (`hybrid.gate_value=0.9` at a `hybrid.window` of "
            "32 and more, or learned by `hybrid.gate=per_head` or `hybrid.gate=per_token`), or train the "
            "hybrid longer (`finetune.epochs`) before calling the linear branch an asset."
        )
    if case.control_is_better:
        return (
            "The branches share the work, but an untrained window of equal bytes predicts this text better: "
            "move bytes from the state to the window (`hybrid.feature_multiple=1` with a larger "
            "`hybrid.window`), unless what lies beyond reach is what the linear branch is there for."
        )
    return _BY_BENEFIT[case.benefit]


_BY_BENEFIT = {
    "beneficial": "Keep this conversion; before relying on it, check generation as well as likelihood.",
    "not_beneficial": (
        "Give the linear branch something only it can answer: train on rows longer than the reach "
        "(`data.context_length`), with `hybrid.gate=per_token` and a smaller `hybrid.window`."
    ),
    "untested": (
        "Now test the benefit: audit at a context (`--context-length`) longer than the reach of this model "
        "and of SWA + sinks at equal bytes, or shorten both by a smaller `hybrid.window` and "
        "`hybrid.feature_multiple=1`."
    ),
    "inconclusive": (
        "Settle the benefit: audit at least four times as many documents (`--documents`), or at a longer "
        "context (`--context-length`), so that more tokens lie beyond reach."
    ),
}
