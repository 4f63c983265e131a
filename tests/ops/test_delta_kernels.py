"""The delta rule on flash-linear-attention's kernels: what they are given, and with CUDA what they answer."""

from __future__ import annotations

import sys
from importlib import metadata
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import delta_kernels
from equipoise.ops.delta import FEWEST, delta_attention
from equipoise.ops.dispatch import backend
from equipoise.ops.reference import delta_rule
from support import masks_by_name, normal

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
    output_final_state: bool, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `fla.ops.delta_rule.chunk_delta_rule` promises, token by token: heads behind tokens, and with
    bounds one row of sequences, each from a state of its own."""
    assert output_final_state
    assert scale == 1.0
    assert initial_state.dtype == torch.float32
    wide, outs, ends = initial_state.to(torch.promote_types(q.dtype, torch.float32)), list[Tensor](), []
    for row, first, stop in (
        [(b, 0, q.shape[1]) for b in range(len(q))]
        if cu_seqlens is None
        else [(0, *pair) for pair in pairwise(cu_seqlens.tolist())]
    ):
        sums = wide[len(ends)]
        for t in range(first, stop):
            known = torch.einsum("hk,hkv->hv", k[row, t].to(sums), sums)
            taken = v[row, t].to(sums) - known
            sums = sums + torch.einsum("hk,hv->hkv", beta[row, t, :, None].to(sums) * k[row, t], taken)
            outs.append(torch.einsum("hk,hkv->hv", q[row, t].to(sums), sums))
        ends.append(sums)
    return torch.stack(outs).view(*v.shape).to(q.dtype), torch.stack(ends)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, ...]]:
    """Every call is one for the kernels, the recurrence in their place; the dtypes that it was given."""
    dtypes: list[tuple[torch.dtype, ...]] = []

    def called(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        dtypes.append((q.dtype, k.dtype, v.dtype, beta.dtype))
        return recurrence(q, k, v, beta, **options)

    module = SimpleNamespace(chunk_delta_rule=called)
    monkeypatch.setattr(delta_kernels, "fla_module", lambda _: (module, ""))
    monkeypatch.setattr(delta_kernels, "unsupported", lambda *_: None)
    return dtypes


MASKS: dict[str, dict[str, Any]] = {**masks_by_name(T)}


@pytest.mark.parametrize("masked", MASKS)
def test_what_they_are_given(stand_in: list[tuple[torch.dtype, ...]], masked: str) -> None:
    tensors = drawn()
    leaves = [x.clone().requires_grad_() for x in tensors[2:]]
    out, state = delta_attention(*tensors[:2], *leaves, output_final_state=True, **MASKS[masked])
    assert stand_in == [(torch.float64,) * 4]
    mine = [x.clone().requires_grad_() for x in tensors[2:]]
    right, sums = expected([*tensors[:2], *mine], **MASKS[masked])
    torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-11)
    assert state is not None
    assert state.linear_state is not None
    torch.testing.assert_close(state.linear_state, sums[:, ::SHARED], rtol=1e-10, atol=1e-11)
    given = normal(*out.shape, seed=9)
    for one, other in zip(
        torch.autograd.grad(out, leaves, given), torch.autograd.grad(right, mine, given), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("split", [20, 70])
def test_resumed(stand_in: list[tuple[torch.dtype, ...]], masked: str, split: int) -> None:
    """From S in float32, as the kernels take it: hence the tolerance."""
    tensors = drawn()
    whole, sums = expected(tensors, **MASKS[masked])
    outs, state = list[Tensor](), None
    for part in (slice(0, split), slice(split, T)):
        masks = {name: mask[:, part] for name, mask in MASKS[masked].items()}
        out, state = delta_attention(
            *(x[:, :, part] for x in tensors), initial_state=state, output_final_state=True, **masks
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-5, atol=1e-5)
    assert state is not None
    assert state.linear_state is not None
    torch.testing.assert_close(state.linear_state, sums[:, ::SHARED], rtol=1e-5, atol=1e-5)
    assert len(stand_in) == 2


def test_products_have_16_bits_and_sums_32(stand_in: list[tuple[torch.dtype, ...]]) -> None:
    tensors = drawn(torch.bfloat16)
    out, state = delta_attention(*tensors, output_final_state=True)
    assert stand_in == [(torch.bfloat16,) * 4]
    assert out.dtype == torch.bfloat16
    assert state is not None
    assert state.linear_state is not None
    assert state.linear_state.dtype == torch.float32


def test_short_calls_and_other_backends_do_without(stand_in: list[tuple[torch.dtype, ...]]) -> None:
    tensors = drawn()
    delta_attention(*(x[:, :, : FEWEST - 1] for x in tensors))
    with backend("walk"):
        delta_attention(*tensors)
    assert stand_in == []


@pytest.mark.parametrize(
    ("device", "dtype", "features", "value_size", "reason"),
    [
        ("cpu", torch.bfloat16, 32, 16, "on cpu"),
        ("cuda", torch.float32, 32, 16, "float32"),
        ("cuda", torch.bfloat16, 272, 16, "272 features"),
        ("cuda", torch.bfloat16, 40, 16, "40 features"),
        ("cuda", torch.float16, 32, 8, "8 numbers a value"),
        ("cuda", torch.bfloat16, 32, 16, "too old"),
    ],
)
def test_why_they_cannot_run(
    device: str, dtype: torch.dtype, features: int, value_size: int, reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(delta_kernels, "fla_module", lambda _: (None, "too old"))
    found = delta_kernels.unsupported(torch.device(device), dtype, features, value_size)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("size", [16, 256])
def test_what_they_can_run(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_kernels, "fla_module", lambda _: (recurrence, ""))
    assert delta_kernels.unsupported(torch.device("cuda"), torch.bfloat16, size, size) is None


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "not installed"), ("0.5.9", "is 0.5.9, 0.6 is needed"), ("0.6rc1", "cannot be imported")],
)
def test_installations_that_do_not_do(
    version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        assert name == "flash-linear-attention"
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.setitem(sys.modules, "fla.ops.delta_rule", None)  # raises ImportError
    found, why = delta_kernels.fla_module.__wrapped__(delta_kernels.MODULE)
    assert found is None
    assert reason in why


@pytest.mark.gpu
@pytest.mark.parametrize("masked", MASKS)
def test_on_a_gpu(masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, state, gradients in bfloat16, against the recurrence in float64 from inputs rounded alike."""
    if not torch.cuda.is_available():
        pytest.skip("runs with CUDA only")
    pytest.importorskip("fla")
    monkeypatch.setattr("equipoise.ops.delta._chunks", None)  # a fallback would prove nothing
    rounded, masks = drawn(torch.bfloat16), {name: x.cuda() for name, x in MASKS[masked].items()}
    leaves = [x.cuda().requires_grad_() for x in rounded]
    outs, state = list[Tensor](), None
    for part in (slice(0, 70), slice(70, T)):
        out, state = delta_attention(
            *(x[:, :, part] for x in leaves), initial_state=state, output_final_state=True,
            **{name: mask[:, part] for name, mask in masks.items()},
        )  # fmt: skip
        outs.append(out)
    out, mine = torch.cat(outs, 2), [x.double().requires_grad_() for x in rounded]
    right, sums = expected(mine, **MASKS[masked])
    assert state is not None
    assert state.linear_state is not None
    given = normal(*out.shape, seed=9).to(torch.bfloat16)
    ours = torch.autograd.grad(out, leaves[2:], given.cuda())
    theirs = torch.autograd.grad(right, mine[2:], given.double())
    found = [(out, right), (state.linear_state, sums[:, ::SHARED]), *zip(ours, theirs, strict=True)]
    for one, other in found:
        off = (one.double().cpu() - other).abs().max() / other.abs().max()
        assert off < 3e-2
