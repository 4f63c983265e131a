"""The part of a native audit that runs the model: held-out likelihood with every set of mixers taken out.

Only full forward passes are scored, without a cache: ablation during cached generation is not defined here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.audit.evaluate import score_documents
from equipoise.audit.native_ablation import (
    MeanOutputs,
    Place,
    ablated,
    find_mixers,
    intercepted,
    undisturbed,
)
from equipoise.audit.native_types import ROLES, Role
from equipoise.data.packing import EvaluationWindow
from equipoise.statistics import Floats, ScoreTable

Fill = Literal["zero", "mean"]
FILLS: tuple[Fill, ...] = get_args(Fill)
SURVIVORS = ("attention", "linear", "none")
"""States beside `both`, named after the mixers that stay."""
CALIBRATION_EVERY = 5
"""Every so many documents, one is set aside to take mean outputs on."""

Tick = Callable[[], None]


class NativeAuditError(RuntimeError):
    """A native hybrid whose ablations cannot be scored."""


@dataclass(frozen=True)
class Ablation:
    """A state of the model: which mixers are taken out, and what stands in for their outputs."""

    places: frozenset[Place]
    fill: Fill = "zero"

    @property
    def key(self) -> tuple[frozenset[Place], str]:
        """Equal for states that are the same; with nothing taken out, nothing stands in."""
        return self.places, self.fill if self.places else ""


@dataclass(frozen=True)
class Split:
    """Windows to take mean outputs on, and windows to score.

    `held_out` says whether they are of different documents.
    """

    calibration: list[EvaluationWindow]
    scored: list[EvaluationWindow]
    held_out: bool

    @property
    def calibration_text(self) -> str:
        """Which tokens the mean outputs are taken on, in words."""
        tokens = sum(len(window.input_ids) for window in self.calibration)
        documents = len({window.document for window in self.calibration})
        if not self.held_out:
            return (
                f"all {tokens:,} tokens of the {documents} documents that are scored too, since there are "
                f"fewer than {CALIBRATION_EVERY}"
            )
        return f"the {tokens:,} tokens of every fifth document ({documents} in all), which are not scored"


def other(role: Role) -> Role:
    """The other role."""
    return "linear" if role == "attention" else "attention"


def state_name(fill: Fill, survivor: str) -> str:
    """Of a state in the table: `zero/attention` has the linear mixers zeroed."""
    return f"{fill}/{survivor}"


def layer_name(fill: Fill, place: Place) -> str:
    """Of the state with one mixer taken out."""
    return f"{fill}/without {place.role} of layer {place.layer}"


def random_name(role: Role, draw: int) -> str:
    """Of a draw of random mixers, as many as there are of the role."""
    return f"zero/random for {role} {draw}"


def split_windows(windows: Sequence[EvaluationWindow]) -> Split:
    """Every fifth document for the means, the others to score; all for both if there are fewer than five."""
    order = sorted({window.document for window in windows})
    aside = set(order[CALIBRATION_EVERY - 1 :: CALIBRATION_EVERY])
    if not aside:
        return Split(list(windows), list(windows), held_out=False)
    return Split(
        [window for window in windows if window.document in aside],
        [window for window in windows if window.document not in aside],
        held_out=True,
    )


def plan(places: Sequence[Place], random: Mapping[Role, Sequence[frozenset[Place]]]) -> dict[str, Ablation]:
    """Every state to score, by name.

    Args:
        places: of all mixers.
        random: sets of mixers to zero as a control, by the role whose number they match.
    """
    of_role = {role: frozenset(place for place in places if place.role == role) for role in ROLES}
    states = {"both": Ablation(frozenset())}
    for fill in FILLS:
        for role in ROLES:
            states[state_name(fill, role)] = Ablation(of_role[other(role)], fill)
        states[state_name(fill, "none")] = Ablation(frozenset(places), fill)
        for place in places:
            states[layer_name(fill, place)] = Ablation(frozenset({place}), fill)
    for role, draws in random.items():
        for index, chosen in enumerate(draws):
            states[random_name(role, index)] = Ablation(chosen)
    return states


def random_sets(places: Sequence[Place], role: Role, *, draws: int, seed: int) -> list[frozenset[Place]]:
    """Different sets of mixers, each as many as `role` has, none of them the role's own mixers.

    Fewer than `draws` where there are no more; seeded.
    """
    own = frozenset(place for place in places if place.role == role)
    if math.comb(len(places), len(own)) - 1 <= draws:
        return [chosen for found in combinations(places, len(own)) if (chosen := frozenset(found)) != own]
    generator = np.random.default_rng([seed, ROLES.index(role)])
    sets: dict[frozenset[Place], None] = {}  # keeps the order of the draws
    while len(sets) < draws:
        picked = generator.choice(len(places), size=len(own), replace=False)
        chosen = frozenset(places[int(index)] for index in picked)
        if chosen != own:
            sets[chosen] = None
    return list(sets)


def passes(states: Mapping[str, Ablation]) -> int:
    """How often the text is run: equal states are scored once."""
    return len({state.key for state in states.values()})


@torch.no_grad()
def mean_outputs(
    model: nn.Module, windows: Sequence[EvaluationWindow], *, batch_size: int, tick: Tick = lambda: None
) -> dict[Place, Tensor]:
    """Every mixer's output [C], float64, averaged over all tokens of the windows, in the intact model."""
    kind, mixers = find_mixers(model)
    seen = MeanOutputs()
    device = next(model.parameters()).device
    with undisturbed(model), intercepted(model, kind, mixers, seen.observe):
        for group in equal_lengths(windows):
            for low in range(0, len(group), batch_size):
                ids = torch.stack([window.input_ids for window in group[low : low + batch_size]])
                model(input_ids=ids.to(device), use_cache=False)
                tick()
    return seen.means()


