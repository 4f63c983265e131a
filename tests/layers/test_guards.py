"""Counts of numbers at their ends, each with a case that has it and one without; 64k tokens in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.config import HybridConfig
from equipoise.layers.guards import (
    NumericalGuard,
    denominators_of,
    features_past,
    lost_mass,
    nonfinite_gradients,
    warnings_of,
)
from equipoise.layers.mixer import HybridMixer, LayerInputs
from support import F64, normal

BF16 = torch.bfloat16


def make_mixer(**settings: Any) -> HybridMixer:
    config = HybridConfig(**{"window": 64, **settings})
    return HybridMixer(config, heads=2, kv_heads=1, head_dim=8, layer_idx=3)


def layer_inputs(length: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> LayerInputs:
    q, k, v = (normal(1, heads, length, 8, seed=i, dtype=dtype) for i, heads in enumerate((2, 1, 1)))
    return LayerInputs(q * scale, k * scale, v, 0.3)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float16, 3), (BF16, 2), (torch.float32, 2), (F64, 2)])
def test_features_past_the_dtype(dtype: torch.dtype, count: int) -> None:
    features = torch.tensor([1.0, 7e4, float("inf"), float("nan")], dtype=F64)
    assert features_past(features, dtype) == count


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 11), (BF16, 88), (torch.float32, 88)])
def test_exponentials_without_the_rows_maximum_overflow(dtype: torch.dtype, largest: float) -> None:
    """exp(x) is finite up to 11 in float16, to 88 otherwise; with the maximum taken off, always."""
    x = torch.linspace(0, 1.2 * largest, 13, dtype=torch.float32)
    assert features_past(x.exp(), dtype) > 0
    assert features_past((x - x.amax()).exp(), dtype) == 0
    guard, inputs = NumericalGuard(), layer_inputs(40, scale=1e3, dtype=dtype)
    for name in ("hedgehog", "hedgehog-joint", "exp"):
        guard(make_mixer(feature_map=name), inputs)
    assert guard.sums["features"] == 0


class TestDenominators:
    def test_positive_features_have_none(self) -> None:
        vanishing, read = denominators_of(normal(50, 4).exp(), normal(50, 4, seed=1).exp())
        assert not vanishing.any()
        assert read.all()

    def test_zeros_and_what_cancels(self) -> None:
        phi_k = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]], dtype=F64)
        phi_q = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]], dtype=F64)
        vanishing, _ = denominators_of(phi_q, phi_k)
        assert vanishing.tolist() == [True, False, False, True]

    def test_of_the_own_document_and_of_keys_that_left_the_window(self) -> None:
        phi = torch.ones(6, 2, dtype=F64)
        phi[0] = 0
        vanishing, read = denominators_of(phi, phi, torch.tensor([0, 0, 0, 1, 1, 1]), lag=1)
        assert read.tolist() == [False, True, True, False, True, True]
        assert vanishing[read].tolist() == [True, False, False, False]

    def test_maps_that_change_sign_are_counted_in_a_layer(self) -> None:
        guard, inputs = NumericalGuard(), layer_inputs(30)
        guard(make_mixer(feature_map="relu"), LayerInputs(inputs.q * 0, inputs.k, inputs.v, 0.3))
        assert guard.results()["guard_denominators"] == 60
        assert guard.layers[3]["denominators"] == 60

    def test_padding_is_neither_key_nor_query(self) -> None:
        guard, inputs = NumericalGuard(), layer_inputs(10)
        mask = torch.ones(1, 10, dtype=torch.bool)
        mask[:, :4] = False
        inputs.k[:, :, 4:] = 0  # of real keys nothing is left, of padding there is
        guard(make_mixer(feature_map="relu"), replace(inputs, key_mask=mask))
        assert guard.sums["denominators"] == 2 * 6

    def test_documents_of_a_row_are_apart(self) -> None:
        guard, inputs = NumericalGuard(), layer_inputs(10)
        segments = torch.tensor([[0] * 7 + [1] * 3])
        inputs.q[:], inputs.k[:, :, :7], inputs.k[:, :, 7:] = 1, 1, 0
        guard(make_mixer(feature_map="relu"), replace(inputs, segment_ids=segments))
        assert guard.sums["denominators"] == 2 * 3

    def test_a_disjoint_branch_reads_what_left_the_window(self) -> None:
        guard, inputs = NumericalGuard(), layer_inputs(10)
        inputs.k[:] = 0
        guard(make_mixer(feature_map="relu", window=4, overlap=False), inputs)
        assert guard.sums["denominators"] == 2 * (10 - 4)


def test_the_delta_rule_has_no_denominators() -> None:
    guard = NumericalGuard()
    guard(make_mixer(feature_map="unit", state_update="delta", window=4), layer_inputs(20))
    assert guard.results() == {}


def test_features_of_keys_count_too() -> None:
    guard, mixer = NumericalGuard(), make_mixer()
    assert mixer.phi_k is not None
    mixer.phi_k.register_forward_hook(lambda module, given, out: torch.full_like(out, torch.inf))
    guard(mixer, layer_inputs(5))
    features = mixer.phi_k(layer_inputs(5).k)
    assert guard.sums["features"] == features.numel() > 0


@pytest.mark.parametrize(("dtype", "lost"), [(BF16, 1.0), (torch.float32, 0.0)])
def test_a_state_of_bfloat16_stalls_and_one_of_float32_does_not(dtype: torch.dtype, lost: float) -> None:
    share, mass = lost_mass(torch.ones(1025, 4), dtype)
    assert share / mass == lost
    assert (
        lost_mass(torch.full((2**25 + 1, 1), 1.0), torch.float32)[0] == 1.0
    )  # nor does float32 go on forever


def test_nonfinite_gradients_are_named() -> None:
    good, bad = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    good.grad, bad.grad = torch.ones(3), torch.tensor([1.0, float("nan"), float("inf")])
    assert nonfinite_gradients([("good", good)]) == {}
    assert nonfinite_gradients([("good", good), ("bad", bad)]) == {"bad": 2}


def test_warnings_say_what_and_how_often() -> None:
    history = [
        {"step": 1, "guard_features": 0.0, "guard_state": 1e-4},
        {"step": 10, "guard_features": 7.0, "guard_state": 1e-4},
        {"step": 10, "eval_nll": 1.0},
    ]
    (line,) = warnings_of(history)
    assert line.startswith("guard_features: in 1 of 2 logged steps, at most 7 (step 10): features past")
    assert warnings_of([]) == []


# ---- 64k tokens

LONG = 65_536


def wide(inputs: LayerInputs) -> LayerInputs:
    return LayerInputs(inputs.q.double(), inputs.k.double(), inputs.v.double(), inputs.scale)


def read(mixer: HybridMixer, inputs: LayerInputs, span: slice, state: Any = None) -> tuple[Tensor, Any]:
    part = LayerInputs(inputs.q[:, :, span], inputs.k[:, :, span], inputs.v[:, :, span], inputs.scale)
    with torch.no_grad():
        return mixer.hybrid(part, state=state, keep_state=True, reuse_state=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"overlap": False}, {"mixing": "shared", "overlap": False}, {"feature_map": "exp"}],
)
def test_error_stays_bounded_over_64k_tokens_of_bfloat16(settings: dict[str, Any]) -> None:
    """In chunks, in parts, and token by token: as small at the end as at the start."""
    mixer, inputs = make_mixer(**settings), layer_inputs(LONG + 256, dtype=BF16)
    expected, exact = read(make_mixer(**settings).double(), wide(inputs), slice(None))
    whole, state = read(mixer, inputs, slice(0, LONG))
    _, parts = read(mixer, inputs, slice(0, LONG // 2 + 7))
    second, parts = read(mixer, inputs, slice(LONG // 2 + 7, LONG), parts)
    steps: list[Tensor] = []
    for t in range(LONG, LONG + 256):
        out, state = read(mixer, inputs, slice(t, t + 1), state)
        steps.append(out)
    scale = expected.abs().mean()

    def error(out: Tensor, start: int) -> float:
        return float((out.double() - expected[:, :, start : start + out.shape[2]]).abs().max() / scale)

    first = error(whole[:, :, 256:4352], 256)
    assert error(whole[:, :, -4096:], LONG - 4096) < 2 * first + 1e-2
    assert error(second[:, :, -4096:], LONG - 4096) < 2 * first + 1e-2
    assert error(torch.cat(steps, 2), LONG) < 2 * first + 1e-2
    settled = state.settled()
    assert settled.linear_normalizer.dtype == torch.float32
    for name in ("linear_state", "linear_normalizer"):
        got, wanted = getattr(settled, name).double(), getattr(exact, name)
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.slow
def test_sums_kept_in_bfloat16_would_have_stalled() -> None:
    mixer, inputs = make_mixer(), layer_inputs(LONG, dtype=BF16)
    assert mixer.phi_k is not None
    with torch.no_grad():
        phi = mixer.phi_k(inputs.k.float())[0, 0]
    kept, at = torch.zeros(phi.shape[1], dtype=BF16), list[Tensor]()
    for t, row in enumerate(phi.to(BF16)):
        kept = kept + row
        if t in (LONG // 2 - 1, LONG - 1):
            at.append(kept.clone())
    exact = phi.double().sum(0)
    assert torch.equal(at[0], at[1])  # the second half of the text left no trace
    assert float(kept.double().sum() / exact.sum()) < 0.2
    _, state = read(mixer, inputs, slice(None))
    torch.testing.assert_close(state.linear_normalizer[0, 0].double(), exact, rtol=1e-4, atol=1e-4)
    lost, mass = lost_mass(phi, BF16)
    assert lost / mass > 0.9
    guard = NumericalGuard()
    guard(mixer, inputs)
    assert guard.results()["guard_state"] < 0.01
