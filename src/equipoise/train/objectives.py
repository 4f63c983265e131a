"""Transfer objectives: what a layer's feature maps learn from the donor's attention.

A new objective is one function under `OBJECTIVES.register`. It sees one layer and returns one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from equipoise.config import ConfigError
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.ops import Branches
from equipoise.ops.transfer_loss import transfer_cross_entropy
from equipoise.ops.types import accumulation_dtype
from equipoise.registry import Registry


@dataclass(frozen=True)
class LayerTarget:
    """One layer of one batch: the donor's inputs and output, and the mixer that learns from them.

    Attributes:
        mixer: the layer's feature maps and gate, the only thing that trains.
        inputs: the donor's q, k, v, cut from the graph.
        output: the donor's softmax attention output [B, H, T, E].
        astray: how far windows alone lead the donor astray at each token, in nats [B, T]
            (`equipoise.train.losses.astray`); None unless an objective of `FAR_OBJECTIVES` is asked for.
    """

    mixer: HybridMixer
    inputs: LayerInputs
    output: Tensor
    astray: Tensor | None = None

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k), computed once for all objectives of a sum."""
        return self.mixer.features(self.inputs)

    def hybrid(self, branches: Branches) -> Tensor:
        """The mixer's own output in a branch state [B, H, T, E]."""
        phi_q, phi_k = self.features
        return self.mixer.hybrid(self.inputs, branches=branches, phi_q=phi_q, phi_k=phi_k)[0]

    def mean(self, per_token: Tensor) -> Tensor:
        """Mean of [B, H, T] over heads and real tokens."""
        mask = self.inputs.key_mask
        if mask is None:
            return per_token.mean()
        kept = mask[:, None].expand_as(per_token)
        return per_token.masked_fill(~kept, 0).sum() / kept.sum().clamp_min(1)

    def far_mean(self, per_token: Tensor) -> Tensor:
        """Mean of [B, H, T] over heads and tokens, these weighted by the square of `astray`, then over rows.

        Rows count alike, but for those where windows lose next to nothing: a mean over the tokens of a micro
        batch would depend on what shares it.
        """
        assert self.astray is not None
        weight = self.astray.to(per_token.dtype).square()
        if self.inputs.key_mask is not None:
            weight = weight.masked_fill(~self.inputs.key_mask, 0)
        total = (weight[:, None] * per_token).sum((1, 2))
        of_rows = weight.sum(1).clamp_min(LEAST_LOST * weight.shape[1]) * per_token.shape[1]
        return (total / of_rows).mean()


LEAST_LOST = 1e-4
"""Mean square of what windows lose in a row, in nats^2, below which the row counts less: else one without any
lookup would weigh the rounding of its tokens as much as another its lookups."""
Objective = Callable[[LayerTarget], Tensor]
OBJECTIVES: Registry[Objective] = Registry("transfer objective")
FAR_OBJECTIVES = frozenset({"far-output"})
"""Those that look at predictions too, and so take two more passes of the whole model a step."""


@OBJECTIVES.register("weights")
def weights(target: LayerTarget) -> Tensor:
    """Cross-entropy, in nats a row, from the donor's weights to linear attention's (arXiv 2402.04347)."""
    if target.mixer.config.state_update == "delta":
        raise ConfigError(
            "transfer objective weights: the delta rule has no weights on keys to compare; take output."
        )
    inputs, (phi_q, phi_k) = target.mixer.linear_inputs(target.inputs), target.features
    return target.mean(
        transfer_cross_entropy(
            inputs.q, inputs.k, phi_q, phi_k, scale=inputs.scale, softcap=inputs.softcap,
            window=inputs.sliding_window, key_mask=inputs.key_mask, segment_ids=inputs.segment_ids,
            sink_logits=inputs.sink_logits,
        )
    )  # fmt: skip


def _squared_error(target: LayerTarget, branches: Branches) -> Tensor:
    """From the donor's output to the mixer's in a branch state, mean over E [B, H, T]."""
    output = target.hybrid(branches)
    dtype = accumulation_dtype(output.dtype)
    return (output.to(dtype) - target.output.to(dtype)).square().mean(-1)


LINEAR_ALONE = Branches(window=False, reading="renormalised")


@OBJECTIVES.register("output")
def output(target: LayerTarget) -> Tensor:
    """Mean squared error from the donor's attention output to linear attention alone, over all keys."""
    return target.mean(_squared_error(target, LINEAR_ALONE))


@OBJECTIVES.register("far-output")
def far_output(target: LayerTarget) -> Tensor:
    """The same, each token weighted by the square of how far windows alone lead the donor astray there.

    Few tokens ask for something that lies beyond all windows; among all others they hardly count, and maps
    that learn from all of them alike learn to be a mean (docs/research/06). Not squared, these weights leave
    most of the sum to text, of which there is a hundred times as much (docs/research/02).
    """
    return target.far_mean(_squared_error(target, LINEAR_ALONE))


@OBJECTIVES.register("hybrid-output")
def hybrid_output(target: LayerTarget) -> Tensor:
    """Mean squared error to the hybrid's output (LoLCATs, arXiv 2410.10254).

    The cause of component collapse: the window explains the target, and the maps have little left to learn.
    """
    return target.mean(_squared_error(target, Branches()))


@dataclass(frozen=True)
class WeightedSum:
    """One objective from several and their weights; `weighted_sum` makes it.

    Attributes:
        terms: objectives and their weights.
        is_far: whether one of them looks at `LayerTarget.astray`.
    """

    terms: Sequence[tuple[Objective, float]]
    is_far: bool

    def __call__(self, target: LayerTarget) -> Tensor:
        """The sum, a scalar."""
        return torch.stack([weight * objective(target) for objective, weight in self.terms]).sum()


def weighted_sum(objectives: Mapping[str, float]) -> WeightedSum:
    """One objective from several and their weights.

    Raises:
        UnknownNameError: no such objective.
    """
    terms = [(OBJECTIVES[name], weight) for name, weight in objectives.items()]
    return WeightedSum(terms, bool(FAR_OBJECTIVES & objectives.keys()))
