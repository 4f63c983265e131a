"""Feature maps phi: one learned projection per head, an activation, and (mostly) both signs of the
projection.

Shapes: B batch, heads of the input (H or N), t tokens, D head_dim, F feature dimension (D, 2D or 4D).
A new map is one class here, or in a file of its own that this one imports, under `FEATURE_MAPS.register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.registry import Registry

INITIAL_NOISE = 0.1
"""Standard deviation of what is added to the identity at initialisation (method of arXiv 2510.05901)."""


class FeatureMap(nn.Module, ABC):
    """phi(x) = activation(x W + bias), W per head.

    Args:
        heads: number of maps, each with its own W: query heads, or key/value heads.
        head_dim: D.
        feature_dim: F; W has F columns where the map is one-sided, F / 2 where it uses both signs.

    Raises:
        ValueError: a two-sided map with an odd feature dimension.
    """

    two_sided: ClassVar[bool] = True
    biased: ClassVar[bool] = False
    kernel: ClassVar[str | None] = None
    """The formula by which `equipoise.ops` may compute this map itself. Not inherited: it holds for the class
    that declares it, as a subclass may have another activation."""

    def __init__(self, heads: int, head_dim: int, feature_dim: int) -> None:
        super().__init__()
        if self.two_sided and feature_dim % 2:
            raise ValueError(
                f"a map that uses both signs needs an even feature dimension, got {feature_dim}."
            )
        columns = feature_dim // 2 if self.two_sided else feature_dim
        self.heads, self.feature_dim = heads, feature_dim
        self.weight = nn.Parameter(torch.empty(heads, head_dim, columns))
        self.bias = nn.Parameter(torch.zeros(heads, 1, columns)) if self.biased else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """W = identity (cut off, or repeated, where it is not square) + N(0, 0.1^2); no bias."""
        _, rows, columns = self.weight.shape
        identity = torch.eye(rows).repeat(1, -(-columns // rows))[:, :columns]
        noise = torch.randn(self.weight.shape, generator=generator) * INITIAL_NOISE
        self.weight.copy_(identity + noise)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t F"]:
        """Map a block; inputs with fewer heads than there are maps are shared by consecutive maps."""
        batch, heads, tokens, size = x.shape
        weight = self.weight.to(x.dtype).view(heads, self.heads // heads, size, -1)
        projected = (x[:, :, None] @ weight).reshape(batch, self.heads, tokens, weight.shape[-1])
        if self.bias is not None:
            projected = projected + self.bias.to(x.dtype)
        return self.activation(projected)

    @abstractmethod
    def activation(self, projected: Tensor) -> Tensor:
        """[B, maps, t, columns] -> [B, maps, t, F]."""


FEATURE_MAPS: Registry[type[FeatureMap]] = Registry("feature map")


@FEATURE_MAPS.register("hedgehog")
class Hedgehog(FeatureMap):
    """[softmax(xW), softmax(-xW)], clamped at 1e-12 (arXiv 2402.04347, in the form of arXiv 2510.05901)."""

    kernel = "hedgehog"

    def activation(self, projected: Tensor) -> Tensor:
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1).clamp_min(1e-12)


@FEATURE_MAPS.register("hedgehog-joint")
class JointHedgehog(FeatureMap):
    """softmax([xW, -xW]), clamped at 1e-12: both signs compete for one unit of mass.

    Of two softmaxes of c columns each, one is often diffuse, and then no pair of tokens weighs less than
    about 1 / c: hundreds of them drown a single match. One softmax can let them vanish.
    """

    def activation(self, projected: Tensor) -> Tensor:
        return torch.cat([projected, -projected], -1).softmax(-1).clamp_min(1e-12)


@FEATURE_MAPS.register("exp")
class Exponential(FeatureMap):
    """exp([xW, -xW] - the row's maximum).

    Where linear attention is normalised on its own (``convex`` mixing, or alone) the maximum cancels in
    phi(q). Under ``shared`` mixing it does not: there it scales linear attention against the window. In
    phi(k) it never cancels: it takes each key down to the same largest feature. Without it features reach
    6e4 at initialisation, past float16.
    """

    def activation(self, projected: Tensor) -> Tensor:
        both = torch.cat([projected, -projected], -1)
        return torch.exp(both - both.amax(-1, keepdim=True))


@FEATURE_MAPS.register("relu")
class ReLU(FeatureMap):
    """relu(xW + b), one-sided (T2R, arXiv 2103.13076)."""

    two_sided = False
    biased = True

    def activation(self, projected: Tensor) -> Tensor:
        return projected.relu()


@FEATURE_MAPS.register("elu")
class ELU(FeatureMap):
    """1 + ELU([xW, -xW]) (arXiv 2006.16236, with both signs)."""

    def activation(self, projected: Tensor) -> Tensor:
        return 1 + nn.functional.elu(torch.cat([projected, -projected], -1))


@FEATURE_MAPS.register("none")
class Identity(FeatureMap):
    """xW itself, one-sided. Its weights change sign and so do the denominators: a control, no advice."""

    two_sided = False

    def activation(self, projected: Tensor) -> Tensor:
        return projected


class WriteGate(nn.Module):
    """phi(k) exp(k . w), w per map: a key that matters little adds little to S and z, and so to every output.

    The exponent is clamped to ±8, which features of float32 bear; w starts at 0, where nothing is gated.

    Args:
        phi: the map of keys; its parameters are this module's too.
    """

    LIMIT = 8.0

    def __init__(self, phi: FeatureMap) -> None:
        super().__init__()
        self.phi = phi
        self.heads, self.feature_dim = phi.heads, phi.feature_dim
        self.write_weight = nn.Parameter(torch.zeros(phi.heads, phi.weight.shape[1]))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """The map's own start, and a gate that is open for all."""
        self.phi.reset_parameters(generator)
        self.write_weight.zero_()

    def forward(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t F"]:
        """Map and gate a block, shapes as in `FeatureMap.forward`."""
        groups = self.heads // x.shape[1]
        weight = self.write_weight.to(x.dtype).view(x.shape[1], groups, -1)
        exponent = torch.einsum("bhtd,hgd->bhgt", x, weight).flatten(1, 2)
        return self.phi(x) * exponent.clamp(-self.LIMIT, self.LIMIT).exp()[..., None]
