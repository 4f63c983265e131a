"""Learned sink logits: what they do to the window, to the mix of both branches, and their gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import Branches, hybrid_attention, window_attention
from equipoise.ops.dispatch import backend
from equipoise.ops.reference import hybrid_attention_reference
from support import PositiveMap, attention_inputs, normal, padding_mask, segments_of

CLOSE = {"rtol": 0, "atol": 1e-12}
LOGITS = torch.tensor([-30.0, -0.5, 1.5, 40.0], dtype=torch.float64)


def windows_logsumexp(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Log-sum-exp of the scores in each query's window [B, H, T]."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    return scores.masked_fill((distance < 0) | (distance >= window), -torch.inf).logsumexp(-1)


def test_the_window_is_scaled_by_what_the_sink_leaves() -> None:
    """sigmoid(lse - s), as GPT-OSS was published; s of any size, and -inf is no sink."""
    q, k, v = attention_inputs(37)
    plain, _ = window_attention(q, k, v, window=9)
    out, _ = window_attention(q, k, v, window=9, sink_logits=LOGITS)
    kept = torch.sigmoid(windows_logsumexp(q, k, 9) - LOGITS[:, None])
    torch.testing.assert_close(out, plain * kept[..., None], **CLOSE)
    none, _ = window_attention(q, k, v, window=9, sink_logits=torch.full((4,), -torch.inf).double())
    torch.testing.assert_close(none, plain, **CLOSE)


def test_it_is_a_key_of_value_zero() -> None:
    """Without `scale` or softcap on it: attention over T + 1 keys, the first one open to every query."""
    length = 21
    q, k, v = attention_inputs(length, kv=4)
    scores = torch.tanh(q @ k.mT * 6**-0.5 / 2.0) * 2.0
    scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    column = LOGITS[None, :, None, None].expand(2, -1, length, 1)
    weights = torch.cat([column, scores], -1).softmax(-1)
    expected = weights @ torch.cat([torch.zeros_like(v[:, :, :1]), v], 2)
    out, _ = window_attention(q, k, v, window=length, softcap=2.0, sink_logits=LOGITS)
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("mixing", ["convex", "shared", "shared-affine"])
def test_it_rests_in_the_windows_term_alone(mixing: str) -> None:
    """Literal ablations still add up to the hybrid, and the linear branch alone knows of no sink."""
    q, k, v = attention_inputs(30)
    phi = PositiveMap(4, seed=1), PositiveMap(2, seed=2)

    def run(logits: Tensor | None, branches: Branches) -> Tensor:
        with torch.no_grad():
            return hybrid_attention(
                q, k, v, *phi, window=5, mixing=mixing, gate=0.4, sink_logits=logits, branches=branches
            )[0]

    both = run(LOGITS, Branches())
    terms = run(LOGITS, Branches(True, False)) + run(LOGITS, Branches(False, True))
    torch.testing.assert_close(terms, both, **CLOSE)
    alone = Branches(False, True, "renormalised")
    torch.testing.assert_close(run(LOGITS, alone), run(None, alone), **CLOSE)
    window = Branches(True, False, "renormalised")
    expected, _ = window_attention(q, k, v, window=5, sink_logits=LOGITS)
    torch.testing.assert_close(run(LOGITS, window), expected, **CLOSE)


def test_what_an_overwhelming_sink_leaves_of_each_rule() -> None:
    """Convex: the linear branch at its weight. Shared: nothing, since both have one denominator."""
    q, k, v = attention_inputs(30)
    phi = PositiveMap(4, seed=1), PositiveMap(2, seed=2)
    heavy = torch.full((4,), 800.0, dtype=torch.float64)  # exp of it is no number
    with torch.no_grad():
        linear, _ = hybrid_attention(q, k, v, *phi, window=None)
        convex, _ = hybrid_attention(q, k, v, *phi, window=5, gate=0.4, sink_logits=heavy)
        shared, _ = hybrid_attention(q, k, v, *phi, window=5, gate=0.4, mixing="shared", sink_logits=heavy)
        expected = hybrid_attention_reference(
            q, k, v, phi[0](q), phi[1](k), window=5, gate=0.4, mixing="shared", sink_logits=heavy
        )
    torch.testing.assert_close(convex, 0.6 * linear, **CLOSE)
    torch.testing.assert_close(shared, expected, **CLOSE)
    # the sink counts 0.4 there (gamma times its weight of 1), linear attention what its features say
    assert (shared.norm(dim=-1) < linear.norm(dim=-1)).all()


@pytest.mark.parametrize("name", ["walk", "stream"])
@pytest.mark.parametrize("mixing", ["convex", "shared"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_the_definitions(mixing: str, name: str, masked: bool) -> None:
    """Of the logits too; in float64, over several chunks."""
    length = 71
    inputs = [t.requires_grad_() for t in attention_inputs(length)]
    features = [normal(2, heads, length, 5, seed=heads).exp().requires_grad_() for heads in (4, 2)]
    logits = normal(4, seed=11).requires_grad_()
    options: dict[str, Any] = {"window": 9, "mixing": mixing, "overlap": False, "sink_logits": logits}
    if masked:
        options |= {"key_mask": padding_mask("left", length), "segment_ids": segments_of(length, share=0.05)}
    leaves = [*inputs, *features, logits]
    with backend(name):
        out, _ = hybrid_attention(*inputs, *features, chunk_size=16, **options)
    expected = hybrid_attention_reference(*inputs, *features, **options)
    torch.testing.assert_close(out, expected, **CLOSE)
    upstream = normal(*out.shape, seed=9)
    got = torch.autograd.grad((out * upstream).sum(), leaves)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert other.abs().amax() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixing", ["convex", "shared"])
def test_only_the_logits_may_learn(mixing: str) -> None:
    """Everything else frozen: their gradient must not depend on who else has one."""
    q, k, v = attention_inputs(40)
    features = normal(2, 4, 40, 5, seed=4).exp(), normal(2, 2, 40, 5, seed=2).exp()
    found: list[Tensor] = []
    for name in ("walk", "stream"):
        logits = normal(4, seed=11).requires_grad_()
        with backend(name):
            out, _ = hybrid_attention(q, k, v, *features, window=6, mixing=mixing, sink_logits=logits)
        found += torch.autograd.grad(out.square().sum(), logits)
    assert found[0].abs().amax() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
