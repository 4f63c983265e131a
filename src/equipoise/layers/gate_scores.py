"""What gates see of a query or key: a linear function of its elements, and one of their squares."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gate_scores(
    x: Float[Tensor, "B heads t D"],
    weight: Float[Tensor, "maps D"],
    squares: Float[Tensor, "maps D"] | None = None,
) -> Float[Tensor, "B maps t"]:
    """x . w, or x . w + x^2 . u, in x's precision.

    x comes rotated by its position. Of two elements that turn together neither stays what it is, so that a
    linear function says another thing of the same token elsewhere; the sum of their squares stays.

    Args:
        x: queries or keys after rotary embedding; consecutive maps read the same head.
        weight, squares: w and u of each map.
    """
    scores = _product(x, weight)
    return scores if squares is None else scores + _product(x.square(), squares)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    by_input = weight.to(x.dtype).view(x.shape[1], -1, weight.shape[-1])
    return torch.einsum("bhtd,hgd->bhgt", x, by_input).flatten(1, 2)
