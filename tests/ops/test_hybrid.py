"""The blockwise operator against the quadratic definition: every combination of settings, whole and split."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.ops import Branches, hybrid_attention, linear_attention, window_attention
from equipoise.ops.reference import hybrid_attention_reference
from support import PositiveMap, attention_inputs, normal, padding_mask, segments_of

EXACT = {"rtol": 0, "atol": 1e-12}


def run_split(
    parts: list[int], q: Tensor, k: Tensor, v: Tensor, phi_q: Any, phi_k: Any, *,
    gate: Any = 0.5, key_mask: Tensor | None = None, segment_ids: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The same call cut into consecutive parts, each resumed from the state of the one before."""
    outs, state, start = [], None, 0
    for count in parts:
        cut = slice(start, start + count)
        out, state = hybrid_attention(
            q[:, :, cut], k[:, :, cut], v[:, :, cut],
            *(phi[:, :, cut] if isinstance(phi, Tensor) else phi for phi in (phi_q, phi_k)),
            gate=gate[..., cut] if isinstance(gate, Tensor) and gate.shape[-1] > 1 else gate,
            key_mask=None if key_mask is None else key_mask[:, cut],
            segment_ids=None if segment_ids is None else segment_ids[:, cut],
            initial_state=state, output_final_state=True, **options,
        )  # fmt: skip
        outs.append(out)
        start += count
    return torch.cat(outs, 2), state


def random_parts(length: int, rng: random.Random) -> list[int]:
    """One to four parts of any size."""
    cuts = sorted({0, length, *(rng.randint(0, length) for _ in range(rng.choice((0, 1, 3))))})
    return [b - a for a, b in itertools.pairwise(cuts)]


def branch_states(batch: int, heads: int) -> list[Branches]:
    rows, cells = torch.tensor([True, False][:batch]), normal(batch, heads, seed=5) < 0
    return [
        Branches(),
        Branches(True, False),
        Branches(False, True),
        Branches(True, False, "renormalised"),
        Branches(False, True, "renormalised"),
        Branches(False, False, "renormalised"),
        Branches(rows, True, "literal"),
        Branches(~rows, rows, "renormalised"),
        Branches(rows, True, "renormalised"),
        Branches(cells, ~cells | (normal(batch, heads, seed=6) < 0), "literal"),
        Branches(cells, normal(batch, heads, seed=7) < 0, "renormalised"),
    ]


SETTINGS = list(
    itertools.product(
        ("convex", "shared"), ("sliding", "terraced"), (True, False), (0, 3),
        ("none", "left", "right", "holes"), (False, True),
    )
)  # fmt: skip


