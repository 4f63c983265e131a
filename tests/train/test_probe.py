"""The probe's norms against outputs and gradients taken apart by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.config import HybridConfig
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.ops import Branches
from equipoise.train.probe import BranchProbe
from support import attention_inputs


def layer(**config: Any) -> tuple[HybridMixer, LayerInputs]:
    q, k, v = attention_inputs(12, value=6)
    mixer = HybridMixer(HybridConfig(window=3, **config), heads=4, kv_heads=2, head_dim=6, layer_idx=0)
    return mixer.double(), LayerInputs(q, k, v, scale=0.4)


def observe(mixer: HybridMixer, inputs: LayerInputs, loss_gradient: Tensor) -> dict[str, float]:
    probe = BranchProbe()
    q = inputs.q.clone().requires_grad_()
    inputs = LayerInputs(q, inputs.k, inputs.v, inputs.scale)
    output, _ = mixer.attend(inputs, mode=mixer.mode)
    probe(mixer, inputs, output)
    output.backward(loss_gradient)
    return probe.results()


def test_share_is_of_the_output_terms() -> None:
    mixer, inputs = layer(gate_value=0.2)
    results = observe(mixer, inputs, torch.ones(2, 4, 12, 6, dtype=torch.float64))
    window = mixer.hybrid(inputs, branches=Branches(linear=False))[0].norm()
    linear = mixer.hybrid(inputs, branches=Branches(window=False))[0].norm()
    assert results["linear_output_share"] == pytest.approx((linear / (window + linear)).item(), rel=1e-6)


@pytest.mark.parametrize("reading", ["literal", "renormalised"])
@pytest.mark.parametrize("kept", [True, [True, False], [[True, False, False, True], [False] * 4]])
@pytest.mark.parametrize("mixing", ["convex", "shared"])
def test_gradients_add_up_to_the_layers_own(mixing: str, kept: Any, reading: Any) -> None:
    """Gradients of the two terms with respect to v are linear: together they make the layer's."""
    mixer, inputs = layer(mixing=mixing, overlap=mixing == "convex")
    window = kept if kept is True else torch.tensor(kept)
    mixer.mode = AttentionMode("hybrid", Branches(window=window, reading=reading), window=5)
    gradient = torch.randn(2, 4, 12, 6, dtype=torch.float64)

    class Keep(BranchProbe):
        terms: dict[str, Tensor]

    from equipoise.train import probe as module

    total = 0
    for name in ("window", "linear"):
        copy = inputs.detach()
        copy.v.requires_grad_()
        (grad,) = torch.autograd.grad(module._term(mixer, mixer.mode, copy, name), copy.v, gradient)
        total = total + grad
        copy.v.requires_grad_(False)
    whole = inputs.detach()
    whole.v.requires_grad_()
    (expected,) = torch.autograd.grad(mixer.attend(whole, mode=mixer.mode)[0], whole.v, gradient)
    torch.testing.assert_close(total, expected)


def test_no_window_no_window_gradient() -> None:
    mixer, inputs = layer()
    mixer.mode = AttentionMode(
        "hybrid", Branches(window=torch.tensor([False, False]), reading="renormalised")
    )
    results = observe(mixer, inputs, torch.ones(2, 4, 12, 6, dtype=torch.float64))
    assert results["window_gradient"] == 0
    assert results["linear_gradient"] > 0
    assert 0 < results["linear_output_share"] < 1


@pytest.mark.parametrize("config", [{"feature_map": None}, {"window": None}])
def test_one_branch_alone_has_no_share(config: dict[str, Any]) -> None:
    q, k, v = attention_inputs(12, value=6)
    settings = HybridConfig(**{"window": 3, **config})
    mixer = HybridMixer(settings, heads=4, kv_heads=2, head_dim=6, layer_idx=0).double()
    results = observe(mixer, LayerInputs(q, k, v, scale=0.4), torch.ones_like(q))
    assert not [name for name in results if not name.startswith("guard_")]
    assert all(value < 1e-9 for value in results.values())
