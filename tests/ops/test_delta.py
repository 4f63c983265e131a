"""The delta rule in chunks: against the recurrence token by token in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import AttentionState, Branches, hybrid_attention, window_attention
from equipoise.ops.checks import check_delta
from equipoise.ops.delta import delta_attention
from equipoise.ops.head_subset import subset_attention
from equipoise.ops.head_windows import head_windows_attention
from equipoise.ops.reference import delta_rule, visible_keys
from support import masks_by_name, normal, padding_mask, segments_of

B, H, T, D, F, E = 2, 3, 37, 8, 6, 5


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, phi(q), phi(k); keys of lengths between 0 and 1."""
    q, k, v = (normal(B, H, T, size, seed=seed) for seed, size in enumerate((D, D, E)))
    phi_q, phi_k = (normal(B, H, T, F, seed=seed) for seed in (3, 4))
    phi_k = phi_k / phi_k.norm(dim=-1, keepdim=True) * normal(B, H, T, 1, seed=5).sigmoid()
    return tuple(x.to(dtype) for x in (q, k, v, phi_q, phi_k))


MASKS: dict[str, dict[str, Any]] = {**masks_by_name(T)}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_equals_the_recurrence(masked: str, chunk: int) -> None:
    q, k, v, phi_q, phi_k = drawn()
    got, state = delta_attention(
        q, k, v, phi_q, phi_k, chunk_size=chunk, output_final_state=True, **MASKS[masked]
    )
    expected, sums = delta_rule(phi_q, phi_k, v, **MASKS[masked])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    assert state is not None
    assert state.linear_state is not None
    torch.testing.assert_close(state.linear_state, sums, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("masked", MASKS)
def test_query_heads_that_share_a_state(masked: str) -> None:
    """As if every query head had keys, values and a state of its own; gradients and resumed calls too."""
    _, k, v, _, phi_k = drawn()
    q, phi_q = (torch.cat([x, 2 * x.flip(1)], 1) for x in (drawn()[0], drawn()[3]))
    leaves = [x.clone().requires_grad_() for x in (v, phi_q, phi_k)]
    own_k, own_v, own_phi_k = (x.repeat_interleave(2, 1) for x in (k, leaves[0], leaves[2]))
    expected, states = delta_attention(
        q, own_k, own_v, leaves[1], own_phi_k, chunk_size=8, output_final_state=True, **MASKS[masked]
    )
    weights = torch.rand(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    got, state = delta_attention(q, k, *leaves, chunk_size=16, output_final_state=True, **MASKS[masked])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    for ours, theirs in zip(torch.autograd.grad((got * weights).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert state is not None
    assert states is not None
    assert state.linear_state is not None
    assert states.linear_state is not None
    torch.testing.assert_close(state.linear_state, states.linear_state[:, ::2], rtol=1e-10, atol=1e-11)
    halves = [
        {name: mask[:, part] for name, mask in MASKS[masked].items()}
        for part in (slice(0, 20), slice(20, None))
    ]
    with torch.no_grad():
        first, kept = delta_attention(
            *(x[:, :, :20] for x in (q, k, v, phi_q, phi_k)), output_final_state=True, **halves[0]
        )
        second, _ = delta_attention(
            *(x[:, :, 20:] for x in (q, k, v, phi_q, phi_k)), initial_state=kept, **halves[1]
        )
    torch.testing.assert_close(torch.cat([first, second], 2), expected.detach(), rtol=1e-10, atol=1e-11)


def test_float32() -> None:
    q, k, v, phi_q, phi_k = drawn()
    expected, _ = delta_rule(phi_q, phi_k, v)
    got, _ = delta_attention(*(x.float() for x in (q, k, v, phi_q, phi_k)))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=5e-4, atol=5e-5)


def test_bfloat16_sums_in_float32() -> None:
    q, k, v, phi_q, phi_k = drawn(torch.bfloat16)
    got, state = delta_attention(q, k, v, phi_q, phi_k, output_final_state=True)
    assert got.dtype == torch.bfloat16
    assert state is not None
    assert state.linear_state is not None
    assert state.linear_state.dtype == torch.float32
    expected, _ = delta_rule(phi_q, phi_k, v)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("masked", MASKS)
def test_split_anywhere(masked: str) -> None:
    q, k, v, phi_q, phi_k = drawn()
    whole, last = delta_attention(q, k, v, phi_q, phi_k, output_final_state=True, **MASKS[masked])
    outs, state = list[Tensor](), None
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 30), (30, T)):
        part = slice(start, stop)
        masks = {name: mask[:, part] for name, mask in MASKS[masked].items()}
        tensors = (x[:, :, part] for x in (q, k, v, phi_q, phi_k))
        out, state = delta_attention(*tensors, initial_state=state, output_final_state=True, **masks)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-10, atol=1e-11)
    assert state is not None
    assert last is not None
    torch.testing.assert_close(state.linear_state, last.linear_state, rtol=1e-10, atol=1e-11)
    assert torch.equal(state.folded, last.folded)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("masked", ["plain", "both"])
