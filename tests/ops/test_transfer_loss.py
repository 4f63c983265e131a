"""The transfer cross-entropy in blocks against its direct, quadratic form: loss, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise.ops import transfer_blocks
from equipoise.ops.reference import donor_softmax_reference, transfer_cross_entropy_reference
from equipoise.ops.transfer_loss import transfer_cross_entropy

F64 = torch.float64
SCALE = 0.4


def inputs(length: int, *, maps: int = 4, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k with 4 and 2 heads of 6; phi(q), phi(k) with 5 positive features, phi(k) with `maps` heads."""
    q, k = torch.randn(2, 4, length, 6), torch.randn(2, 2, length, 6)
    phi_q, phi_k = torch.randn(2, 4, length, 5).exp(), torch.randn(2, maps, length, 5).exp()
    q, k, phi_q, phi_k = (t.to(dtype) for t in (q, k, phi_q, phi_k))
    return q, k, phi_q.requires_grad_(), phi_k.requires_grad_()


def assert_matches(length: int, maps: int, **options: Any) -> None:
    options["scale"] = SCALE
    q, k, phi_q, phi_k = inputs(length, maps=maps)
    loss = transfer_cross_entropy(q, k, phi_q, phi_k, **options)
    expected = transfer_cross_entropy_reference(q, k, phi_q, phi_k, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(loss)
    for got, want in zip(
        torch.autograd.grad((loss * weights).sum(), (phi_q, phi_k)),
        torch.autograd.grad((expected * weights).sum(), (phi_q, phi_k)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def masks(length: int) -> dict[str, dict[str, Any]]:
    segments = (torch.rand(2, length) < 0.1).long().cumsum(1)
    holes = torch.rand(2, length) < 0.7
    left = torch.arange(length).expand(2, length) >= torch.tensor([[length // 2], [0]])
    return {
        "plain": {},
        "holes": {"key_mask": holes},
        "left padding": {"key_mask": left},
        "segments": {"segment_ids": segments},
        "window": {"window": 9},
        "softcap": {"softcap": 2.0},
        "sink": {"sink_logits": torch.randn(4, dtype=F64)},
        "all": {
            "key_mask": holes,
            "segment_ids": segments,
            "window": 40,
            "softcap": 2.0,
            "sink_logits": torch.randn(4, dtype=F64),
        },
    }


@pytest.mark.parametrize("maps", [2, 4])
@pytest.mark.parametrize("case", list(masks(1)))
@pytest.mark.parametrize("length", [1, 63, 130])
def test_loss_and_gradients_in_small_blocks(
    length: int, case: str, maps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_blocks, "BLOCK", 16)
    assert_matches(length, maps, **masks(length)[case])


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("length", [300, 520])
def test_loss_and_gradients_in_blocks_as_shipped(length: int, case: str) -> None:
    assert_matches(length, 2, **masks(length)[case])


@pytest.mark.parametrize("maps", [2, 4])
def test_gradcheck(maps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_blocks, "BLOCK", 4)
    q, k, phi_q, phi_k = inputs(7, maps=maps)
    segments = torch.tensor([[0] * 7, [0, 0, 0, 1, 1, 1, 2]])
    assert torch.autograd.gradcheck(
        lambda a, b: transfer_cross_entropy(q, k, a, b, scale=SCALE, segment_ids=segments), (phi_q, phi_k)
    )


def test_equals_divergence_plus_entropy() -> None:
    q, k, phi_q, phi_k = inputs(33)
    p, mask = donor_softmax_reference(q, k, scale=SCALE)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    products = (phi_q @ phi_k.mT).masked_fill(~mask, 0)
    a = products / products.sum(-1, keepdim=True)
    divergence = torch.where(mask, p * (p.clamp_min(1e-300).log() - a.clamp_min(1e-300).log()), 0).sum(-1)
    loss = transfer_cross_entropy(q, k, phi_q, phi_k, scale=SCALE)
    torch.testing.assert_close(loss, divergence + entropy)


def test_perfect_features_reach_the_entropy_with_no_gradient() -> None:
    """exp(s) as a feature map of one-hot keys: linear attention is then softmax attention itself."""
    length = 12
    q, k, _, _ = inputs(length)
    scores = q @ k.repeat_interleave(2, 1).mT * SCALE
    phi_q = (scores - scores.amax(-1, keepdim=True)).exp().requires_grad_()
    phi_k = torch.eye(length, dtype=F64).expand(2, 4, length, length).clone().requires_grad_()
    loss = transfer_cross_entropy(q, k, phi_q, phi_k, scale=SCALE)
    p, _ = donor_softmax_reference(q, k, scale=SCALE)
    torch.testing.assert_close(loss, -torch.special.xlogy(p, p).sum(-1))
    (grad,) = torch.autograd.grad(loss.sum(), (phi_q,))
    assert grad.abs().max() < 1e-12


def test_donor_gets_no_gradient() -> None:
    q, k, phi_q, phi_k = inputs(20)
    q.requires_grad_()
    k.requires_grad_()
    transfer_cross_entropy(q, k, phi_q, phi_k, scale=SCALE).sum().backward()
    assert q.grad is None
    assert k.grad is None
    assert phi_q.grad is not None
    assert phi_k.grad is not None


def test_rows_of_padding_and_rows_without_keys_count_nothing() -> None:
    q, k, phi_q, phi_k = inputs(10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :4] = False
    loss = transfer_cross_entropy(q, k, phi_q, phi_k, scale=SCALE, key_mask=mask)
    assert torch.equal(loss[0, :, :4], torch.zeros(4, 4, dtype=F64))
    assert (loss[0, :, 5:] > 0).all()
    gradients = torch.autograd.grad(loss.sum(), (phi_q, phi_k))
    assert all(torch.count_nonzero(g[0, :, :4]) == 0 for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_signed_features_are_clamped(dtype: torch.dtype) -> None:
    """Products below the floor, negative ones too, count as the floor and get no gradient."""
    q, k, _, _ = inputs(40, dtype=dtype)
    phi_q = torch.randn(2, 4, 40, 5, dtype=dtype, requires_grad=True)
    phi_k = torch.randn(2, 2, 40, 5, dtype=dtype, requires_grad=True)
    assert (phi_q[:, ::2] @ phi_k.mT < 0).any()
    loss = transfer_cross_entropy(q, k, phi_q, phi_k, scale=SCALE)
    gradients = torch.autograd.grad(loss.mean(), (phi_q, phi_k))
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    if dtype == F64:
        expected = transfer_cross_entropy_reference(q, k, phi_q, phi_k, scale=SCALE)
        torch.testing.assert_close(loss, expected)
        for got, want in zip(gradients, torch.autograd.grad(expected.mean(), (phi_q, phi_k)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_features_all_zero_stay_finite() -> None:
    q, k, _, _ = inputs(9, dtype=torch.float32)
    zeros = torch.zeros(2, 4, 9, 5, requires_grad=True)
    loss = transfer_cross_entropy(q, k, zeros, zeros, scale=SCALE)
    loss.sum().backward()
    # uniform weights over the keys seen
    torch.testing.assert_close(loss[0, 0], torch.arange(1, 10).float().log())
    assert zeros.grad is not None
    assert torch.count_nonzero(zeros.grad) == 0


@pytest.mark.parametrize("poisoned", ["donor", "features"])
def test_what_is_not_a_number_shows(poisoned: str) -> None:
    """A NaN must not pass for a row without keys."""
    q, k, phi_q, phi_k = inputs(9)
    with torch.no_grad():
        (k if poisoned == "donor" else phi_k)[0, :, 4] = float("nan")
    loss = transfer_cross_entropy(q, k, phi_q, phi_k, scale=SCALE)
    assert loss[0, :, 4:].isnan().all()
    assert loss[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    q, k, phi_q, phi_k = inputs(300)
    q, k = q.to(dtype), k.to(dtype)
    low_q, low_k = (t.detach().to(dtype).requires_grad_() for t in (phi_q, phi_k))
    loss = transfer_cross_entropy(q, k, low_q, low_k, scale=SCALE)
    assert loss.dtype == torch.float32
    # the same rounded inputs, summed in float64
    wide = (t.double() for t in (q, k, low_q, low_k))
    exact = transfer_cross_entropy_reference(*wide, scale=SCALE)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), (low_q,))
    assert grad.dtype == dtype


def test_features_more_exact_than_the_donor_stay_so() -> None:
    q, k, phi_q, phi_k = inputs(20)
    loss = transfer_cross_entropy(q.float(), k.float(), phi_q, phi_k, scale=SCALE)
    assert loss.dtype == F64


def test_autocast_does_not_degrade_it() -> None:
    q, k, phi_q, phi_k = inputs(70, dtype=torch.float32)

    def run() -> list[Tensor]:
        loss = transfer_cross_entropy(q, k, phi_q, phi_k, scale=SCALE)
        return [loss, *torch.autograd.grad(loss.sum(), (phi_q, phi_k))]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run()
    for got, want in zip(under, plain, strict=True):
        assert torch.equal(got, want)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_memory_is_linear_in_the_length() -> None:
    length, heads = 2048, 1
    q, k = torch.randn(1, heads, length, 4), torch.randn(1, heads, length, 4)
    phi_q, phi_k = (torch.rand(1, heads, length, 4, requires_grad=True) for _ in range(2))
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        transfer_cross_entropy(q, k, phi_q, phi_k, scale=1.0).sum().backward()
    assert largest.elements <= heads * transfer_blocks.BLOCK**2
    assert saved <= length * heads * (4 + 4 + 2) + 16  # features, and two numbers a row
