"""Taking a donor's rotary embedding off q and k again, for what need not know where a token stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class RotaryLayout:
    """How a family rotates the first R elements of a head; it leaves the others as they are.

    Attributes:
        pairs: which elements turn together: ``halves``, i and i + R / 2, or ``neighbours``, 2 i and 2 i + 1.
        angles: how cosines and sines come: one for each pair (``single``), all of them twice (``doubled``),
            or each of them twice (``repeated``).
    """

    pairs: Literal["halves", "neighbours"] = "halves"
    angles: Literal["single", "doubled", "repeated"] = "doubled"

    def of_pairs(self, values: Float[Tensor, "B T angles"]) -> Float[Tensor, "B T pairs"]:
        """A cosine or sine for each pair."""
        if self.angles == "single":
            return values
        return values[..., ::2] if self.angles == "repeated" else values[..., : values.shape[-1] // 2]


_LAYOUTS = {
    "cohere2": RotaryLayout("neighbours", "repeated"),
    "glm4": RotaryLayout("neighbours"),
    "gpt_oss": RotaryLayout(angles="single"),
}
"""Of families that differ from Llama's."""


def layout_of(module: nn.Module, model_type: str) -> RotaryLayout | None:
    """How an attention module rotates; None where it does not.

    Args:
        module: ``self_attn`` of a family that converts.
        model_type: the donor's.
    """
    own: Any = module
    positions_learned = model_type == "gpt2"
    layer_without = not getattr(own, "use_rope", True)  # one in four of SmolLM 3's
    global_layer = model_type == "cohere2" and own.sliding_window is None
    if positions_learned or layer_without or global_layer:
        return None
    return _LAYOUTS.get(model_type, RotaryLayout())


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a call's tokens.

    Attributes:
        cos, sin: as transformers hands them to attention, both times a factor in some families; one row may
            stand for the whole batch.
        layout: the family's.
    """

    cos: Float[Tensor, "B T angles"]
    sin: Float[Tensor, "B T angles"]
    layout: RotaryLayout

    def undone(self, x: Float[Tensor, "B heads T D"]) -> Float[Tensor, "B heads T D"]:
        """q or k as it was before, in x's precision: the inverse of what was done, also of its rounding."""
        cos, sin = (self.layout.of_pairs(t).to(x.dtype)[:, None] for t in (self.cos, self.sin))
        rotary = 2 * cos.shape[-1]
        turned, rest = x[..., :rotary], x[..., rotary:]
        halves = self.layout.pairs == "halves"
        first, second = turned.chunk(2, -1) if halves else (turned[..., ::2], turned[..., 1::2])
        size = cos.square() + sin.square()
        parts = (first * cos + second * sin) / size, (second * cos - first * sin) / size
        back = torch.cat(parts, -1) if halves else torch.stack(parts, -1).flatten(-2)
        return torch.cat([back, rest], -1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Rotation:
        """A function on both tensors: some of the tokens, other rows, another device."""
        return replace(self, cos=function(self.cos), sin=function(self.sin))
