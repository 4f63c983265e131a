"""How far predictions are from one another. V words of the vocabulary."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from equipoise.ops.types import accumulation_dtype


def log_probabilities(logits: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape V"]:
    """log softmax over the vocabulary, in float32 or wider."""
    return logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)


def divergence(of: Float[Tensor, "*shape V"], to: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    """KL(of || to) in nats, from log-probabilities."""
    return (of.exp() * (of - to)).sum(-1)
