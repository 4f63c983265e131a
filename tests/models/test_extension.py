"""The design's acceptance test: a new feature map or mixing rule is one registered entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from equipoise import Branches, HybridConfig, branches, hybridize, revert
from equipoise.layers.feature_maps import FEATURE_MAPS, FeatureMap
from equipoise.layers.interface import mixers_of
from equipoise.ops import MIXING_RULES
from equipoise.ops.dispatch import backend
from equipoise.ops.mix import Branch, divide
from equipoise.registry import UnknownNameError
from support import random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 20)


@FEATURE_MAPS.register("test-squares")
class Squares(FeatureMap):
    """(xW)^2, one-sided, with a learned floor."""

    two_sided = False

    def __init__(self, heads: int, head_dim: int, feature_dim: int) -> None:
        super().__init__(heads, head_dim, feature_dim)
        self.floor = nn.Parameter(torch.empty(heads, 1, 1))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.floor.fill_(0.1)

    def activation(self, projected: Tensor) -> Tensor:
        return projected.square() + self.floor.to(projected.dtype).abs()


@MIXING_RULES.register("test-balanced")
def balanced(window: Branch, linear: Branch, gate: Tensor) -> tuple[Tensor, Tensor]:
    """One denominator, with each branch's weights first brought to the same sum."""
    share = torch.where(linear.visible, gate, torch.ones_like(gate))
    return (
        share * divide(window.numerator, window.denominator),
        (1 - share) * divide(linear.numerator, linear.denominator),
    )


@pytest.mark.parametrize("config", [{"feature_map": "test-squares"}, {"mixing": "test-balanced"}], ids=str)
def test_one_entry_is_enough(config: dict[str, str], tmp_path: Path, logits: Logits) -> None:
    donor = logits(tiny_model(), TOKENS)
    model = hybridize(tiny_model(), HybridConfig(window=5, gate="per_head", gate_value=0.3, **config))
    for mixer in mixers_of(model):
        for parameter in mixer.parameters():
            parameter.data.add_(0.1)
    expected = logits(model, TOKENS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, TOKENS), expected)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(TOKENS, **greedy), loaded.generate(TOKENS, **greedy, use_cache=False))
    loaded.train()
    loaded(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad.abs().max() > 0 for m in mixers_of(loaded) for p in m.parameters())
    loaded.eval()
    for state in (Branches(True, False), Branches(False, True, "renormalised")):
        with branches(loaded, state):
            assert not torch.allclose(logits(loaded, TOKENS), expected)
    assert torch.equal(logits(revert(loaded), TOKENS), donor)


def test_a_rule_that_equals_a_built_in_one_gives_the_same(logits: Logits) -> None:
    results = []
    for mixing in ("convex", "test-balanced"):
        model = hybridize(tiny_model(), HybridConfig(window=5, overlap=False, mixing=mixing))
        with backend("walk"):  # the path that takes any rule; the fast one rounds otherwise
            results.append(logits(model, TOKENS))
    assert torch.equal(*results)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="feature map 'hedgehog' is registered twice"):
        FEATURE_MAPS.register("hedgehog")(Squares)
    with pytest.raises(UnknownNameError, match="Did you mean 'test-squares'"):
        FEATURE_MAPS["test-square"]
