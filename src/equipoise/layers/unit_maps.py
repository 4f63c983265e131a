"""Feature maps of length 1, for the delta rule: linear ones, and products of projections.

Shapes as in `equipoise.layers.feature_maps`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipoise.layers.feature_maps import FEATURE_MAPS, FeatureMap, orthogonal_gaussian, shared_start


@FEATURE_MAPS.register("unit")
class Unit(FeatureMap):
    """xW / |xW|, for queries times a learned factor per head.

    For the delta rule, whose state has no normaliser. Of length 1 a key's features say which key it is; how
    strongly it is written is for `WriteStrength`.
    """

    two_sided = False
    unit_length = True

    def __init__(self, heads: int, head_dim: int, feature_dim: int) -> None:
        super().__init__(heads, head_dim, feature_dim)
        self.log_scale: nn.Parameter | None = nn.Parameter(torch.zeros(heads, 1, 1))

    def for_keys(self) -> FeatureMap:
        self.log_scale = None
        return super().for_keys()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """W as in any map; a factor of 1."""
        super().reset_parameters(generator)
        if self.log_scale is not None:
            self.log_scale.zero_()

    def activation(self, projected: Tensor) -> Tensor:
        unit = functional.normalize(projected, dim=-1)
        return unit if self.log_scale is None else unit * self.log_scale.to(unit.dtype).exp()


class Products(Unit):
    """What maps to products of projections share: W starts as orthogonal directions, in blocks of D."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw W from the generator's seed, not its state, so that queries and keys have the same."""
        super().reset_parameters(generator)
        _, rows, columns = self.weight.shape
        directions = orthogonal_gaussian(rows, columns, shared_start(generator))
        self.weight.copy_(directions / directions.norm(dim=0))


@FEATURE_MAPS.register("dpfp")
class ProjectedProducts(Products):
    """r_i r_(i+1) over all i, round to the first, for r = relu([xW, -xW]); scaled to length 1.

    As many nearly orthogonal directions as features: features of one key are 0 where another's are not. A
    linear map to more than D features has rank D all the same, and a state of the delta rule that many keys
    are written to then confuses them (docs/research/02). Queries have a learned factor, as in `Unit`.

    W starts as orthogonal directions, in blocks of D, the same for queries and keys: with F / 2 of them the
    identity would drop half of D where F = D.

    Source: DPFP with nu = 1, arXiv 2102.11174 section 5.2, whose r has no W and whose features sum to 1.
    """

    two_sided = True

    def activation(self, projected: Tensor) -> Tensor:
        parts = torch.cat([projected, -projected], -1).relu()
        return super().activation(parts * parts.roll(1, -1))


@FEATURE_MAPS.register("trilinear")
class Trilinear(Products):
    """(xA) (xB) (xC), element by element, scaled to length 1. Queries have a learned factor, as in `Unit`.

    A learned sketch of the cubic kernel (q . k)^3: keys that are half alike are an eighth alike in features,
    so that F of them hold more keys apart than the products of neighbours of `ProjectedProducts` do, which
    are 0 half of the time (docs/research/02). The signs of features are kept; the delta rule minds none.

    A, B and C, the columns of W, start as orthogonal directions, in blocks of D, the same for queries and
    keys.

    Source: random maps for dot product kernels, arXiv 1201.6530 section 3, whose projections are random signs
    and stay so.
    """

    two_sided = False
    FACTORS = 3

    @classmethod
    def columns(cls, feature_dim: int) -> int:
        """A, B and C side by side."""
        return cls.FACTORS * feature_dim

    def activation(self, projected: Tensor) -> Tensor:
        return super().activation(projected.unflatten(-1, (self.FACTORS, -1)).prod(-2))
