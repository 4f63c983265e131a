"""The state between two calls: what it holds, how precisely, and how much memory it takes."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise.ops import AttentionState, hybrid_attention
from equipoise.ops.reference import linear_attention_recurrent
from support import F64, PositiveMap, attention_inputs, padding_mask, segments_of


def frozen_maps(maps: int = 4) -> tuple[PositiveMap, PositiveMap]:
    return PositiveMap(4).requires_grad_(False), PositiveMap(maps, seed=1).requires_grad_(False)


def final_state(*args: Any, **options: Any) -> AttentionState:
    state = hybrid_attention(*args, output_final_state=True, **options)[1]
    assert state is not None
    return state


@pytest.mark.parametrize("length", [1, 4, 63, 130])
@pytest.mark.parametrize("maps", [2, 4])
@pytest.mark.parametrize(("overlap", "sinks"), [(True, 0), (True, 3), (False, 0), (False, 3)])
def test_sums_equal_the_recurrence(length: int, maps: int, overlap: bool, sinks: int) -> None:
    q, k, v = attention_inputs(length)
    phi_q, phi_k = frozen_maps(maps)
    mask = padding_mask("left", length)
    assert mask is not None
    window = 5
    state = final_state(q, k, v, phi_q, phi_k, window=window, overlap=overlap, sinks=sinks, key_mask=mask)
    # Disjoint, the last window - 1 tokens wait, and sinks stay out for good.
    folded = mask.clone()
    if not overlap:
        folded[:, max(0, length - window + 1) :] = False
        folded &= mask.long().cumsum(1) > sinks
    features = phi_k(k) * folded[:, None, :, None]
    values = v.repeat_interleave(maps // 2, 1)
    _, (sums, normalizer) = linear_attention_recurrent(features, features, values)
    torch.testing.assert_close(state.linear_state, sums, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.linear_normalizer, normalizer, rtol=0, atol=1e-12)
    assert torch.equal(state.folded, folded.sum(1))
    expected = torch.nn.functional.pad(mask, (window - 1, 0))[:, -(window - 1) :]
    assert torch.equal(state.valid, expected)


def test_a_state_holds_only_its_last_segment() -> None:
    q, k, v = attention_inputs(50)
    maps = frozen_maps()
    ids = torch.zeros(2, 50, dtype=torch.long)
    ids[0, 30:], ids[1, 48:] = 1, 1
    state = final_state(q, k, v, *maps, window=4, segment_ids=ids)
    for row, start in ((0, 30), (1, 48)):
        alone = final_state(
            *(t[row : row + 1, :, start:] for t in (q, k, v)), *maps, window=4, segment_ids=ids[:1, start:]
        )
        torch.testing.assert_close(state.linear_state[row], alone.linear_state[0], rtol=0, atol=1e-12)
        assert state.folded[row] == alone.folded[0] == 50 - start


def test_tensors_and_callables_leave_the_same_state() -> None:
    q, k, v = attention_inputs(90)
    phi_q, phi_k = frozen_maps(2)
    options: dict[str, Any] = {
        "window": 6,
        "overlap": False,
        "sinks": 2,
        "key_mask": padding_mask("holes", 90),
    }
    one = final_state(q, k, v, phi_q, phi_k, **options)
    other = final_state(q, k, v, phi_q(q), phi_k(k), **options)
    for name in ("linear_state", "linear_normalizer", "folded", "keys", "sink_keys", "sink_valid"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-12)
    assert one.features is None
    assert other.features is not None


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("layout", ["sliding", "terraced"])
def test_size_does_not_depend_on_the_length(overlap: bool, layout: str) -> None:
    sizes = set()
    for length in (1, 3, 64, 700):
        q, k, v = attention_inputs(length)
        options: dict[str, Any] = {"window": 8, "layout": layout, "overlap": overlap, "sinks": 2}
        state = final_state(
            q,
            k,
            v,
            *frozen_maps(),
            **options,
            key_mask=padding_mask("left", length),
            segment_ids=segments_of(length),
        )
        # storages, not shapes: a view of the prompt would keep all of it alive
        held = sum(t.untyped_storage().nbytes() for t in state.tensors())
        assert held == state.bytes()
        sizes.add(held)
    assert len(sizes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mixing", "overlap"), list(itertools.product(("convex", "shared"), (True, False))))
def test_precision(dtype: torch.dtype, mixing: str, overlap: bool) -> None:
    """Against float64 on the same rounded inputs, so that only the operator's own arithmetic is measured."""
    low = [t.to(dtype) for t in attention_inputs(1000, batch=1)]
    maps = frozen_maps()
    options: dict[str, Any] = {"window": 16, "mixing": mixing, "overlap": overlap, "output_final_state": True}
    out, state = hybrid_attention(*low, *maps, **options)
    exact, exact_state = hybrid_attention(*(t.to(F64) for t in low), *maps, **options)
    assert out.dtype == dtype
    assert state.keys.dtype == dtype
    assert state.linear_state.dtype == state.linear_normalizer.dtype == torch.float32
    # Outputs are averages of values of magnitude about 1, rounded once to the dtype: half a unit in the last
    # place is 2^-9 of at most 4 in bfloat16. In float32 sums of 1,000 terms dominate: about 1000^0.5 x 2^-24.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-9 * 4
    torch.testing.assert_close(out.to(F64), exact, rtol=0, atol=tolerance)
    # S and z are float32 sums of 1,000 positive or mixed terms in either case.
    scale = exact_state.linear_normalizer.amax()
    torch.testing.assert_close(
        state.linear_normalizer.to(F64), exact_state.linear_normalizer, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        state.linear_state.to(F64) / scale, exact_state.linear_state / scale, rtol=0, atol=1e-5
    )