@pytest.mark.parametrize(
    "half", [pytest.param(0, id="half"), pytest.param(1, id="rest", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("mixing", "layout", "overlap", "sinks", "padding", "packed"), SETTINGS)
def test_equals_the_definition_whole_and_split(
    mixing: str, layout: str, overlap: bool, sinks: int, padding: str, packed: bool, half: int
) -> None:
    case = (mixing, layout, overlap, sinks, padding, packed)
    rng = random.Random(repr((case, half)))
    for number, branches in enumerate(branch_states(2, 4)):
        maps = (2, 4)[
            (number + SETTINGS.index(case) + half) % 2
        ]  # the slow half takes the other one each time
        length, window = rng.choice((1, 9, 23, 40)), rng.choice((1, 2, 5, 16, 64))
        q, k, v = attention_inputs(length, seed=number)
        phi_q, phi_k = PositiveMap(4).requires_grad_(False), PositiveMap(maps, seed=1).requires_grad_(False)
        tensors, callables = (phi_q(q), phi_k(k)), (phi_q, phi_k)
        options: dict[str, Any] = {
            "window": window, "layout": layout, "mixing": mixing, "overlap": overlap, "sinks": sinks,
            "key_mask": padding_mask(padding, length, seed=number), "branches": branches,
            "segment_ids": segments_of(length, seed=number) if packed else None,
            "gate": rng.choice((0.3, normal(4, 1, seed=number).sigmoid(), normal(2, 4, length).sigmoid())),
            "softcap": rng.choice((None, 2.0)), "sink_logits": rng.choice((None, normal(4, seed=number))),
        }  # fmt: skip
        expected = hybrid_attention_reference(q, k, v, *tensors, **options)
        chunk = rng.choice((3, 16, 64))
        whole, _ = hybrid_attention(
            q, k, v, *(tensors, callables)[rng.randrange(2)], chunk_size=chunk, **options
        )
        torch.testing.assert_close(whole, expected, **EXACT)
        parts = random_parts(length, rng)
        split, _ = run_split(
            parts, q, k, v, *(callables, tensors)[rng.randrange(2)], chunk_size=chunk, **options
        )
        torch.testing.assert_close(split, expected, **EXACT)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
@pytest.mark.parametrize(
    ("mixing", "layout", "overlap", "sinks", "window"),
    [
        ("convex", "sliding", True, 0, 64),
        ("convex", "terraced", False, 3, 50),
        ("shared", "sliding", False, 2, 33),
        ("shared", "terraced", False, 0, 700),
    ],
)
def test_odd_lengths(length: int, mixing: str, layout: str, overlap: bool, sinks: int, window: int) -> None:
    q, k, v = attention_inputs(length, batch=1, heads=2, kv=1)
    phi_q, phi_k = PositiveMap(2).requires_grad_(False), PositiveMap(2, seed=1).requires_grad_(False)
    options: dict[str, Any] = {
        "window": window, "layout": layout, "mixing": mixing, "overlap": overlap, "sinks": sinks,
    }  # fmt: skip
    expected = hybrid_attention_reference(q, k, v, phi_q(q), phi_k(k), **options)
    whole, _ = hybrid_attention(q, k, v, phi_q, phi_k, **options)
    torch.testing.assert_close(whole, expected, **EXACT)
    parts = random_parts(length, random.Random(length))
    split, _ = run_split(parts, q, k, v, phi_q, phi_k, **options)
    torch.testing.assert_close(split, expected, **EXACT)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("layout", ["sliding", "terraced"])
def test_one_token_at_a_time(layout: str, overlap: bool, sinks: int) -> None:
    q, k, v = attention_inputs(31)
    maps = PositiveMap(4).requires_grad_(False), PositiveMap(2, seed=1).requires_grad_(False)
    options: dict[str, Any] = {
        "window": 4, "layout": layout, "mixing": "shared", "overlap": overlap, "sinks": sinks,
        "key_mask": padding_mask("left", 31), "segment_ids": segments_of(31),
    }  # fmt: skip
    whole, _ = hybrid_attention(q, k, v, *maps, **options)
    split, _ = run_split([1] * 31, q, k, v, *maps, **options)
    torch.testing.assert_close(split, whole, **EXACT)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    window=st.integers(1, 30),
    sinks=st.integers(0, 4),
    chunk=st.integers(1, 24),
    overlap=st.booleans(),
    layout=st.sampled_from(["sliding", "terraced"]),
    as_tensors=st.booleans(),
)
def test_any_split_gives_the_same(
    parts: list[int], window: int, sinks: int, chunk: int, overlap: bool, layout: str, as_tensors: bool
) -> None:
    length = sum(parts)
    q, k, v = attention_inputs(length, seed=length)
    phi: Any = PositiveMap(4).requires_grad_(False), PositiveMap(4, seed=1).requires_grad_(False)
    if as_tensors:
        phi = phi[0](q), phi[1](k)
    options: dict[str, Any] = {
        "window": window, "sinks": sinks, "overlap": overlap, "layout": layout,
        "key_mask": padding_mask("holes", length, seed=length),
    }  # fmt: skip
    whole, after_whole = hybrid_attention(q, k, v, *phi, output_final_state=True, **options)
    split, after_split = run_split(parts, q, k, v, *phi, chunk_size=chunk, **options)
    torch.testing.assert_close(split, whole, **EXACT)
    for one, other in zip(after_whole.tensors(), after_split.tensors(), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("maps", [2, 4])
def test_linear_attention_alone(maps: int) -> None:
    q, k, v = attention_inputs(150)
    phi_q, phi_k = PositiveMap(4)(q).detach(), PositiveMap(maps)(k).detach()
    mask = padding_mask("left", 150)
    out, _ = linear_attention(q, k, v, phi_q, phi_k, key_mask=mask)
    expected = hybrid_attention_reference(q, k, v, phi_q, phi_k, window=None, key_mask=mask)
    torch.testing.assert_close(out, expected, **EXACT)


@pytest.mark.parametrize(("window", "sinks"), [(7, 0), (7, 3), (0, 4), (200, 0)])
def test_window_attention_alone(window: int, sinks: int) -> None:
    q, k, v = attention_inputs(150)
    mask = padding_mask("right", 150)
    out, _ = window_attention(q, k, v, window=window, sinks=sinks, key_mask=mask, scale=0.7)
    expected = hybrid_attention_reference(
        q, k, v, None, None, window=window, sinks=sinks, key_mask=mask, scale=0.7
    )
    torch.testing.assert_close(out, expected, **EXACT)


def test_a_window_over_everything_is_plain_softmax_attention() -> None:
    q, k, v = attention_inputs(100)
    out, _ = window_attention(q, k, v, window=100)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected, **EXACT)


def test_packed_segments_equal_each_alone() -> None:
    lengths = (13, 1, 40, 26)
    q, k, v = attention_inputs(sum(lengths), batch=1)
    maps = PositiveMap(4).requires_grad_(False), PositiveMap(2, seed=1).requires_grad_(False)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    for layout, overlap, sinks in itertools.product(("sliding", "terraced"), (True, False), (0, 2)):
        options: dict[str, Any] = {"window": 5, "layout": layout, "overlap": overlap, "sinks": sinks}
        packed, _ = hybrid_attention(q, k, v, *maps, segment_ids=ids, chunk_size=16, **options)
        alone = [
            hybrid_attention(*parts, *maps, **options)[0]
            for parts in zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
        ]
        torch.testing.assert_close(packed, torch.cat(alone, 2), **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["sliding", "terraced"])
def test_padded_rows_equal_the_same_rows_alone(side: str, layout: str) -> None:
    q, k, v = attention_inputs(90, batch=1)
    maps = PositiveMap(4).requires_grad_(False), PositiveMap(4, seed=1).requires_grad_(False)
    options: dict[str, Any] = {"window": 6, "layout": layout, "overlap": False, "sinks": 2}
    mask = torch.ones(1, 90, dtype=torch.bool)
    real = slice(37, None) if side == "left" else slice(0, 53)
    mask[:] = False
    mask[:, real] = True
    padded, _ = hybrid_attention(q, k, v, *maps, key_mask=mask, **options)
    alone, _ = hybrid_attention(*(t[:, :, real] for t in (q, k, v)), *maps, **options)
    torch.testing.assert_close(padded[:, :, real], alone, **EXACT)


def test_grouped_queries_equal_repeated_keys() -> None:
    q, k, v = attention_inputs(70)
    phi_q, phi_k = PositiveMap(4).requires_grad_(False), PositiveMap(4, seed=1).requires_grad_(False)
    grouped, _ = hybrid_attention(q, k, v, phi_q, phi_k, window=9, overlap=False)
    repeated = (t.repeat_interleave(2, 1) for t in (k, v))
    out, _ = hybrid_attention(q, *repeated, phi_q, phi_k, window=9, overlap=False)
    torch.testing.assert_close(grouped, out, **EXACT)


def test_the_first_rows_of_a_disjoint_hybrid_are_the_window_alone() -> None:
    q, k, v = attention_inputs(30)
    maps = PositiveMap(4).requires_grad_(False), PositiveMap(4, seed=1).requires_grad_(False)
    hybrid, _ = hybrid_attention(q, k, v, *maps, window=8, overlap=False, gate=0.2)
    window, _ = window_attention(q, k, v, window=8)
    torch.testing.assert_close(hybrid[:, :, :8], window[:, :, :8], **EXACT)
    assert (hybrid[:, :, 8:] - window[:, :, 8:]).abs().amin() > 1e-6


def test_rows_without_a_key_give_zero() -> None:
    q, k, v = attention_inputs(80)
    maps = PositiveMap(4).requires_grad_(False), PositiveMap(4, seed=1).requires_grad_(False)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0] = False
    mask[1, :70] = False
    for mixing, overlap in itertools.product(("convex", "shared"), (True, False)):
        out, _ = hybrid_attention(q, k, v, *maps, window=5, key_mask=mask, mixing=mixing, overlap=overlap)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert torch.equal(out[1, :, :70], torch.zeros_like(out[1, :, :70]))
        assert out[1, :, 70:].abs().amin() > 0