def test_gradients(masked: str) -> None:
    q, k, v, phi_q, phi_k = drawn()
    weights = normal(B, H, T, E, seed=9)
    mine, theirs = ([x.clone().requires_grad_() for x in (phi_q, phi_k, v)] for _ in range(2))
    out, _ = delta_attention(q, k, mine[2], mine[0], mine[1], chunk_size=16, **MASKS[masked])
    (out * weights).sum().backward()
    expected, _ = delta_rule(*theirs, **MASKS[masked])
    (expected * weights).sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-9)


def test_a_key_that_comes_again_has_its_last_value() -> None:
    """What additive attention cannot do: the old value is gone."""
    unit = torch.eye(F, dtype=torch.float64)[None, None, [0, 1, 0, 0]]
    values = normal(1, 1, 4, E, seed=1)
    out, _ = delta_attention(unit, unit, values, unit, unit)
    torch.testing.assert_close(out, values)


def test_as_many_keys_as_features_are_held_exactly() -> None:
    keys = torch.linalg.qr(normal(F, F, seed=2))[0][None, None]
    values = normal(1, 1, F, E, seed=3)
    _, state = delta_attention(keys, keys, values, keys, keys, output_final_state=True)
    assert state is not None
    assert state.linear_state is not None
    torch.testing.assert_close(keys @ state.linear_state, values)


def test_what_padding_holds_does_not_matter() -> None:
    q, k, v, phi_q, phi_k = drawn()
    mask = padding_mask("left", T)
    clean, _ = delta_attention(q, k, v, phi_q, phi_k, key_mask=mask)
    hidden = ~mask[:, None, :, None]
    dirty, _ = delta_attention(
        q, k, v.masked_fill(hidden, torch.nan), phi_q, phi_k.masked_fill(hidden, torch.inf), key_mask=mask
    )
    assert torch.equal(clean, dirty)


def test_padding_belongs_to_no_segment() -> None:
    """Whatever id it has, and wherever a call ends, what stood before it goes on behind it."""
    q, k, v, phi_q, phi_k = drawn()
    segments, mask = segments_of(T).clone(), torch.ones(B, T, dtype=torch.bool)
    mask[:, 14:18] = False
    segments[:, 14:18] = 99
    segments[:, 18:20] = segments[:, 13:14]
    expected, _ = delta_rule(phi_q, phi_k, v, key_mask=mask, segment_ids=segments)
    for chunk in (4, 16, 64):
        got, _ = delta_attention(q, k, v, phi_q, phi_k, key_mask=mask, segment_ids=segments, chunk_size=chunk)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_arguments_that_do_not_fit() -> None:
    q, k, v, phi_q, phi_k = drawn()
    with pytest.raises(ValueError, match="k and v of the same heads"):
        check_delta(q, k, v[:, :1], None, None, None)
    with pytest.raises(ValueError, match=r"key_mask of shape \[2, 37\], got \[2, 3\]"):
        check_delta(q, k, v, torch.ones(B, 3, dtype=torch.bool), None, None)
    _, additive = hybrid_attention(q, k, v, phi_q.exp(), phi_k.exp(), window=None, output_final_state=True)
    with pytest.raises(ValueError, match="no normaliser"):
        delta_attention(q, k, v, phi_q, phi_k, initial_state=additive)
    _, state = delta_attention(q, k, v, phi_q, phi_k, output_final_state=True)
    assert state is not None
    with pytest.raises(ValueError, match=r"\[1, 3\] rows and heads, got \[2, 3\]"):
        delta_attention(*(x[:1] for x in (q, k, v, phi_q, phi_k)), initial_state=state)
    with pytest.raises(ValueError, match="every part of a split sequence or in none"):
        delta_attention(q, k, v, phi_q, phi_k, initial_state=state, segment_ids=segments_of(T))


