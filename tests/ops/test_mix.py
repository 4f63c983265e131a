"""Mixing rules among themselves."""

from __future__ import annotations

import pytest
import torch

from equipoise.ops import Branches, hybrid_attention
from support import attention_inputs, normal


@pytest.mark.parametrize("branches", [Branches(), Branches(window=False), Branches(linear=False)], ids=str)
@pytest.mark.parametrize("layout", ["sliding", "terraced"])
def test_affine_weights_are_shared_ones_at_the_odds(branches: Branches, layout: str) -> None:
    """g W + (1 - g) L under one denominator is g / (1 - g) W + L under theirs."""
    q, k, v = attention_inputs(33)
    phi_q, phi_k = (normal(2, 4, 33, 7, seed=seed).exp() for seed in (5, 6))
    gate = normal(4, 1, seed=7).sigmoid()
    fixed = {"window": 5, "layout": layout, "overlap": False, "branches": branches}
    affine, _ = hybrid_attention(q, k, v, phi_q, phi_k, mixing="shared-affine", gate=gate, **fixed)
    shared, _ = hybrid_attention(q, k, v, phi_q, phi_k, mixing="shared", gate=gate / (1 - gate), **fixed)
    torch.testing.assert_close(affine, shared)
    assert not torch.allclose(
        affine, hybrid_attention(q, k, v, phi_q, phi_k, mixing="shared", gate=gate, **fixed)[0]
    )
