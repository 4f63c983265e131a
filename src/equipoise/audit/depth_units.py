"""The pieces that attribution in depth switches off: one branch of one layer, or of one head.

A model without some pieces is scored by a `Score`, any metric at all; `Scorer` asks for each set only once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.audit.evaluate import score_documents
from equipoise.data.packing import EvaluationWindow
from equipoise.layers.mixer import AttentionMode, HybridMixer
from equipoise.models.branches import converted_mixers
from equipoise.ops import Branches
from equipoise.ops.types import Reading
from equipoise.statistics import Floats, ScoreTable

BranchName = Literal["window", "linear"]
BRANCH_NAMES: tuple[BranchName, ...] = ("window", "linear")

Score = Callable[[nn.Module], tuple[Floats, Floats]]
"""A model as it stands -> (summed score, weight) of each document, both [documents]; higher is better.

The score of the whole is sum / sum: nats a token, or correct answers a question. The weights must not depend
on the branch state, and the same call must give the same figures.
"""


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """One branch in one place.

    Attributes:
        layer: index of the layer in the model.
        branch: which branch.
        head: a query head of that layer; None for all of them.
    """

    layer: int
    branch: BranchName
    head: int | None = None

    def __str__(self) -> str:
        place = f"layer {self.layer}" if self.head is None else f"layer {self.layer}, head {self.head}"
        return f"{self.branch} branch of {place}"


def layer_units(model: nn.Module) -> list[Unit]:
    """Every branch of every converted layer, in the order of the layers.

    Raises:
        ConversionError: the model is not converted.
    """
    return [
        Unit(mixer.layer_idx, branch)
        for mixer in converted_mixers(model)
        for branch in BRANCH_NAMES
        if has_branch(mixer, branch)
    ]


def head_units(model: nn.Module) -> list[Unit]:
    """Every branch of every query head, in the order of layers and heads."""
    heads = {mixer.layer_idx: mixer.heads for mixer in converted_mixers(model)}
    return [
        Unit(unit.layer, unit.branch, head)
        for unit in layer_units(model)
        for head in range(heads[unit.layer])
    ]


def has_branch(mixer: HybridMixer, branch: BranchName) -> bool:
    """Whether a layer has this branch at all."""
    config = mixer.config
    return (config.window if branch == "window" else config.feature_map) is not None


@contextmanager
def without(model: nn.Module, off: Collection[Unit], reading: Reading) -> Generator[None]:
    """Run the hybrid with some of its pieces switched off for the time of the block.

    Args:
        model: converted.
        off: what does not run; a head without either branch, or a layer, gives 0.
        reading: ``literal`` zeroes the term of what is off; ``renormalised`` lets the other branch of that
            layer or head attend alone at weight 1. Layers and heads with both branches are not touched.

    Raises:
        ConversionError: the model is not converted.
        ValueError: a layer or head that it does not have.
    """
    mixers = converted_mixers(model)
    _check(off, mixers)
    before = [mixer.mode for mixer in mixers]
    try:
        for mixer in mixers:
            here = [unit for unit in off if unit.layer == mixer.layer_idx]
            flags = {branch: _flag(here, branch, mixer.heads) for branch in BRANCH_NAMES}
            mixer.mode = AttentionMode("hybrid", Branches(flags["window"], flags["linear"], reading))
        yield
    finally:
        for mixer, mode in zip(mixers, before, strict=True):
            mixer.mode = mode


def _flag(off: Sequence[Unit], branch: BranchName, heads: int) -> bool | Tensor:
    """Whether a branch runs in a layer: a bool, or one for each head [1, H]."""
    mine = [unit.head for unit in off if unit.branch == branch]
    if not mine or None in mine:
        return not mine
    flag = torch.ones(1, heads, dtype=torch.bool)
    flag[0, mine] = False
    return flag


def _check(off: Collection[Unit], mixers: Sequence[HybridMixer]) -> None:
    heads = {mixer.layer_idx: mixer.heads for mixer in mixers}
    for unit in off:
        if unit.layer not in heads or not 0 <= (unit.head or 0) < heads[unit.layer]:
            raise ValueError(
                f"expected a converted layer, one of {sorted(heads)}, and one of its heads, got the {unit}"
            )


class Scorer:
    """Scores of one model without some of its pieces; each set is scored once.

    Heads of a layer that are off together are taken for the layer, so that a set has one name however finely
    it is cut.

    Args:
        model: converted.
        score: of the model as it stands.
        on_score: called after each set that was really scored.
    """

    def __init__(self, model: nn.Module, score: Score, on_score: Callable[[], None] = lambda: None) -> None:
        self.model, self.score, self.on_score = model, score, on_score
        self.heads = {mixer.layer_idx: mixer.heads for mixer in converted_mixers(model)}
        self.sums: dict[tuple[frozenset[Unit], Reading], Floats] = {}
        self.weights: Floats | None = None

    def __call__(self, off: Collection[Unit], reading: Reading) -> Floats:
        """Summed score of each document [documents] without ``off``.

        Raises:
            ValueError: weights that differ from those of earlier sets.
        """
        off = self._coarsest(off)
        key = off, reading if off else "literal"  # with everything on there is one reading
        if key not in self.sums:
            with without(self.model, off, reading):
                sums, weights = self.score(self.model)
            if self.weights is None:
                self.weights = np.asarray(weights, dtype=np.float64)
            elif not np.array_equal(self.weights, weights):
                raise ValueError(
                    "expected a score that weighs the same documents alike in every branch state, got other "
                    "weights than before; count items, not what the model makes of them"
                )
            self.sums[key] = np.asarray(sums, dtype=np.float64)
            self.on_score()
        return self.sums[key]

    def _coarsest(self, off: Collection[Unit]) -> frozenset[Unit]:
        """The same pieces, a layer's branch as one piece where it is off in every head."""
        heads: dict[tuple[int, BranchName], set[int | None]] = {}
        for unit in off:
            heads.setdefault((unit.layer, unit.branch), set()).add(unit.head)
        whole = {
            place for place, some in heads.items() if None in some or len(some) == self.heads.get(place[0])
        }
        kept = (unit for unit in off if (unit.layer, unit.branch) not in whole)
        return frozenset([*(Unit(layer, branch) for layer, branch in whole), *kept])

    def value(self, sums: Floats) -> float:
        """The score of the whole: sum over sum, in the metric's unit."""
        assert self.weights is not None, "score a set first"
        return float(sums.sum() / self.weights.sum())

    def table(self, sums: dict[str, Floats], *, metric: str, unit: str) -> ScoreTable:
        """Sums of several sets as one table.

        Raises:
            ValueError: fewer than two documents, or scores that are not finite.
        """
        assert self.weights is not None, "score a set first"
        return ScoreTable(metric=metric, unit=unit, sums=sums, weights=self.weights)


def likelihood(
    windows: Sequence[EvaluationWindow], *, batch_size: int = 8, tick: Callable[[], None] = lambda: None
) -> Score:
    """The audit's own score: the log-likelihood of held-out text, in nats, over its tokens.

    Args:
        windows: of single documents.
        batch_size: windows at a time.
        tick: called after each batch.
    """

    def score(model: nn.Module) -> tuple[Floats, Floats]:
        scores = score_documents(model, windows, beyond=None, batch_size=batch_size, tick=tick)
        return -scores.nll, scores.tokens

    return score
