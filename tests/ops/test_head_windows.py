"""A window for each key/value head: against one call for each head with its own window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import AttentionState, Branches, hybrid_attention, native_step, window_attention
from equipoise.ops.head_windows import head_windows_attention, window_groups
from support import normal, padding_mask, segments_of

B, H, N, T, D, F = 2, 6, 3, 37, 8, 12
WINDOWS = (3, 9, 3)
HEADS = (1, 2, 5)
"""One in each of the three key/value heads, so that both window groups have some."""


def drawn() -> tuple[Tensor, ...]:
    """q, k, v, and features of all query heads."""
    q, k, v = (normal(B, heads, T, D, seed=seed) for seed, heads in enumerate((H, N, N)))
    return q, k, v, *(normal(B, H, T, F, seed=seed).exp() for seed in (3, 4))


def expected(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, *, heads: tuple[int, ...], **more: Any
) -> Tensor:
    """Head by head: the hybrid with the head's window in those that have a linear branch, else the window."""
    out = torch.empty(B, H, T, D, dtype=q.dtype)
    logits = more.pop("sink_logits", None)
    plain = {name: value for name, value in more.items() if name not in ("gate", "branches", "mixing")}
    for head in range(H):
        window = WINDOWS[head // (H // N)]
        if head in heads:
            whole, _ = hybrid_attention(q, k, v, phi_q, phi_k, window=window, sink_logits=logits, **more)
        else:
            whole, _ = window_attention(q, k, v, window=window, sink_logits=logits, **plain)
        out[:, head] = whole[:, head]
    return out


SETTINGS = {
    "plain": {},
    "left": {"key_mask": padding_mask("left", T)},
    "packed": {"segment_ids": segments_of(T)},
    "sinks": {"sinks": 2},
    "sink logits": {"sink_logits": normal(H, seed=8)},
    "gates": {"gate": normal(B, H, T, seed=6).sigmoid()},
    "competing": {"gate": normal(B, H, T, seed=6), "mixing": "competing", "sinks": 2},
    "calibrated": {"gate": normal(B, H, T, seed=6), "mixing": "calibrated", "sinks": 2},
    "window": {"branches": Branches(linear=False, reading="renormalised")},
    "by head": {
        "branches": Branches(window=torch.tensor([[True, False] * 3] * B), reading="renormalised"),
        "gate": normal(H, 1, seed=5).sigmoid(),
    },
}


@pytest.mark.parametrize("heads", [(), (2, 3), HEADS], ids=["windows", "one group", "both groups"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_each_head_by_itself(setting: str, heads: tuple[int, ...]) -> None:
    q, k, v, phi_q, phi_k = drawn()
    more: dict[str, Any] = {"gate": 0.3, **SETTINGS[setting]}
    got, _ = head_windows_attention(
        q, k, v, phi_q[:, heads] if heads else None, phi_k[:, heads] if heads else None, windows=WINDOWS,
        heads=heads, **more,
    )  # fmt: skip
    wanted = expected(q, k, v, phi_q, phi_k, heads=heads, **more)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixing", ["convex", "competing", "calibrated"])
@pytest.mark.parametrize("heads", [(2, 3), HEADS], ids=["one group", "both groups"])
def test_maps_are_as_good_as_features(heads: tuple[int, ...], mixing: str) -> None:
    q, k, v, *_ = drawn()
    weight = normal(len(heads), D, F, seed=7)

    def phi(x: Tensor) -> Tensor:
        return (x @ weight.to(x.dtype)).softmax(-1)

    keys = k.repeat_interleave(H // N, 1)[:, heads]
    common: dict[str, Any] = {"windows": WINDOWS, "heads": heads, "mixing": mixing, "sinks": 1}
    by_map, _ = head_windows_attention(q, k, v, phi, phi, **common)
    by_features, _ = head_windows_attention(q, k, v, phi(q[:, heads]), phi(keys), **common)
    torch.testing.assert_close(by_map, by_features, rtol=1e-10, atol=1e-12)


def read(q: Tensor, k: Tensor, v: Tensor, phi: Any, cuts: tuple[int, ...], **more: Any) -> Tensor:
    outs, state = list[Tensor](), None
    for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
        part = slice(start, stop)
        masks = {name: more[name][:, part] for name in ("key_mask", "segment_ids") if name in more}
        out, state = head_windows_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], phi, phi, windows=WINDOWS, heads=HEADS,
            initial_state=state, output_final_state=True, **{**more, **masks},
        )  # fmt: skip
        outs.append(out)
    return torch.cat(outs, 2)


@pytest.mark.parametrize("mixing", ["convex", "competing", "calibrated"])
@pytest.mark.parametrize("setting", ["plain", "left", "packed", "sinks"])
def test_split_anywhere(setting: str, mixing: str) -> None:
    q, k, v, *_ = drawn()
    weight = normal(len(HEADS), D, F, seed=7)
    more = {**SETTINGS[setting], "mixing": mixing}
    whole = read(q, k, v, lambda x: (x @ weight).exp(), (), **more)
    parts = read(q, k, v, lambda x: (x @ weight).exp(), (5, 6, 7, 30), **more)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-10)


def state_after(rows: int = B) -> AttentionState:
    q, k, v, phi_q, phi_k = (t[:rows] for t in drawn())
    _, state = head_windows_attention(
        q, k, v, phi_q[:, HEADS], phi_k[:, HEADS], windows=WINDOWS, heads=HEADS, sinks=2,
        output_final_state=True,
    )  # fmt: skip
    assert state is not None
    return state


class TestState:
    def test_heads_keep_what_their_windows_need(self) -> None:
        state = state_after()
        (other,) = state.others
        assert state.keys.shape == (B, 1, 8, D)  # the longest first: one head of window 9
        assert other.keys.shape == (B, 2, 2, D)
        assert state.linear_state is not None
        assert other.linear_state is not None
        assert (state.linear_state.shape[1], other.linear_state.shape[1]) == (1, 2)
        assert state.bytes() == sum(t.numel() * t.element_size() for t in state.tensors())

    def test_rows_come_and_go(self) -> None:
        state = state_after()
        twice = AttentionState.concatenate([state, state.map(lambda t: t[:1])])
        assert len(twice.valid) == B + 1
        for mine, theirs in zip(twice.tensors(), state.settled().tensors(), strict=True):
            assert torch.equal(mine[:B], theirs)
            assert torch.equal(mine[B:], theirs[:1])

    def test_of_other_windows(self) -> None:
        q, k, v, phi_q, phi_k = (t[:, :, :4] for t in drawn())
        chosen = phi_q[:, HEADS], phi_k[:, HEADS]
        common: dict[str, Any] = {"heads": HEADS, "sinks": 2, "initial_state": state_after()}
        with pytest.raises(ValueError, match="with 3 different windows, got one of 2"):
            head_windows_attention(q, k, v, *chosen, windows=(3, 9, 4), **common)
        with pytest.raises(ValueError, match="holding 4 tokens, got one of 2"):
            head_windows_attention(q, k, v, *chosen, windows=(5, 9, 5), **common)
        with pytest.raises(ValueError, match="got one of windows by head"):
            hybrid_attention(q, k, v, phi_q, phi_k, window=9, sinks=2, initial_state=state_after())
        plain = hybrid_attention(q, k, v, phi_q, phi_k, window=9, output_final_state=True)[1]
        assert plain is not None
        with pytest.raises(ValueError, match="fewer sizes"):
            AttentionState.concatenate([state_after(), plain])


@pytest.mark.parametrize(("mixing", "update"), [
    ("convex", "additive"), ("calibrated", "additive"), ("convex", "delta"), ("competing", "delta"),
])  # fmt: skip
def test_a_state_that_is_given_away_changes_nothing_else(
    mixing: str, update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding token by token, the compiled step in place where it was built: outputs, and the last state."""
    used: list[bool] = []
    run = native_step.run
    monkeypatch.setattr(native_step, "run", lambda call: (used.append(True), run(call))[1])
    q, k, v, *phi = (tensor.float() for tensor in drawn())
    phi_q, phi_k = phi[0] / 9, phi[1] / 9  # short enough for the delta rule
    gate = normal(B, H, T, seed=6).float()
    gate = gate.sigmoid() if mixing == "convex" else gate
    every = tuple(range(H))
    found: list[list[Tensor]] = []
    for reuse in (False, True):
        outs, state = [], None
        with torch.no_grad():
            for start, stop in [(0, 20), *((i, i + 1) for i in range(20, T))]:
                out, state = head_windows_attention(
                    *(x[:, :, start:stop].clone() for x in (q, k, v, phi_q, phi_k)), windows=WINDOWS,
                    heads=every, gate=gate[..., start:stop], mixing=mixing, update=update, sinks=2,
                    initial_state=state, output_final_state=True, reuse_state=reuse,
                )  # fmt: skip
                outs.append(out)
        assert state is not None
        if native_step.NATIVE is not None:  # competing reads the state once more after the windows
            assert bool(used) is (reuse and mixing != "competing")
        found.append([torch.cat(outs, 2), *(tensor.float() for tensor in state.tensors())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_gradients() -> None:
    q, k, v, phi_q, phi_k = drawn()
    gate, weights = normal(B, H, T, seed=6).sigmoid(), normal(B, H, T, D, seed=9)
    mine, theirs = ([t.clone().requires_grad_() for t in (q, k, v, phi_q, phi_k, gate)] for _ in range(2))
    got, _ = head_windows_attention(
        *mine[:3], mine[3][:, HEADS], mine[4][:, HEADS], windows=WINDOWS, heads=HEADS, gate=mine[5], sinks=1
    )
    (got * weights).sum().backward()
    (expected(*theirs[:5], heads=HEADS, gate=theirs[5], sinks=1) * weights).sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10)


def test_groups() -> None:
    assert window_groups((3, 9, 3)) == [(9, [1]), (3, [0, 2])]


def test_a_window_for_each_head() -> None:
    q, k, v, *_ = drawn()
    with pytest.raises(ValueError, match=r"each of 3 key/value heads, got \[3, 9\]"):
        head_windows_attention(q, k, v, None, None, windows=(3, 9))
