"""Gradients of the blockwise operator against autograd through the quadratic definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equipoise.ops import Branches, hybrid_attention
from equipoise.ops.reference import hybrid_attention_reference
from support import PositiveMap, attention_inputs, normal, padding_mask, segments_of

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("mixing", ["convex", "shared"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "extra",
    [
        {"window": 9},
        {"window": 7, "layout": "terraced", "sinks": 2, "masked": True},
        {"window": 9, "branches": Branches(torch.tensor([True, False]), True, "renormalised"), "sinks": 1},
    ],
    ids=["plain", "terraced-sinks-padded-packed", "dropped-window"],
)
@pytest.mark.parametrize("form", ["tensors", "callables"])
def test_gradients_equal_the_definitions(
    mixing: str, overlap: bool, extra: dict[str, Any], form: str
) -> None:
    length, extra = 71, dict(extra)
    inputs = [t.requires_grad_() for t in attention_inputs(length)]
    maps = PositiveMap(4), PositiveMap(2, seed=1)
    gate = normal(4, 1).sigmoid().requires_grad_()
    options: dict[str, Any] = {"mixing": mixing, "overlap": overlap}
    if extra.pop("masked", False):
        options |= {"key_mask": padding_mask("left", length), "segment_ids": segments_of(length, share=0.02)}
    options |= extra
    leaves = [*inputs, gate, *maps[0].parameters(), *maps[1].parameters()]
    features = [m(t) for m, t in zip(maps, inputs, strict=False)]
    if form == "tensors":
        leaves += features

    out, _ = hybrid_attention(
        *inputs, *(features if form == "tensors" else maps), gate=gate, chunk_size=16, **options
    )
    expected = hybrid_attention_reference(*inputs, *features, gate=gate, **options)
    upstream = normal(*out.shape, seed=9)
    got = torch.autograd.grad((out * upstream).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert other.abs().amax() > 0
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_flow_through_a_resumed_state(overlap: bool) -> None:
    inputs = [t.requires_grad_() for t in attention_inputs(40)]
    maps = PositiveMap(4), PositiveMap(2, seed=1)
    options: dict[str, Any] = {"window": 5, "overlap": overlap, "sinks": 2}
    leaves = [*inputs, *maps[0].parameters(), *maps[1].parameters()]
    whole, _ = hybrid_attention(*inputs, *maps, **options)
    first, state = hybrid_attention(
        *(t[:, :, :23] for t in inputs), *maps, output_final_state=True, **options
    )
    rest, _ = hybrid_attention(*(t[:, :, 23:] for t in inputs), *maps, initial_state=state, **options)
    upstream = normal(*whole.shape, seed=9)
    wanted = torch.autograd.grad((whole * upstream).sum(), leaves)
    got = torch.autograd.grad((torch.cat([first, rest], 2) * upstream).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in attention_inputs(7, batch=1, heads=2, kv=1, size=3, value=2)]
    features = [normal(1, 2, 7, 3, seed=s).exp().requires_grad_() for s in (20, 21)]
    gate = normal(2, 1).sigmoid().requires_grad_()

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return hybrid_attention(
            *tensors[:5], gate=tensors[5], window=2, sinks=1, overlap=False, mixing="shared", chunk_size=3
        )[0]

    assert torch.autograd.gradcheck(call, (*inputs, *features, gate), fast_mode=True)


def test_padding_holding_nan_does_not_reach_gradients() -> None:
    length = 100
    mask = padding_mask("left", length)
    assert mask is not None
    inputs = [t.masked_fill(~mask[:, None, :, None], torch.nan) for t in attention_inputs(length)]
    maps = PositiveMap(4), PositiveMap(2, seed=1)
    out, _ = hybrid_attention(*inputs, *maps, window=6, overlap=False, sinks=2, key_mask=mask)
    out.square().sum().backward()
    for phi in maps:
        assert phi.weight.grad is not None
        assert phi.weight.grad.isfinite().all()