def test_autocast_does_not_lower_the_sums() -> None:
    inputs = [t.float() for t in attention_inputs(300)]
    maps = frozen_maps()
    plain, state = hybrid_attention(*inputs, *maps, window=8, output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_state = hybrid_attention(*inputs, *maps, window=8, output_final_state=True)
    assert torch.equal(plain, cast)
    for one, other in zip(state.tensors(), cast_state.tensors(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("options", [{}, {"overlap": False, "sinks": 2}, {"layout": "terraced"}])
def test_nothing_of_size_length_squared_is_made(options: dict[str, Any]) -> None:
    length = 2048
    q, k, v = (t.float() for t in attention_inputs(length, batch=1, heads=2, kv=1))
    with _Largest() as seen:
        hybrid_attention(q, k, v, *frozen_maps_of(2), window=16, **options)
    assert 0 < seen.elements < length * length / 2


def frozen_maps_of(heads: int) -> tuple[PositiveMap, PositiveMap]:
    return PositiveMap(heads).requires_grad_(False), PositiveMap(heads, seed=1).requires_grad_(False)


def test_map_reaches_every_tensor() -> None:
    q, k, v = attention_inputs(20)
    phi_q, phi_k = frozen_maps()
    state = final_state(
        q, k, v, phi_q(q), phi_k(k), window=4, layout="terraced", overlap=False, sinks=2,
        key_mask=padding_mask("left", 20), segment_ids=segments_of(20),
    )  # fmt: skip
    # tokens wait beside S under the Triton kernels only
    waiting: dict[str, Any] = {
        "pending": torch.ones(2, dtype=torch.int64), "pending_features": torch.ones(2, 4, 1, 7),
        "pending_values": torch.ones(2, 2, 1, 5),
    }  # fmt: skip
    assert {f.name for f in fields(state) if getattr(state, f.name) is None} == waiting.keys()
    state = replace(state, **waiting)
    assert len(state.tensors()) == len(fields(state)) - 1  # all but `others`, which has none
    state = replace(state, others=(state, replace(state, pending=None)))
    assert len(state.tensors()) == 3 * (len(fields(state)) - 1) - 1
    doubled = state.map(lambda t: t.repeat_interleave(2, 0))
    assert all(t.shape[0] == 4 for t in doubled.tensors())
    assert len(doubled.tensors()) == len(state.tensors())
    assert doubled.bytes() == 2 * state.bytes()
