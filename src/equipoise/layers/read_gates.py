"""What the weight of a window against its linear branch is computed from, token by token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gate_scores(
    q: Float[Tensor, "B H T D"],
    bias: Float[Tensor, "H 1"],
    weight: Float[Tensor, "H D"],
    squares: Float[Tensor, "H D"] | None = None,
) -> Float[Tensor, "B H T"]:
    """q . w + b, or q . w + q^2 . u + b, in the wider of q's precision and the parameters'.

    q comes rotated by its position. Of two elements that turn together neither stays what it is, so that a
    linear function of q says another thing of the same token elsewhere; the sum of their squares stays.

    Args:
        q: queries after rotary embedding.
        bias, weight, squares: b, w and u of each head.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(torch.promote_types(q.dtype, weight.dtype))
        scores = _product(q, weight)
        if squares is not None:
            scores = scores + _product(q.square(), squares)
        return scores + bias.to(q.dtype)


def _product(q: Tensor, weight: Tensor) -> Tensor:
    return (q @ weight.to(q.dtype)[..., None]).squeeze(-1)