def score_states(
    model: nn.Module,
    windows: Sequence[EvaluationWindow],
    states: Mapping[str, Ablation],
    means: Mapping[Place, Tensor],
    *,
    batch_size: int,
    tick: Tick = lambda: None,
) -> ScoreTable:
    """Likelihood of every document in every state; `tick` is called after each batch.

    Raises:
        NativeAuditError: a likelihood that is not finite.
    """
    sums: dict[tuple[frozenset[Place], str], Floats] = {}
    tokens: Floats | None = None
    with undisturbed(model):
        for name, state in states.items():
            if state.key in sums:
                continue
            with ablated(model, state.places, means if state.fill == "mean" else None):
                nll, tokens = score_windows(model, windows, batch_size=batch_size, tick=tick)
            if not np.isfinite(nll).all():
                raise NativeAuditError(
                    f"expected finite likelihoods, got others in state {name!r}: the model overflows there. "
                    "Load it in float32, or in bfloat16 instead of float16."
                )
            sums[state.key] = nll
    assert tokens is not None
    return ScoreTable.from_nll({name: sums[state.key] for name, state in states.items()}, tokens)


def score_windows(
    model: nn.Module, windows: Sequence[EvaluationWindow], *, batch_size: int, tick: Tick = lambda: None
) -> tuple[Floats, Floats]:
    """Summed NLL in nats [D] and tokens [D] of every document, in the order of their numbers.

    Batches hold windows of one length: nothing is padded, so nothing depends on how a mixer treats padding.
    """
    documents = sorted({window.document for window in windows})
    nll, tokens = np.zeros(len(documents)), np.zeros(len(documents))
    for group in equal_lengths(windows):
        scores = score_documents(model, group, beyond=None, batch_size=batch_size, tick=tick)
        rows = np.searchsorted(documents, sorted({window.document for window in group}))
        nll[rows] += scores.nll
        tokens[rows] += scores.tokens
    return nll, tokens


def equal_lengths(windows: Sequence[EvaluationWindow]) -> list[list[EvaluationWindow]]:
    """Windows grouped by length, the longest first, so that memory runs out early."""
    groups: dict[int, list[EvaluationWindow]] = {}
    for window in windows:
        groups.setdefault(len(window.input_ids), []).append(window)
    return [groups[length] for length in sorted(groups, reverse=True)]


def batches(windows: Sequence[EvaluationWindow], batch_size: int) -> int:
    """How many batches `score_windows` runs."""
    return sum(-(-len(group) // batch_size) for group in equal_lengths(windows))
