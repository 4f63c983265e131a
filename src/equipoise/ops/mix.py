"""Mixing rules: how the window's softmax and linear attention become one output.

A rule returns two *terms* whose sum is the hybrid's output, so that a literal ablation is the sum without one
of them and no rule needs to know about ablations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.registry import Registry

EPSILON = 1e-12
"""Smallest magnitude of a denominator; below it (only activations without a positive floor get there) the
sign is kept and the magnitude is clamped, so that 0/0 is 0."""


@dataclass(frozen=True)
class Branch:
    """One branch before normalisation.

    Attributes:
        numerator: weighted sum of values [B, H, T, E].
        denominator: sum of the weights [B, H, T, 1]. The window's weights are exp(score - row maximum).
        visible: whether any key was there to see, broadcastable to [B, H, T, 1].
        top: the row maximum [B, H, T, 1]; of the window only.
    """

    numerator: Tensor
    denominator: Tensor
    visible: Tensor
    top: Tensor | None = None

    def normalised(self) -> Tensor:
        """The branch alone at weight 1 [B, H, T, E]; rows without a key give 0."""
        return divide(self.numerator, self.denominator)


MixingRule = Callable[[Branch, Branch, Tensor], tuple[Tensor, Tensor]]
"""(window, linear, gate broadcastable to [B, H, T, 1]) -> the two branches' terms, each [B, H, T, E]."""

MIXING_RULES: Registry[MixingRule] = Registry("mixing rule")
SCORED_RULES: set[str] = set()
"""Rules whose gate is a score, on the scale of q . k / sqrt(D): any number, where others want a weight in
(0, 1)."""


def scored_rule(name: str) -> Callable[[MixingRule], MixingRule]:
    """Decorator that registers a rule whose gate is a score."""
    SCORED_RULES.add(name)
    return MIXING_RULES.register(name)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator with the denominator's magnitude kept above EPSILON."""
    floor = torch.where(denominator < 0, -EPSILON, EPSILON).to(denominator.dtype)
    return numerator / torch.where(denominator.abs() < EPSILON, floor, denominator)


@MIXING_RULES.register("convex")
def convex(window: Branch, linear: Branch, gate: Tensor) -> tuple[Tensor, Tensor]:
    """o = g SWA + (1 - g) LA (arXiv 2510.05901, with g = 0.5).

    Where linear attention has no key to see yet, its weight goes to the window.
    """
    weight = torch.where(linear.visible, gate, torch.ones_like(gate))
    return weight * window.normalised(), (1 - weight) * linear.normalised()


@scored_rule("competing")
def competing(window: Branch, linear: Branch, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Linear attention as one more key of the window's softmax; the gate is that key's score l.

    o = (sum exp(s) v + exp(l) LA) / (sum exp(s) + exp(l)), s the window's scores. Where l is the log of what
    the softmax weighs beyond the window, this is the softmax over all keys. A strong match in the window
    takes the weight by itself, and how the row's maximum is handled makes no difference.
    """
    assert window.top is not None
    top = torch.maximum(window.top, gate)
    near, far = (window.top - top).exp(), (gate - top).exp() * linear.visible
    denominator = near * window.denominator + far
    return divide(near * window.numerator, denominator), divide(far * linear.normalised(), denominator)


@scored_rule("calibrated")
def calibrated(window: Branch, linear: Branch, gate: Tensor) -> tuple[Tensor, Tensor]:
    """One denominator for both, linear weights on softmax's scale: the gate is the log of their factor, l.

    o = (sum exp(s) v + exp(l) sum phi(q) phi(k) v) / (sum exp(s) + exp(l) sum phi(q) phi(k)). What `shared`
    leaves to the row's maximum is learned here, and the branch's weight grows with the number and the weight
    of its keys, which `competing` has to guess from the query. Features must not be negative.
    """
    return competing(window, linear, gate + linear.denominator.clamp_min(EPSILON).log())


@MIXING_RULES.register("shared")
def shared(window: Branch, linear: Branch, gate: Tensor) -> tuple[Tensor, Tensor]:
    """One denominator for both, as LoLCATs publishes it (arXiv 2410.10254); the gate is its window factor.

    The window's weights carry exp(-m), m the row's largest score in the window, and the linear weights do
    not: the balance of the branches then depends on m. Kept so: published checkpoints were trained so.
    """
    denominator = gate * window.denominator + linear.denominator
    return divide(gate * window.numerator, denominator), divide(linear.numerator, denominator)


@MIXING_RULES.register("shared-affine")
def shared_affine(window: Branch, linear: Branch, gate: Tensor) -> tuple[Tensor, Tensor]:
    """`shared` with the linear weights times 1 - gate: LoLCATs' ``affine_attention_factors``, which its
    published configurations leave off."""
    denominator = gate * window.denominator + (1 - gate) * linear.denominator
    return divide(gate * window.numerator, denominator), divide((1 - gate) * linear.numerator, denominator)
