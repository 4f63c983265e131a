"""The mixer: gates, modes, and the donor's own attention."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.config import HybridConfig
from equipoise.layers.interface import equipoise_attention
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.layers.softmax import donor_attention
from equipoise.ops import Branches, window_attention
from support import normal, padding_mask, segments_of

DIM = 8


def mixer(**settings: Any) -> HybridMixer:
    return HybridMixer(HybridConfig(**settings), heads=4, kv_heads=2, head_dim=DIM, layer_idx=0).double()


def inputs(length: int = 30, **extra: Any) -> LayerInputs:
    q, k, v = (normal(2, heads, length, DIM, seed=s) for s, heads in enumerate((4, 2, 2)))
    return LayerInputs(q, k, v, DIM**-0.5, **extra)


def naive(seen: LayerInputs) -> Tensor:
    """Softmax attention of the last T queries over S keys, spelled out."""
    k, v = (t.repeat_interleave(2, 1) for t in (seen.k, seen.v))
    queries, keys = seen.q.shape[2], k.shape[2]
    scores = seen.q @ k.mT * seen.scale
    if seen.softcap is not None:
        scores = seen.softcap * torch.tanh(scores / seen.softcap)
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    mask = (j <= i).expand(2, 1, queries, keys)
    if seen.sliding_window is not None:
        mask = mask & (i - j < seen.sliding_window)
    if seen.key_mask is not None:
        mask = mask & (seen.key_mask[:, None, None] | (i == j))
    if seen.segment_ids is not None:
        mask = mask & (seen.segment_ids[:, None, :, None] == seen.segment_ids[:, None, None])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 6, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("masked", "new"), [*itertools.product(("none", "left", "right"), (30, 7, 1)), ("packed", 30)]
)
def test_donor_attention(window: int | None, softcap: float | None, masked: str, new: int) -> None:
    """Softmax as the donor computes it, ``new`` queries over 30 keys."""
    packed = masked == "packed"
    mask = None if packed else padding_mask(masked, 30)
    seen = inputs(
        sliding_window=window, softcap=softcap, key_mask=mask, segment_ids=segments_of(30) if packed else None
    )
    seen = replace(seen, q=seen.q[:, :, -new:])
    real = torch.ones(2, new, dtype=torch.bool) if mask is None else mask[:, -new:]
    out, expected = donor_attention(seen), naive(seen)
    assert out.isfinite().all()
    torch.testing.assert_close(out.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=0, atol=1e-6)


def test_donor_attention_does_not_guess_the_segments_of_a_cache() -> None:
    seen = inputs()
    with pytest.raises(ValueError, match="expected segment_ids of all 30 keys, got 7"):
        donor_attention(replace(seen, q=seen.q[:, :, -7:], segment_ids=segments_of(7)))


def test_gates() -> None:
    seen = inputs()
    assert mixer(gate_value=0.3).gate(seen.q) == 0.3
    learned = mixer(gate="per_head", gate_value=0.3)
    torch.testing.assert_close(
        learned.gate(seen.q), torch.full((4, 1), 0.3, dtype=torch.float64), rtol=0, atol=1e-6
    )
    fixed = mixer(gate_value=0.3)
    torch.testing.assert_close(learned.hybrid(seen)[0], fixed.hybrid(seen)[0], rtol=0, atol=1e-6)
    learned.hybrid(seen)[0].sum().backward()
    assert learned.gate_logit.grad.abs().min() > 0


def test_a_gate_per_token_starts_per_head_and_follows_q() -> None:
    seen, built = inputs(), mixer(gate="per_token", gate_value=0.3)
    fixed = mixer(gate_value=0.3)
    torch.testing.assert_close(built.hybrid(seen)[0], fixed.hybrid(seen)[0], rtol=0, atol=1e-6)
    torch.nn.init.normal_(built.gate_weight)
    expected = (torch.einsum("bhtd,hd->bht", seen.q, built.gate_weight) + built.gate_logit).sigmoid()
    torch.testing.assert_close(built.gate(seen.q), expected, rtol=0, atol=1e-12)
    whole, state = built.hybrid(seen)[0], None
    assert (whole - fixed.hybrid(seen)[0]).abs().max() > 1e-3
    whole.sum().backward()
    assert built.gate_weight.grad.abs().sum() > 0
    parts = []
    for t in range(seen.q.shape[2]):  # decoding computes the same gates
        one = LayerInputs(*(x[:, :, t : t + 1] for x in (seen.q, seen.k, seen.v)), seen.scale)
        out, state = built.hybrid(one, state=state, keep_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)


def test_a_quadratic_gate_sees_squares_of_q() -> None:
    seen, built = inputs(), mixer(gate="quadratic", gate_value=0.3)
    fixed = mixer(gate_value=0.3)
    torch.testing.assert_close(built.hybrid(seen)[0], fixed.hybrid(seen)[0], rtol=0, atol=1e-6)
    torch.nn.init.normal_(built.gate_weight)
    torch.nn.init.normal_(built.gate_squares)
    of_both = zip((seen.q, seen.q**2), (built.gate_weight, built.gate_squares), strict=True)
    scores = sum(torch.einsum("bhtd,hd->bht", x, weight) for x, weight in of_both)
    torch.testing.assert_close(built.gate(seen.q), (scores + built.gate_logit).sigmoid(), rtol=0, atol=1e-12)
    built.hybrid(seen)[0].sum().backward()
    assert built.gate_squares.grad.abs().sum() > 0


def test_squares_that_turn_together_do_not_tell_positions_apart() -> None:
    """One token at two positions: q turned by two rotary embeddings."""
    built = mixer(gate="quadratic")
    half = built.head_dim // 2
    torch.nn.init.normal_(built.gate_squares)
    built.gate_squares.data[:, half:] = built.gate_squares.data[:, :half]
    q = inputs().q[:, :, :1]
    gates = []
    for position in (3, 700):
        angle = position * 0.1 ** torch.arange(half, dtype=q.dtype)
        first, second = q[..., :half], q[..., half:]
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        gates.append(built.gate(torch.cat(turned, -1)))
    torch.testing.assert_close(*gates, rtol=0, atol=1e-12)
    assert gates[0].std() > 1e-3


def test_modes() -> None:
    seen, built = inputs(), mixer(window=5)
    zero, _ = built.attend(seen, mode=AttentionMode("none"))
    assert torch.equal(zero, torch.zeros_like(zero))
    sinks, _ = built.attend(seen, mode=AttentionMode("swa", window=0, sinks=8))
    first_eight = naive(replace(seen, k=seen.k[:, :, :8], v=seen.v[:, :, :8], q=seen.q[:, :, 7:8]))
    torch.testing.assert_close(sinks[:, :, 7:8], first_eight)
    last = torch.softmax(seen.q[:, :, 29:] @ seen.k[:, :, :8].repeat_interleave(2, 1).mT * seen.scale, -1)
    torch.testing.assert_close(sinks[:, :, 29:], last @ seen.v[:, :, :8].repeat_interleave(2, 1))
    swa, _ = built.attend(seen, mode=AttentionMode("swa", window=9, sinks=2))
    torch.testing.assert_close(swa, window_attention(seen.q, seen.k, seen.v, window=9, sinks=2)[0])
    wider, _ = built.attend(seen, mode=AttentionMode(window=9))
    torch.testing.assert_close(wider, mixer(window=9).hybrid(seen)[0])


def test_features_may_be_handed_in() -> None:
    seen, built = inputs(), mixer(window=5, overlap=False)
    out, _ = built.hybrid(seen, phi_q=built.phi_q(seen.q), phi_k=built.phi_k(seen.k))
    torch.testing.assert_close(out, built.hybrid(seen)[0], rtol=0, atol=1e-12)


def test_same_mode() -> None:
    row = torch.tensor([True, False])
    modes = [
        AttentionMode(),
        AttentionMode("hybrid", Branches(True, False)),
        AttentionMode("hybrid", Branches(True, False, "renormalised")),
        AttentionMode("hybrid", Branches(row)),
        AttentionMode("hybrid", Branches(~row)),
        AttentionMode("swa", window=3),
        AttentionMode("swa", window=3, sinks=1),
        AttentionMode("none"),
    ]
    for i, one in enumerate(modes):
        for j, other in enumerate(modes):
            assert one.same_as(other) == (i == j)
    assert AttentionMode("hybrid", Branches(row)).same_as(AttentionMode("hybrid", Branches(row.clone())))


class _Attention(nn.Module):
    """What transformers hands the interface as ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.hybrid, self.layer_idx = mixer(window=5), 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 30, 30)}, r"2D padding mask .* of shape \[2, 1, 30, 30\]"),
        ({"dropout": 0.1}, "dropout 0, got 0.1"),
        ({"cache": object()}, "paged continuous batching"),
        ({"s_aux": torch.zeros(4), "softcap": 2.0}, "sink logits .s_aux. beside soft-capped"),
        ({"position_bias": torch.zeros(1)}, "position biases"),
        ({"attention_mask": torch.ones(2, 20)}, "covers past and new tokens .30 or more., got 20"),
    ],
)  # fmt: skip
def test_what_the_hybrid_does_not_carry_over_is_refused(extra: dict[str, Any], message: str) -> None:
    seen = inputs()
    extra = {"attention_mask": None, **extra}
    with pytest.raises(ValueError, match=message):
        equipoise_attention(_Attention(), seen.q, seen.k, seen.v, **extra)


def test_interface_layout() -> None:
    seen, module = inputs(), _Attention()
    out, weights = equipoise_attention(module, seen.q, seen.k, seen.v, None)
    assert weights is None
    assert out.shape == (2, 30, 4, DIM)
    torch.testing.assert_close(out.transpose(1, 2), module.hybrid.hybrid(seen)[0])
