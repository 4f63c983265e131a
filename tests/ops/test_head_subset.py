"""Linear attention in some heads only: against the whole hybrid with the other heads' branch off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import Branches, hybrid_attention, window_attention
from equipoise.ops.head_subset import heads_of, subset_attention
from support import normal, padding_mask, segments_of

B, H, N, T, D, F = 2, 4, 2, 37, 8, 12
HEADS = (1, 2)


def drawn() -> tuple[Tensor, ...]:
    """q, k, v, and features of all query heads."""
    q, k, v = (normal(B, heads, T, D, seed=seed) for seed, heads in enumerate((H, N, N)))
    return q, k, v, *(normal(B, H, T, F, seed=seed).exp() for seed in (3, 4))


def expected(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, **more: Any) -> Tensor:
    """All heads hybrid, then the window alone where a head has no linear branch."""
    plain = {name: value for name, value in more.items() if name not in ("gate", "branches")}
    whole, _ = hybrid_attention(q, k, v, phi_q, phi_k, **more)
    near, _ = window_attention(q, k, v, **plain)
    others = [head for head in range(H) if head not in HEADS]
    whole[:, others] = near[:, others]
    return whole


MASKS = {
    "plain": {},
    "left": {"key_mask": padding_mask("left", T)},
    "packed": {"segment_ids": segments_of(T)},
    "sinks": {"sinks": 3},
    "softcap": {"softcap": 2.0},
}
FLAGS = {
    "both": Branches(),
    "literal linear": Branches(window=False),
    "linear": Branches(window=False, reading="renormalised"),
    "window": Branches(linear=False, reading="renormalised"),
    "neither": Branches(False, False),
    "rows": Branches(window=torch.tensor([True, False]), reading="renormalised"),
    "heads": Branches(window=torch.tensor([[True, False, True, False]] * B), reading="renormalised"),
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("gated", ["number", "head", "token"])
def test_equals_the_hybrid_with_heads_switched_off(masked: str, flags: str, gated: str) -> None:
    q, k, v, phi_q, phi_k = drawn()
    gates = {"number": 0.3, "head": normal(H, 1, seed=5), "token": normal(B, H, T, seed=6)}
    gate = gates[gated]
    gate = gate.sigmoid() if isinstance(gate, Tensor) else gate
    more: Any = {"window": 5, "gate": gate, "branches": FLAGS[flags], **MASKS[masked]}
    index = list(HEADS)
    got, state = subset_attention(q, k, v, phi_q[:, index], phi_k[:, index], heads=HEADS, **more)
    assert state is None
    torch.testing.assert_close(got, expected(q, k, v, phi_q, phi_k, **more), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixing", ["convex", "competing", "calibrated"])
@pytest.mark.parametrize("masked", MASKS)
def test_splitting_anywhere_changes_nothing(masked: str, mixing: str) -> None:
    q, k, v, phi_q, phi_k = drawn()
    index, gate = list(HEADS), normal(B, H, T, seed=6).sigmoid()
    more: Any = MASKS[masked]
    settings: Any = {"heads": HEADS, "window": 5, "mixing": mixing, "output_final_state": True}
    whole, last = subset_attention(q, k, v, phi_q[:, index], phi_k[:, index], gate=gate, **settings, **more)
    parts, state = [], None
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, T)):
        cut = slice(start, stop)
        now = {n: m[:, cut] if isinstance(m, Tensor) else m for n, m in more.items()}
        part, state = subset_attention(
            q[:, :, cut], k[:, :, cut], v[:, :, cut], phi_q[:, index, cut], phi_k[:, index, cut],
            gate=gate[:, :, cut], initial_state=state, **settings, **now,
        )  # fmt: skip
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-10, atol=1e-10)
    assert state is not None
    assert last is not None
    assert state.linear_state is not None
    assert state.linear_state.shape == (B, len(HEADS), F, D)  # and no more: that is what it is for
    for one, other in zip(state.tensors(), last.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def written_out(
    mixing: str, q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, score: Tensor, sinks: int = 0
) -> Tensor:
    """One softmax over a window of 5, sinks, and linear attention: as a key (competing), or key by key."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (distance >= 0) & ((distance < 5) | (torch.arange(T) < sinks))
    k, v = k.repeat_interleave(H // N, 1), v.repeat_interleave(H // N, 1)
    scores = (q @ k.mT * D**-0.5).masked_fill(~seen, -torch.inf)
    out = scores.softmax(-1) @ v
    for head in HEADS:
        products = (phi_q[:, head] @ phi_k[:, head].mT).tril()
        linear = products @ v[:, head] / products.sum(-1, keepdim=True)
        if mixing == "calibrated":
            every = products.log() + score[:, head, :, None]
            joint = torch.cat([scores[:, head], every], -1).softmax(-1)
            out[:, head] = joint @ torch.cat([v[:, head]] * 2, -2)
            continue
        joint = torch.cat([scores[:, head], score[:, head, :, None]], -1).softmax(-1)
        out[:, head] = joint[..., :-1] @ v[:, head] + joint[..., -1:] * linear
    return out


@pytest.mark.parametrize("mixing", ["competing", "calibrated"])
class TestScoredRules:
    @pytest.mark.parametrize("sinks", [0, 3])
    @pytest.mark.parametrize("size", [1.0, 1000.0])  # exp of a score of 1,000 is infinite
    def test_is_one_softmax(self, sinks: int, size: float, mixing: str) -> None:
        q, k, v, phi_q, phi_k = drawn()
        score, index = size * normal(B, H, T, seed=6), list(HEADS)
        got, _ = subset_attention(
            q, k, v, phi_q[:, index], phi_k[:, index], heads=HEADS, window=5, mixing=mixing, gate=score,
            sinks=sinks,
        )  # fmt: skip
        expected = written_out(mixing, q, k, v, phi_q, phi_k, score, sinks)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

    def test_scores_are_not_bound_to_their_size(self, mixing: str) -> None:
        """Keys ten times as long make the window count more; their maximum alone would make no difference."""
        q, k, v, phi_q, phi_k = drawn()
        for factor in (1.0, 10.0):
            score = torch.full((B, H, T), 2.0, dtype=q.dtype)
            got, _ = subset_attention(
                q, factor * k, v, phi_q[:, HEADS], phi_k[:, HEADS], heads=HEADS, window=5,
                mixing=mixing, gate=score,
            )  # fmt: skip
            expected = written_out(mixing, q, factor * k, v, phi_q, phi_k, score)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

    def test_gradients(self, mixing: str) -> None:
        q, k, v, phi_q, phi_k = drawn()
        score, weights = normal(B, H, T, seed=6), normal(B, H, T, D, seed=9)
        tensors = (q, k, v, phi_q, phi_k, score)
        mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
        own, _ = subset_attention(
            *mine[:3],
            mine[3][:, HEADS],
            mine[4][:, HEADS],
            heads=HEADS,
            window=5,
            mixing=mixing,
            gate=mine[5],
        )
        (own * weights).sum().backward()
        (written_out(mixing, *theirs) * weights).sum().backward()
        for one, other in zip(mine, theirs, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10)

    def test_one_branch_alone(self, mixing: str) -> None:
        q, k, v, phi_q, phi_k = drawn()
        index, score = list(HEADS), normal(B, H, T, seed=6)
        for flags in (FLAGS["window"], FLAGS["linear"]):
            common: Any = {"heads": HEADS, "window": 5, "branches": flags}
            got, _ = subset_attention(
                q, k, v, phi_q[:, index], phi_k[:, index], mixing=mixing, gate=score, **common
            )
            convex, _ = subset_attention(q, k, v, phi_q[:, index], phi_k[:, index], gate=0.5, **common)
            torch.testing.assert_close(got, convex)


def test_gradients_reach_everything() -> None:
    q, k, v, phi_q, phi_k = drawn()
    index = list(HEADS)
    mine = [t.clone().requires_grad_() for t in (q, k, v, phi_q[:, index], phi_k[:, index])]
    theirs = [t.clone().requires_grad_() for t in (q, k, v, phi_q, phi_k)]
    weights = normal(B, H, T, D, seed=9)
    (subset_attention(*mine, heads=HEADS, window=5, gate=0.4)[0] * weights).sum().backward()
    near = window_attention(*theirs[:3], window=5)[0]
    both = hybrid_attention(*theirs, window=5, gate=0.4)[0]
    chosen = torch.tensor([head in HEADS for head in range(H)])[:, None, None]
    (torch.where(chosen, both, near) * weights).sum().backward()
    for position, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert one.grad is not None
        assert other.grad is not None
        wanted = other.grad[:, index] if position > 2 else other.grad
        torch.testing.assert_close(one.grad, wanted, rtol=1e-9, atol=1e-10)


def test_heads_read_their_own_group() -> None:
    q, k, v, *_ = drawn()
    chosen = heads_of(HEADS, q, k, v)
    assert torch.equal(chosen[0], q[:, 1:3])
    assert torch.equal(chosen[1], k[:, :2])  # head 1 reads key head 0, head 2 reads key head 1
    assert torch.equal(chosen[2], v[:, :2])
