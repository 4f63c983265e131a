"""The delta rule on flash-linear-attention's kernels: what they are given, and with CUDA what they answer."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import delta_kernels
from equipoise.ops.delta import FEWEST, delta_attention
from equipoise.ops.dispatch import backend
from equipoise.ops.reference import delta_rule
from support import normal, padding_mask

B, N, SHARED, T, D, F, E = 2, 2, 2, 150, 8, 32, 16


def drawn(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """q, k, v, phi(q), phi(k), rounded to ``dtype``; keys of lengths between 0 and 1, values of group N."""
    q, phi_q = normal(B, N * SHARED, T, D, seed=1), normal(B, N * SHARED, T, F, seed=2)
    k, v, phi_k = (normal(B, N, T, size, seed=seed) for seed, size in ((3, D), (4, E), (5, F)))
    phi_k = 0.99 * phi_k / phi_k.norm(dim=-1, keepdim=True) * normal(B, N, T, 1, seed=6).sigmoid()
    return [x.to(device, dtype) for x in (q, k, v, phi_q, phi_k)]


def expected(tensors: list[Tensor], **masks: Any) -> tuple[Tensor, Tensor]:
    """(output, S) of the recurrence, every query head with a state of its own."""
    _, _, v, phi_q, phi_k = tensors
    return delta_rule(phi_q, phi_k.repeat_interleave(SHARED, 1), v.repeat_interleave(SHARED, 1), **masks)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, scale: float, initial_state: Tensor,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `fla.ops.delta_rule.chunk_delta_rule` promises, token by token: heads behind tokens."""
    assert output_final_state
    assert scale == 1.0
    sums, outs = initial_state, list[Tensor]()
    for t in range(q.shape[1]):
        known = torch.einsum("bhk,bhkv->bhv", k[:, t], sums)
        sums = sums + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], v[:, t] - known)
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], sums))
    return torch.stack(outs, 1), sums


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call is one for the kernels, in whose place the recurrence stands; lengths that it was given."""
    lengths: list[int] = []

    def called(q: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        lengths.append(q.shape[1])
        return recurrence(q, *rest, **options)

    monkeypatch.setitem(sys.modules, "fla.ops.delta_rule", SimpleNamespace(chunk_delta_rule=called))
    monkeypatch.setattr(delta_kernels, "unsupported", lambda *_, **__: None)
    return lengths


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_what_they_are_given(stand_in: list[int], side: str) -> None:
    tensors, mask = drawn(), padding_mask(side, T)
    leaves = [x.clone().requires_grad_() for x in tensors[2:]]
    out, state = delta_attention(*tensors[:2], *leaves, key_mask=mask, output_final_state=True)
    assert stand_in == [T]
    mine = [x.clone().requires_grad_() for x in tensors[2:]]
    right, sums = expected([*tensors[:2], *mine], key_mask=mask)
    torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-11)
    assert state is not None
    assert state.linear_state is not None
    torch.testing.assert_close(state.linear_state, sums[:, ::SHARED], rtol=1e-10, atol=1e-11)
    given = normal(*out.shape, seed=9)
    for one, other in zip(
        torch.autograd.grad(out, leaves, given), torch.autograd.grad(right, mine, given), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_resumed(stand_in: list[int]) -> None:
    tensors = drawn()
    whole, _ = expected(tensors)
    first, state = delta_attention(*(x[:, :, :70] for x in tensors), output_final_state=True)
    rest, _ = delta_attention(*(x[:, :, 70:] for x in tensors), initial_state=state)
    torch.testing.assert_close(torch.cat([first, rest], 2), whole, rtol=1e-10, atol=1e-11)
    assert stand_in == [70, T - 70]


def test_short_calls_and_other_backends_do_without(stand_in: list[int]) -> None:
    tensors = drawn()
    delta_attention(*(x[:, :, : FEWEST - 1] for x in tensors))
    with backend("walk"):
        delta_attention(*tensors)
    assert stand_in == []


@pytest.mark.parametrize(
    ("device", "dtype", "features", "packed", "reason"),
    [
        ("cpu", torch.bfloat16, F, False, "on cpu"),
        ("cuda", torch.float32, F, False, "float32"),
        ("cuda", torch.bfloat16, F, True, "packed rows"),
        ("cuda", torch.bfloat16, 300, False, "300 features"),
        ("cuda", torch.bfloat16, 8, False, "8 features and 16 numbers"),
        ("cuda", torch.bfloat16, F, False, "flash-linear-attention"),
    ],
)
def test_why_they_cannot_run(
    device: str, dtype: torch.dtype, features: int, packed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_kernels, "_installed", lambda: False)
    found = delta_kernels.unsupported(torch.device(device), dtype, features, E, packed=packed)
    assert found is not None
    assert reason in found


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["none", "left"])
def test_on_a_gpu(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, state, gradients in bfloat16, against the recurrence in float64 from inputs rounded alike."""
    if not torch.cuda.is_available():
        pytest.skip("runs with CUDA only")
    pytest.importorskip("fla")
    monkeypatch.setattr("equipoise.ops.delta._chunks", None)  # a fallback would prove nothing
    rounded, mask = drawn(torch.bfloat16), padding_mask(side, T)
    leaves = [x.cuda().requires_grad_() for x in rounded]
    cuda_mask = None if mask is None else mask.cuda()
    out, state = delta_attention(
        *(x[:, :, :70] for x in leaves), key_mask=None if cuda_mask is None else cuda_mask[:, :70],
        output_final_state=True,
    )  # fmt: skip
    rest, state = delta_attention(
        *(x[:, :, 70:] for x in leaves), key_mask=None if cuda_mask is None else cuda_mask[:, 70:],
        initial_state=state, output_final_state=True,
    )  # fmt: skip
    out = torch.cat([out, rest], 2)
    mine = [x.double().requires_grad_() for x in rounded]
    right, sums = expected(mine, key_mask=mask)
    assert state is not None
    assert state.linear_state is not None
    given = normal(*out.shape, seed=9).to(torch.bfloat16)
    ours = torch.autograd.grad(out, leaves[2:], given.cuda())
    theirs = torch.autograd.grad(right, mine[2:], given.double())
    for one, other in [
        (out, right),
        (state.linear_state, sums[:, ::SHARED]),
        *zip(ours, theirs, strict=True),
    ]:
        off = (one.double().cpu() - other).abs().max() / other.abs().max()
        assert off < 3e-2
