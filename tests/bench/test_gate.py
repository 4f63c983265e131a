"""The correctness gate passes what is right and stops what is wrong; peers compute what they claim."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from equipoise.bench import decode, gate, models, peers, transfer
from equipoise.bench.gate import GateError, check_attention
from equipoise.bench.peers import OURS, PEERS, batched_linear, local_softmax
from equipoise.bench.setting import BenchError, BenchSetting, Inputs, UnavailableError, make_inputs
from equipoise.ops.delta_kernels import fla_module
from equipoise.ops.reference import linear_attention_recurrent

SMALL = BenchSetting(heads=4, kv_heads=2, head_dim=8, window=8, feature_dim=16)
NAMES = (OURS, "sdpa", "band", "composed", "txt")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference loops over rows and heads; 70 is past one chunk of 64."""
    for module in (gate, decode, transfer):
        monkeypatch.setattr(module, "LENGTHS", (1, 9, 70))


@pytest.mark.parametrize(
    "setting",
    [
        SMALL,
        replace(SMALL, dtype="bfloat16"),
        replace(SMALL, features="maps"),
        replace(SMALL, map_heads="key_value"),
    ],
    ids=["plain", "bfloat16", "maps", "key_value"],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_everyone_passes(setting: BenchSetting, gradients: bool) -> None:
    said = check_attention(setting, NAMES, gradients=gradients)
    assert all(name in said[0] for name in NAMES)


def test_unavailable_peers_are_not_said_to_be_checked() -> None:
    assert "fla" not in check_attention(SMALL, (OURS, "fla"), gradients=False)[0]


def test_the_composed_path_of_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its kernel, which needs a GPU: layouts, repeated heads, no scale, and the mix."""

    def chunk_linear_attn(
        q: Tensor, k: Tensor, v: Tensor, scale: float, normalize: bool
    ) -> tuple[Tensor, None]:
        assert normalize
        turned = (x.transpose(1, 2) for x in (scale * q, k, v))
        return linear_attention_recurrent(*turned)[0].transpose(1, 2), None

    fla_module.cache_clear()
    monkeypatch.setattr(metadata, "version", lambda _: "0.6.0")
    for name in ("fla", "fla.ops", "fla.ops.linear_attn"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    vars(module)["chunk_linear_attn"] = chunk_linear_attn
    x = make_inputs(SMALL, 70)
    on_a_gpu = replace(SMALL)
    object.__setattr__(on_a_gpu, "device", "cuda")
    ours = PEERS["fla"].build(on_a_gpu, x)()
    gate.compare("fla", ours, gate.right_answer(SMALL, x, "hybrid"), 2e-4)
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", None)
    fla_module.cache_clear()
    with pytest.raises(UnavailableError, match="cannot be imported"):
        PEERS["fla"].build(on_a_gpu, x)
    fla_module.cache_clear()  # nothing of this is left for others


@pytest.mark.parametrize("gradients", [False, True])
def test_a_wrong_operator_stops(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PEERS[OURS]

    def build(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
        call = right.build(setting, x)
        return lambda: call() * 1.001

    monkeypatch.setitem(PEERS._entries, OURS, replace(right, build=build))
    with pytest.raises(GateError, match="output of equipoise at T = 1"):
        check_attention(SMALL, (OURS,), gradients=gradients)


def test_a_wrong_gradient_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PEERS[OURS]

    def build(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
        call = right.build(setting, replace(x, v=x.v + (x.v - x.v.detach())))  # equal values, twice the slope
        return call

    monkeypatch.setitem(PEERS._entries, OURS, replace(right, build=build))
    assert check_attention(SMALL, (OURS,), gradients=False)
    with pytest.raises(GateError, match="gradient of v of equipoise"):
        check_attention(SMALL, (OURS,), gradients=True)


def test_not_a_number_is_wrong() -> None:
    with pytest.raises(GateError):
        gate.compare("this", torch.tensor([float("nan")]), torch.ones(1), 1.0)


def test_decoding_passes_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode.check(SMALL, (OURS, "sdpa", "concat"))
    step = decode.step
    monkeypatch.setattr(decode, "step", lambda *given: (step(*given)[0] + 0.01, given[-1]))
    with pytest.raises(GateError, match="decoding by equipoise"):
        decode.check(SMALL, (OURS,))


def test_transfer_passes_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transfer.check(SMALL, (OURS, "txt"))
    loss = transfer.transfer_cross_entropy
    monkeypatch.setattr(transfer, "transfer_cross_entropy", lambda *a, **k: 1.01 * loss(*a, **k))
    with pytest.raises(GateError, match="loss of equipoise"):
        transfer.check(SMALL, (OURS,))


def test_models_pass() -> None:
    setting = BenchSetting(window=16)
    built = models.build(setting, "small", 1)
    assert set(built) == {OURS, "sdpa"}
    assert models.check(built, setting)


def test_composed_parts() -> None:
    x = make_inputs(SMALL, 70)
    phi_q, phi_k = x.features()
    wide = (t.double().repeat_interleave(4 // t.shape[1], 1) for t in (phi_k, x.v))
    expected, _ = linear_attention_recurrent(phi_q.double(), *wide)
    torch.testing.assert_close(batched_linear(phi_q, phi_k, x.v).double(), expected, rtol=1e-4, atol=1e-5)
    window = peers.PEERS["band"].build(SMALL, x)()
    torch.testing.assert_close(local_softmax(SMALL, x), window, rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_group() -> None:
    with pytest.raises(BenchError, match="multiple"):
        BenchSetting(heads=4, kv_heads=3)
