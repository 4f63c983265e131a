"""Gates on what keys write into a linear branch's state, around the feature map of keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.layers.feature_maps import FeatureMap
from equipoise.layers.gate_scores import gate_scores


class WriteGate(nn.Module):
    """phi(k) exp(k . w), w per map: a key that matters little adds little to S and z, and so to every output.

    The exponent is clamped to ±8, which features of float32 bear; w starts at 0, where nothing is gated.

    Args:
        phi: the map of keys; its parameters are this module's too.
        squares: the gate sees the squares of k's elements as well, k . w + k^2 . u. Which keys are read from
            afar shows in how long they are, along some directions, which a linear function tells poorly.
    """

    LIMIT = 8.0

    def __init__(self, phi: FeatureMap, *, squares: bool = False) -> None:
        super().__init__()
        self.phi = phi
        self.heads, self.feature_dim = phi.heads, phi.feature_dim
        self.write_weight = nn.Parameter(torch.zeros(phi.heads, phi.head_dim))
        self.write_squares = nn.Parameter(torch.zeros(phi.heads, phi.head_dim)) if squares else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """The map's own start, and a gate that is open for all."""
        self.phi.reset_parameters(generator)
        self.write_weight.zero_()
        if self.write_squares is not None:
            self.write_squares.zero_()

    def products(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t"]:
        """k . w, or k . w + k^2 . u."""
        return gate_scores(x, self.write_weight, self.write_squares)

    def forward(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t F"]:
        """Map and gate a block, shapes as in `FeatureMap.forward`."""
        exponent = self.products(x)
        return self.phi(x) * exponent.clamp(-self.LIMIT, self.LIMIT).exp()[..., None]


class WriteStrength(WriteGate):
    """phi(k) sigmoid(k . w + b): the share of what the state says of a key that is replaced by its value.

    Starts at sigmoid(-4) = 0.02 for all keys: what is written erodes what is there, and most text is not
    worth it. From 0.12, hybrids of a pilot answered less of what lay furthest back (docs/research/02).
    """

    INITIAL = -4.0

    def __init__(self, phi: FeatureMap, *, squares: bool = False) -> None:
        super().__init__(phi, squares=squares)
        self.write_bias = nn.Parameter(torch.full((phi.heads, 1), self.INITIAL))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """The map's own start, and the same strength for all keys."""
        super().reset_parameters(generator)
        self.write_bias.fill_(self.INITIAL)

    def forward(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t F"]:
        """Map and weigh a block, shapes as in `FeatureMap.forward`."""
        strength = torch.sigmoid(self.products(x) + self.write_bias.to(x.dtype))
        return self.phi(x) * strength[..., None]
