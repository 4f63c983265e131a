"""Feature maps phi: one learned projection per head, an activation, and (mostly) both signs of the
projection.

Shapes: B batch, heads of the input (H or N), t tokens, D head_dim, F feature dimension (D, 2D or 4D).
A new map is one class here, or in a file of its own that this one imports, under `FEATURE_MAPS.register`.
"""

from __future__ import annotations

import math
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
    looks_up: ClassVar[bool] = True
    """Whether features of queries depend on the query; else the branch is a mean, and cannot stand alone."""
    biased: ClassVar[bool] = False
    of_keys: bool = False
    """Whether this is the map of keys, for the few maps that treat the two sides differently; the mixer sets
    it by `for_keys`."""
    unit_length: ClassVar[bool] = False
    """Whether features of keys have length 1, as the delta rule wants them."""
    kernel: ClassVar[str | None] = None
    """The formula by which `equipoise.ops` may compute this map itself. Not inherited: it holds for the class
    that declares it, as a subclass may have another activation."""

    def __init__(self, heads: int, head_dim: int, feature_dim: int) -> None:
        super().__init__()
        if self.two_sided and feature_dim % 2:
            raise ValueError(
                f"a map that uses both signs needs an even feature dimension, got {feature_dim}."
            )
        columns = self.columns(feature_dim)
        self.heads, self.head_dim, self.feature_dim = heads, head_dim, feature_dim
        self.weight = nn.Parameter(torch.empty(heads, head_dim, columns))
        self.bias = nn.Parameter(torch.zeros(heads, 1, columns)) if self.biased else None

    @classmethod
    def columns(cls, feature_dim: int) -> int:
        """How many columns W has for F features."""
        return feature_dim // 2 if cls.two_sided else feature_dim

    def for_keys(self) -> FeatureMap:
        """The same map, as that of keys."""
        self.of_keys = True
        return self

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
        return self.activation(self.project(x))

    def project(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t columns"]:
        """x W + bias."""
        batch, heads, tokens, size = x.shape
        weight = self.weight.to(x.dtype).view(heads, self.heads // heads, size, -1)
        projected = (x[:, :, None] @ weight).reshape(batch, self.heads, tokens, weight.shape[-1])
        if self.bias is not None:
            projected = projected + self.bias.to(x.dtype)
        return projected

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


LARGEST_EXPONENT = 20.0
"""Where exponents of keys end: features from 2e-9 to 5e8 leave room in float32 for sums of a million keys,
and keep denominators above what counts as 0."""


@FEATURE_MAPS.register("performer")
class Performer(FeatureMap):
    """FAVOR+'s positive random features, exp(x'W - |x'|^2 / 2) / sqrt(F) for x' = x / D^(1/4).

    W starts as Gaussian directions, orthogonal in blocks of D columns, the same for queries and keys and for
    all heads of a layer: phi(q) . phi(k) then estimates exp(q . k / sqrt(D)) without bias. From there W is
    learned like that of any other map; untrained, this is FAVOR+ itself (arXiv 2009.14794). A query's
    largest exponent is taken off all of its exponents, which cancels where linear attention is normalised on
    its own. A key's exponents are clamped to ±20.
    """

    two_sided = False

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw W from the generator's seed, not its state, so that queries and keys have the same."""
        _, rows, columns = self.weight.shape
        self.weight.copy_(orthogonal_gaussian(rows, columns, shared_start(generator)))

    def forward(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t F"]:
        """Map a block, shapes as in `FeatureMap.forward`."""
        scaled = x * x.shape[-1] ** -0.25
        exponent = self.project(scaled)
        if self.of_keys:
            half = scaled.square().sum(-1, keepdim=True) / 2
            exponent = exponent - half.repeat_interleave(self.heads // x.shape[1], 1)
        return self.activation(exponent)

    def activation(self, projected: Tensor) -> Tensor:
        return _stable_exponential(projected, of_keys=self.of_keys) * self.feature_dim**-0.5


@FEATURE_MAPS.register("taylor")
class Taylor(FeatureMap):
    """[1, y, y y^T / sqrt(2), 0...] for y = x W / D^(1/4): exp to second order (Based, arXiv 2402.18668).

    phi(q) . phi(k) = 1 + s + s^2 / 2 >= 1/2 for s = y_q . y_k. W has the most columns d' that leave
    1 + d' + d'^2 <= F, and starts as orthonormal directions times sqrt(D / d'), the same for queries and
    keys, so that s estimates q . k / sqrt(D).
    """

    two_sided = False

    @classmethod
    def columns(cls, feature_dim: int) -> int:
        """d'."""
        return (math.isqrt(4 * feature_dim - 3) - 1) // 2

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw W from the generator's seed, not its state, so that queries and keys have the same."""
        _, rows, columns = self.weight.shape
        directions = orthogonal_gaussian(rows, columns, shared_start(generator))
        self.weight.copy_(directions / directions.norm(dim=0) * (rows / columns) ** 0.5)

    def forward(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t F"]:
        """Map a block, shapes as in `FeatureMap.forward`."""
        return self.activation(self.project(x * x.shape[-1] ** -0.25))

    def activation(self, projected: Tensor) -> Tensor:
        squares = (projected[..., :, None] * projected[..., None, :]).flatten(-2) * 0.5**0.5
        features = torch.cat([torch.ones_like(projected[..., :1]), projected, squares], -1)
        return nn.functional.pad(features, (0, self.feature_dim - features.shape[-1]))


@FEATURE_MAPS.register("landmark")
class Landmark(FeatureMap):
    """Similarities to F landmarks per head, with the inverse of the landmarks' own folded into the queries.

    phi(q) = softmax(u(q)) M, not below 1e-12, and phi(k) = exp(u(k)), for u(x)_m = (x . l_m - |l_m|^2 / 2) /
    sqrt(D) with landmarks l_m, the columns of W. They start as standard Gaussian vectors, the same for
    queries and keys, and M as the inverse of exp(-|l_i - l_j|^2 / (2 sqrt(D))). phi(q) . phi(k) is then the
    Nystroem approximation of exp(q . k / sqrt(D)), up to a factor of q, which cancels, and to the floor,
    which keeps weights positive; where q is a landmark it is exact. Landmarks and M are learned from there,
    those of queries and keys apart, and M is an inverse no longer. A key's u is clamped to ±20.

    Nystroemformer (arXiv 2102.03902) takes means of segments of the text as landmarks, which look ahead, and
    normalises each landmark's weights over all keys before the inverse. Here landmarks are parameters,
    weights are normalised once, by phi(q) . z, and the state is that of any linear attention.
    """

    two_sided = False

    def __init__(self, heads: int, head_dim: int, feature_dim: int) -> None:
        super().__init__(heads, head_dim, feature_dim)
        self.inverse: nn.Parameter | None = nn.Parameter(torch.empty(heads, feature_dim, feature_dim))

    def for_keys(self) -> FeatureMap:
        """The same map, as that of keys: without an inverse."""
        self.inverse = None
        return super().for_keys()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw landmarks from the generator's seed, not its state, so that queries and keys have the same."""
        _, rows, columns = self.weight.shape
        landmarks = torch.randn(rows, columns, generator=shared_start(generator), dtype=torch.float64)
        self.weight.copy_(landmarks)
        if self.inverse is not None:
            distances = torch.cdist(landmarks.mT, landmarks.mT).square() / (2 * rows**0.5)
            kernel = (-distances).exp() + 1e-6 * torch.eye(columns, dtype=torch.float64)
            self.inverse.copy_(torch.linalg.inv(kernel))

    def project(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t columns"]:
        """u(x)."""
        half = self.weight.to(x.dtype).square().sum(1)[:, None] / 2  # [maps, 1, F]
        return (super().project(x) - half) * x.shape[-1] ** -0.5

    def activation(self, projected: Tensor) -> Tensor:
        if self.inverse is None:
            return _stable_exponential(projected, of_keys=True)
        return (projected.softmax(-1) @ self.inverse.to(projected.dtype)).clamp_min(1e-12)


def _stable_exponential(exponent: Tensor, *, of_keys: bool) -> Tensor:
    """exp: of a query over its largest feature, of a key between bounds."""
    if of_keys:
        return exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
    return (exponent - exponent.amax(-1, keepdim=True)).exp()


def shared_start(generator: torch.Generator) -> torch.Generator:
    """A generator that starts anew from the other's seed, which a layer's two maps have in common."""
    return torch.Generator().manual_seed(generator.initial_seed())


def orthogonal_gaussian(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Gaussian vectors as columns, in blocks of ``rows`` orthogonal ones (arXiv 2009.14794, section 3.2).

    Each column alone is standard normal: its direction is uniform, and its length that of a Gaussian vector.
    """
    blocks: list[Tensor] = []
    for _ in range(-(-columns // rows)):
        gaussian = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
        orthogonal, upper = torch.linalg.qr(gaussian)
        blocks.append(orthogonal * upper.diagonal().sign())  # uniform over rotations
    lengths = torch.randn(rows, columns, generator=generator, dtype=torch.float64).norm(dim=0)
    return torch.cat(blocks, 1)[:, :columns] * lengths


@FEATURE_MAPS.register("constant")
class Constant(FeatureMap):
    """1, whatever the token: nothing to learn, and one feature is as good as many.

    The state is the sum of all values and their number, E + 1 numbers a head, and linear attention is their
    mean; with a `WriteGate` a weighted one. For heads that look far without looking for one thing.
    """

    two_sided = False
    looks_up = False

    def __init__(self, heads: int, head_dim: int, feature_dim: int) -> None:
        nn.Module.__init__(self)
        self.heads, self.head_dim, self.feature_dim = heads, head_dim, feature_dim

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Nothing to reset."""

    def forward(self, x: Float[Tensor, "B heads t D"]) -> Float[Tensor, "B maps t F"]:
        """Ones."""
        return x.new_ones(x.shape[0], self.heads, x.shape[2], self.feature_dim)

    def activation(self, projected: Tensor) -> Tensor:
        return torch.ones_like(projected)


from equipoise.layers import unit_maps as unit_maps  # noqa: E402 - registers its maps, which derive from these
