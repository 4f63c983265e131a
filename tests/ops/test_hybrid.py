"""Chunked operators against the quadratic and step-by-step definitions: outputs, states, gradients."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from equipoise.ops import Branches, hybrid_attention, linear_attention, window_attention
from equipoise.ops.reference import (
    hybrid_attention_reference,
    linear_attention_recurrent,
    window_attention_recurrent,
)

F64 = torch.float64
LENGTHS = (1, 5, 63, 64, 65, 130)


def make(length, *, batch=2, heads=4, kv=2, maps=4, size=6, value=5, features=7, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    return (
        normal(batch, heads, length, size),
        normal(batch, kv, length, size),
        normal(batch, kv, length, value),
        normal(batch, heads, length, features).exp(),
        normal(batch, maps, length, features).exp(),
    )


def random_masks(length, kind, seed=0, batch=2):
    g = torch.Generator().manual_seed(seed)
    mask = segments = None
    if kind in ("left", "right", "holes", "both"):
        mask = torch.ones(batch, length, dtype=torch.bool)
        pad = max(1, length // 3)
        if kind == "left":
            mask[0, :pad] = False
        elif kind == "right":
            mask[1, length - pad :] = False
        elif kind == "holes":
            mask = torch.rand(batch, length, generator=g) < 0.7
    if kind in ("segments", "both"):
        segments = (torch.rand(batch, length, generator=g) < 0.08).long().cumsum(1)
    if kind == "both":
        mask = torch.rand(batch, length, generator=g) < 0.8
    return mask, segments


def split_run(parts, q, k, v, phi_q, phi_k, key_mask=None, segment_ids=None, **options):
    """The same call cut into consecutive parts, each resumed from the state of the one before."""
    outs, state, start = [], None, 0
    for n in parts:
        cut = slice(start, start + n)
        tensor = isinstance(phi_k, torch.Tensor)
        out, state = hybrid_attention(
            q[:, :, cut], k[:, :, cut], v[:, :, cut],
            phi_q[:, :, cut] if tensor else phi_q, phi_k[:, :, cut] if tensor else phi_k,
            key_mask=None if key_mask is None else key_mask[:, cut],
            segment_ids=None if segment_ids is None else segment_ids[:, cut],
            initial_state=state, output_final_state=True, **options,
        )  # fmt: skip
        outs.append(out)
        start += n
    return torch.cat(outs, 2), state


CASES = list(
    itertools.product(
        ("convex", "shared"), ("sliding", "terraced"), (True, False), (0, 3),
        ("none", "left", "right", "holes", "segments", "both"),
    )
)  # fmt: skip


@pytest.mark.parametrize(("mixing", "layout", "overlap", "sinks", "padding"), CASES)
def test_equals_reference_whole_and_split(mixing, layout, overlap, sinks, padding):
    rng = random.Random(repr((mixing, layout, overlap, sinks, padding)))
    for trial in range(3):
        length, window = rng.choice(LENGTHS), rng.choice((1, 2, 7, 16, 200))
        tensors = make(length, maps=rng.choice((2, 4)), seed=trial)
        mask, segments = random_masks(length, padding, seed=trial)
        options = dict(
            window=window, layout=layout, mixing=mixing, overlap=overlap, sinks=sinks, key_mask=mask,
            segment_ids=segments, gate=torch.rand(4, 1, dtype=F64),
        )  # fmt: skip
        for branches in (
            Branches(),
            Branches(True, False),
            Branches(False, True),
            Branches(False, True, "renormalised"),
            Branches(torch.tensor([True, False]), True, "renormalised"),
            Branches(torch.tensor([True, False]), torch.tensor([True, True]), "literal"),
            Branches(torch.rand(2, 4) < 0.5, torch.rand(2, 4) < 0.5, "renormalised"),
        ):
            expected = hybrid_attention_reference(*tensors, **options, branches=branches)
            got, _ = hybrid_attention(*tensors, **options, branches=branches, chunk_size=rng.choice((3, 16, 64)))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
            cut = rng.randint(0, length)
            parts = [n for n in (cut, length - cut) if n] if trial else [1] * length
            got, _ = split_run(parts, *tensors, **options, branches=branches)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