class TestInSingleHeads:
    """Beside windows, mixed with a gate."""

    HEADS = (1, 2)

    def drawn(self) -> tuple[Tensor, ...]:
        q, k, v = (normal(B, heads, T, D, seed=seed) for seed, heads in enumerate((4, 2, 2)))
        phi_q, phi_k = (normal(B, 2, T, F, seed=seed) for seed in (3, 4))
        return q, k, v, phi_q, phi_k / phi_k.norm(dim=-1, keepdim=True)

    @pytest.mark.parametrize("flags", [Branches(), Branches(window=False, reading="renormalised")])
    @pytest.mark.parametrize("windows", [(5, 5), (5, 3)])
    def test_is_a_mean_of_both(self, flags: Branches, windows: tuple[int, int]) -> None:
        q, k, v, phi_q, phi_k = self.drawn()
        common: dict[str, Any] = {"heads": self.HEADS, "update": "delta", "gate": 0.3, "branches": flags}
        if windows[0] == windows[1]:
            got, _ = subset_attention(q, k, v, phi_q, phi_k, window=5, **common)
        else:
            got, _ = head_windows_attention(q, k, v, phi_q, phi_k, windows=windows, **common)
        expected = torch.cat(
            [
                window_attention(q, k, v, window=w)[0][:, part]
                for w, part in zip(windows, (slice(2), slice(2, 4)), strict=True)
            ],
            1,
        )
        far, _ = delta_rule(phi_q, phi_k, v.repeat_interleave(2, 1)[:, self.HEADS])
        gate = 0.3 if flags.window is True else 0.0
        expected[:, self.HEADS] = gate * expected[:, self.HEADS] + (1 - gate) * far
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("windows", [(5, 5), (5, 3)])
    @pytest.mark.parametrize("masked", ["plain", "left", "packed"])
    def test_narrow_values(self, windows: tuple[int, int], masked: str) -> None:
        """As the recurrence of projected values, projected back; gradients and resumed calls too."""
        tensors, more = self.drawn(), MASKS[masked]
        maps = normal(2, D, 3, seed=7), normal(2, 3, D, seed=8)
        leaves = [x.clone().requires_grad_() for x in (*tensors, *maps)]

        def run(part: slice, state: AttentionState | None = None) -> tuple[Tensor, AttentionState | None]:
            parts = [x[:, :, part] for x in leaves[:5]]
            return head_windows_attention(
                *parts, windows=windows, heads=self.HEADS, update="delta", gate=0.3,
                value_maps=(leaves[5], leaves[6]), initial_state=state, output_final_state=True,
                **{name: mask[:, part] for name, mask in more.items()},
            )  # fmt: skip

        got, _ = run(slice(None))
        q, k, v, phi_q, phi_k, down, up = leaves
        near = [window_attention(q, k, v, window=w, **more)[0] for w in windows]
        chosen = v.repeat_interleave(2, 1)[:, self.HEADS]
        far = delta_rule(phi_q, phi_k, chosen @ down, **more)[0] @ up
        expected = torch.cat([near[0][:, :2], near[1][:, 2:]], 1)
        mixed = 0.3 * expected[:, self.HEADS] + 0.7 * far
        expected = expected.index_copy(1, torch.tensor(self.HEADS), mixed)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        weights = normal(*got.shape, seed=9)
        ours, theirs = (torch.autograd.grad((of * weights).sum(), leaves) for of in (got, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
        first, kept = run(slice(0, 20))
        assert kept is not None
        second, _ = run(slice(20, None), kept)
        torch.testing.assert_close(torch.cat([first, second], 2), got, rtol=1e-9, atol=1e-10)

    def test_narrow_values_need_the_delta_rule(self) -> None:
        q, k, v, phi_q, phi_k = self.drawn()
        maps = normal(2, D, 3), normal(2, 3, D)
        with pytest.raises(ValueError, match="update delta alone, got update additive"):
            subset_attention(q, k, v, phi_q, phi_k, heads=self.HEADS, window=5, value_maps=maps)

    def test_a_state_of_values_of_another_size(self) -> None:
        q, k, v, phi_q, phi_k = drawn()
        _, state = delta_attention(q, k, v, phi_q, phi_k, output_final_state=True)
        with pytest.raises(ValueError, match="values of 3 numbers, got 5"):
            delta_attention(q, k, v[..., :3], phi_q, phi_k, initial_state=state)

    @pytest.mark.parametrize("size", [1.0, 1000.0])
    @pytest.mark.parametrize("masked", ["plain", "sinks", "packed", "left", "sink logits"])
    def test_competing_is_one_key_of_the_windows_softmax(self, masked: str, size: float) -> None:
        q, k, v, phi_q, phi_k = self.drawn()
        more: dict[str, Any] = {**MASKS, "sinks": {"sinks": 3}, "sink logits": {"sink_logits": normal(4)}}[
            masked
        ]
        score = size * normal(B, 4, T, seed=6)
        common: dict[str, Any] = {"heads": self.HEADS, "update": "delta", "mixing": "competing", **more}
        got, _ = subset_attention(q, k, v, phi_q, phi_k, window=5, gate=score, **common)
        masks = {name: more[name] for name in ("key_mask", "segment_ids") if name in more}
        far, _ = delta_rule(phi_q, phi_k, v.repeat_interleave(2, 1)[:, self.HEADS], **masks)
        near, _ = window_attention(q, k, v, window=5, **more)
        expected = near.clone()
        real = more.get("key_mask", torch.ones(B, T, dtype=torch.bool))
        segments = more.get("segment_ids", torch.zeros(B, T, dtype=torch.int64))
        for row in range(B):
            _, seen = visible_keys(
                T, window=5, layout="sliding", sinks=more.get("sinks", 0), valid=real[row].tolist(),
                segments=segments[row].tolist(),
            )  # fmt: skip
            for place, head in enumerate(self.HEADS):
                scores = (q[row, head] @ k[row, head // 2].mT * D**-0.5).masked_fill(~seen, -torch.inf)
                mass = scores.logsumexp(-1)
                if "sink_logits" in more:
                    mass = mass.logaddexp(more["sink_logits"][head])
                share = (mass - score[row, head]).sigmoid()[:, None]
                mixed = share * near[row, head] + (1 - share) * far[row, place]
                expected[row, head] = torch.where(real[row, :, None], mixed, 0.0)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("masked", ["plain", "packed", "left", "sinks"])
    def test_competing_split_anywhere(self, masked: str) -> None:
        q, k, v, phi_q, phi_k = self.drawn()
        more: dict[str, Any] = {**MASKS, "sinks": {"sinks": 3}}[masked]
        score = normal(B, 4, T, seed=6)

        def read(*cuts: int) -> Tensor:
            outs, state = list[Tensor](), None
            for start, stop in pairwise((0, *cuts, T)):
                part = slice(start, stop)
                own = {n: x[:, part] if isinstance(x, Tensor) else x for n, x in more.items()}
                out, state = head_windows_attention(
                    q[:, :, part], k[:, :, part], v[:, :, part], phi_q[:, :, part], phi_k[:, :, part],
                    windows=(5, 3), heads=self.HEADS,
                    update="delta", mixing="competing", gate=score[:, :, part], initial_state=state,
                    output_final_state=True, **own,
                )  # fmt: skip
                outs.append(out)
            return torch.cat(outs, 2)

        torch.testing.assert_close(read(4, 5, 6, 30), read(), rtol=1e-9, atol=1e-10)

    def test_competing_in_all_heads(self) -> None:
        q, k, v, *_ = self.drawn()
        phi_q, phi_k = (normal(B, 4, T, F, seed=seed) for seed in (3, 4))
        phi_k = phi_k / phi_k.norm(dim=-1, keepdim=True)
        common: dict[str, Any] = {"window": 5, "update": "delta", "mixing": "competing"}
        common["gate"] = normal(B, 4, T, seed=6)
        whole, _ = subset_attention(q, k, v, phi_q, phi_k, heads=range(4), **common)
        for head in range(4):
            only = phi_q[:, [head]], phi_k[:, [head]]
            alone, _ = subset_attention(q, k, v, *only, heads=[head], **common)
            torch.testing.assert_close(whole[:, head], alone[:, head])

    def test_competing_gradients(self) -> None:
        tensors = [x.clone().requires_grad_() for x in (*self.drawn(), normal(B, 4, T, seed=6))]

        def run(*of: Tensor) -> Tensor:
            return subset_attention(
                *of[:5], heads=self.HEADS, window=5, update="delta", mixing="competing", gate=of[5]
            )[0]

        assert torch.autograd.gradcheck(run, tensors, fast_mode=True)

    def test_states_of_rows(self) -> None:
        q, k, v, phi_q, phi_k = self.drawn()
        _, state = head_windows_attention(
            q, k, v, phi_q, phi_k, windows=(5, 3), heads=self.HEADS, update="delta", output_final_state=True
        )
        assert state is not None
        assert all(part.linear_normalizer is None for part in (state, *state.others))
        twice = AttentionState.concatenate([state, state])
        assert len(twice.valid) == 2 * B