@pytest.mark.parametrize("form", ["tensors", "callables"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_what_stands_in_padding_does_not_matter(form: str, overlap: bool, side: str) -> None:
    length = 150
    q, k, v = attention_inputs(length)
    maps = PositiveMap(4).requires_grad_(False), PositiveMap(4, seed=1).requires_grad_(False)
    mask = padding_mask(side, length)
    assert mask is not None
    absent = ~mask[:, None, :, None]
    results = []
    for filling in (0.0, torch.nan):
        filled = [t.masked_fill(absent, filling) for t in (q, k, v)]
        phi: Any = maps
        if form == "tensors":
            phi = tuple(m(t).masked_fill(absent, filling) for m, t in zip(maps, (q, k), strict=True))
        options: dict[str, Any] = {"window": 6, "overlap": overlap, "sinks": 2, "key_mask": mask}
        out, state = run_split([80, 1, 69], *filled, *phi, **options)
        results.append([out, *state.tensors()])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_settings_change_the_result() -> None:
    # Guards the sweep above: a setting that is ignored on both sides would pass it.
    q, k, v = attention_inputs(60)
    maps = PositiveMap(4).requires_grad_(False), PositiveMap(4, seed=1).requires_grad_(False)
    outs = [
        hybrid_attention(q, k, v, *maps, **{"window": 6, **changed})[0]
        for changed in (
            {}, {"window": 7}, {"layout": "terraced"}, {"mixing": "shared"}, {"gate": 0.4},
            {"overlap": False}, {"scale": 0.1}, {"softcap": 1.0}, {"sinks": 2},
            {"branches": Branches(True, False)}, {"segment_ids": segments_of(60)},
            {"key_mask": padding_mask("holes", 60)},
        )
    ]  # fmt: skip
    for one, other in itertools.combinations(outs, 2):
        assert (one - other).abs().amax() > 1e-4
