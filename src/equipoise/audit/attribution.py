"""Which branch does the work: scores of branch states, a paired bootstrap, two-player Shapley values.

Input are sums per document, because documents are the clusters that the bootstrap resamples: tokens of one
document are not independent, documents are. Everything here is numpy; no model is needed to recompute an
audit.

The audited quantity v(state) is a *score*, higher is better. For likelihoods that is the negative
log-likelihood with its sign turned, in nats per token; accuracies fit the same table. States are named as in
arXiv 2510.05901: `both`, `window`, `linear`, `none`, `sinks`, and `softmax` for the donor. A branch name
without a suffix is the *literal* reading (the ablated term is zeroed, the survivor keeps its weight); the
suffix `_renormalised` marks the survivor normalised alone, at weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from equipoise.statistics import Draws, Estimate, Floats, ScoreTable, estimate

Reading = Literal["literal", "renormalised"]

READINGS: tuple[Reading, ...] = get_args(Reading)
DONOR = "softmax"
UNTRAINED = "linear_untrained"
"""The linear branch alone (renormalised) with its maps as they were before training: optional."""
KEPT = "kept"
"""Neither branch where the two can be told apart, and the layers and heads that keep a branch in any ablation
as they are: scored where there are such."""
HYBRID_STATES = ("both", "window", "linear", "none", "sinks", "window_renormalised", "linear_renormalised")


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchAttribution:
    """Shapley values of the two branches in one reading, and what they average; the metric's unit, but for
    the share.

    `window` and `linear` are the Shapley values (Shapley 1953) and add up to v(both) - v(none), none being
    the state of `empty`. Each is the mean of two marginals, which can disagree: a branch that is used but
    useless alone, or two that are redundant. `interaction` v(both) - v(window) - v(linear) + v(none) is
    negative for redundant branches, positive for branches that need each other. `linear_share` is linear /
    (window + linear), undefined where the hybrid does not beat the state of `empty`; it leaves
    0..1 where a branch does harm.
    """

    window: Estimate
    linear: Estimate
    interaction: Estimate
    window_given_linear: Estimate
    linear_given_window: Estimate
    window_alone: Estimate
    linear_alone: Estimate
    linear_share: Estimate


def check_states(table: ScoreTable) -> None:
    """Raise unless the donor and every branch state were scored.

    Raises:
        ValueError: a missing state.
    """
    missing = [state for state in (DONOR, *HYBRID_STATES) if state not in table.sums]
    if missing:
        raise ValueError(
            f"expected sums for every branch state, got none for {', '.join(missing)}; a model without "
            "one branch still needs it: use the scores of 'none' for the branch that is not there"
        )


def recovered(draws: Draws, state: str) -> Estimate:
    """Share of what attention is worth to the donor that `state` recovers: 0 is no attention, 1 the donor.

    For likelihoods this is (none - state) / (none - donor) in NLL. Undefined where the donor does not beat
    `none`.
    """
    return recovered_difference(draws, state, "none")


def recovered_difference(draws: Draws, state: str, other: str, *, zero: str = "none") -> Estimate:
    """recovered(state) - recovered(other), paired; 1 is the whole way from ``zero`` to the donor."""
    return estimate(_ratio(draws[state] - draws[other], draws[DONOR] - draws[zero]))


def empty(draws: Draws) -> str:
    """The state that both branches are switched off in: `KEPT` where it was scored, else no attention."""
    return KEPT if KEPT in draws.scores else "none"


def attribute(draws: Draws, reading: Reading) -> BranchAttribution:
    """Branch attribution of one reading: two-player Shapley values of v over {window, linear}.

    linear = 1/2 [(v(linear) - v(none)) + (v(both) - v(window))], window likewise (Shapley 1953, with the
    branch states of arXiv 2510.05901 as coalitions). Where layers or heads keep a branch in any ablation,
    neither branch is `KEPT`: what they earn is nobody's.
    """
    suffix = "" if reading == "literal" else f"_{reading}"
    both, none = draws["both"], draws[empty(draws)]
    window_state, linear_state = draws[f"window{suffix}"], draws[f"linear{suffix}"]
    window_alone, linear_alone = window_state - none, linear_state - none
    window_given_linear, linear_given_window = both - linear_state, both - window_state
    window = 0.5 * (window_alone + window_given_linear)
    linear = 0.5 * (linear_alone + linear_given_window)
    return BranchAttribution(
        window=estimate(window),
        linear=estimate(linear),
        interaction=estimate(both - window_state - linear_state + none),
        window_given_linear=estimate(window_given_linear),
        linear_given_window=estimate(linear_given_window),
        window_alone=estimate(window_alone),
        linear_alone=estimate(linear_alone),
        linear_share=estimate(_ratio(linear, window + linear)),
    )


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Element-wise ratio; NaN where the denominator is not positive: the scale then points the wrong way."""
    undefined = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
