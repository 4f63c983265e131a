"""Transfer objectives: what a layer's feature maps learn from the donor's attention.

A new objective is one function under `OBJECTIVES.register`. It sees one layer and returns one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """

    mixer: HybridMixer
    inputs: LayerInputs
    output: Tensor

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k), computed once for all objectives of a sum."""
        assert self.mixer.phi_q is not None
        assert self.mixer.phi_k is not None
        inputs = self.mixer.linear_inputs(self.inputs)
        dtype = accumulation_dtype(inputs.q.dtype)
        return self.mixer.phi_q(inputs.q.to(dtype)), self.mixer.phi_k(inputs.k.to(dtype))

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


Objective = Callable[[LayerTarget], Tensor]
OBJECTIVES: Registry[Objective] = Registry("transfer objective")


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


def _mean_squared_error(target: LayerTarget, output: Tensor) -> Tensor:
    dtype = accumulation_dtype(output.dtype)
    return target.mean((output.to(dtype) - target.output.to(dtype)).square().mean(-1))


@OBJECTIVES.register("output")
def output(target: LayerTarget) -> Tensor:
    """Mean squared error from the donor's attention output to linear attention alone, over all keys."""
    return _mean_squared_error(target, target.hybrid(Branches(window=False, reading="renormalised")))


@OBJECTIVES.register("hybrid-output")
def hybrid_output(target: LayerTarget) -> Tensor:
    """Mean squared error to the hybrid's output (LoLCATs, arXiv 2410.10254).

    The cause of component collapse: the window explains the target, and the maps have little left to learn.
    """
    return _mean_squared_error(target, target.hybrid(Branches()))


def weighted_sum(objectives: Mapping[str, float]) -> Objective:
    """One objective from several and their weights.

    Raises:
        UnknownNameError: no such objective.
    """
    terms = [(OBJECTIVES[name], weight) for name, weight in objectives.items()]

    def total(target: LayerTarget) -> Tensor:
        return torch.stack([weight * objective(target) for objective, weight in terms]).sum()

    return total
