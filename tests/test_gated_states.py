"""The tool behind docs/research/06-gated-states.md: parallel forms, bytes, what counts as recall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import F64, load_tool, normal

ROOT = Path(__file__).parents[1]
HEADS, DIM, BEHIND = 2, 6, 64
LENGTH = BEHIND + 20


@pytest.fixture(scope="module")
def tool() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))  # tools import each other as scripts do
        return load_tool("gated_states")


def state_of(tool: Any, arm: Any, size: int) -> Any:
    """With every parameter away from its start, decays such that half is forgotten in a few tokens."""
    state = tool.State(arm, size, HEADS, DIM, seed=0).double()
    for index, (name, part) in enumerate(state.named_parameters()):
        part.data += 0.3 * normal(*part.shape, seed=10 + index)
        if name == "decay_bias":
            part.data -= tool.OPEN - 1
    return state


def recurrence(state: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Token by token: what the query at position i reads of the state after token i - 64."""
    arm, keys, queries = state.arm, state.phi_k(k), state.phi_q(q)
    kept = torch.ones(1, HEADS, LENGTH, 1, dtype=F64) if arm.decay == "none" else state.log_decay(k).exp()
    sums, mass = (
        torch.zeros(HEADS, keys.shape[-1], DIM, dtype=F64),
        torch.zeros(HEADS, keys.shape[-1], dtype=F64),
    )
    outs = []
    for token in range(LENGTH - BEHIND):
        key, value, decay = keys[0, :, token], v[0, :, token], kept[0, :, token]
        sums, mass = sums * decay[..., None], mass * decay
        query = queries[0, :, token + BEHIND]
        if arm.start is None:
            sums, mass = sums + key[..., None] * value[:, None], mass + key
            outs.append(
                torch.einsum("hf,hfd->hd", query, sums)
                / (query * mass).sum(-1, keepdim=True).clamp_min(1e-12)
            )
        else:
            unit = key / key.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # products may all be 0
            said = torch.einsum("hf,hfd->hd", unit, sums)
            sums = sums + key[..., None] * (value - said)[:, None]
            outs.append(torch.einsum("hf,hfd->hd", query, sums))
    return torch.stack(outs, 1)[None]


@pytest.mark.parametrize("size", [1, 6])
def test_every_arm_is_its_recurrence(tool: Any, size: int) -> None:
    q, k, v = (normal(1, HEADS, LENGTH, DIM, seed=seed) for seed in range(3))
    names = set[str]()
    for arm in tool.EVERY_QUERY.arms(size):
        state = state_of(tool, arm, size)
        queries = torch.arange(BEHIND, LENGTH)
        with torch.no_grad():
            wanted = recurrence(state, q, k, v)
            for chosen in (queries, queries[[17, 3, 11]]):
                got = state(q, k, v, chosen)
                torch.testing.assert_close(got, wanted[:, :, chosen - BEHIND], msg=f"{arm.name}, F = {size}")
        names.add(arm.name)
    assert len(names) == (5 if size == 1 else len(tool.ARMS))


def test_decay_at_its_floor_stays_finite(tool: Any) -> None:
    """448 tokens that are forgotten at once: the range of float64 is enough, gradients included."""
    q, k, v = (normal(1, HEADS, tool.CONTEXT, DIM, seed=seed).float() for seed in range(3))
    for arm in tool.ARMS:
        if arm.decay != "none":
            state = tool.State(arm, 6, HEADS, DIM, seed=0)
            state.decay_bias.data.fill_(-20.0)
            read = state(q, k, v, tool.QUERIES)
            read.square().mean().backward()
            assert torch.isfinite(read).all()
            assert all(
                torch.isfinite(part.grad).all() for part in state.parameters() if part.grad is not None
            )


def test_starts_are_those_of_the_page(tool: Any) -> None:
    k = torch.zeros(1, HEADS, 3, DIM)
    for arm in tool.ARMS:
        state = tool.State(arm, 6, HEADS, DIM, seed=0)
        if arm.decay != "none":
            assert 750 < np.log(0.5) / state.log_decay(k)[0, 0, 0, 0].item() < 770
        if arm.start is not None:
            strength = torch.sigmoid(state.phi_k.write_bias)
            torch.testing.assert_close(
                strength, torch.full_like(strength, 0.018 if arm.start else 0.5), atol=1e-3, rtol=0
            )


def test_no_arm_has_more_bytes_than_the_additive_state(tool: Any) -> None:
    for size in tool.EVERY_QUERY.sizes:
        for arm in tool.EVERY_QUERY.arms(size):
            spare = size * 33 - arm.numbers(size, 32)
            assert 0 <= spare < 64, arm.name
    delta = next(arm for arm in tool.ARMS if arm.start is not None)
    assert [delta.features(size, 32) for size in (32, 64)] == [33, 66]


def test_heads_learn_apart(tool: Any) -> None:
    """The first head of two learns the same whatever the second one is."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "STEPS", 2)
        patch.setattr(tool, "EVERY", 1)
        for seed in (0, 50):
            qkv = normal(3, tool.TEXTS, HEADS, tool.CONTEXT, DIM, seed=1).float()
            qkv[:, :, 1] = normal(3, tool.TEXTS, tool.CONTEXT, DIM, seed=seed).float()
            arm = next(arm for arm in tool.ARMS if arm.name == "write gate, decay per token")
            state, chosen = tool.learned(arm, 6, tool.Data(qkv, [[]] * tool.TEXTS), 0)
            found.append([part[0].clone() for part in state.parameters()])
            assert chosen["rate"][0] == pytest.approx(tool.RATES[0]) or chosen["rate"][0] == pytest.approx(
                tool.RATES[1]
            )
            assert set(chosen["step"]) <= {1.0, 2.0}
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_questions_are_far_ones_and_what_answers_them(tool: Any) -> None:
    words = [90, 91, 92]
    row = np.zeros(300, dtype=np.int64)

    def put(place: int, key: int, value: int) -> None:
        row[place], row[place + 1] = key, value

    put(10, 50, 90)
    put(20, 51, 91)
    put(130, 52, 92)
    put(150, 50, 90)  # last shown at 11: a question
    put(180, 52, 92)  # shown 49 tokens before: the window's
    put(250, 50, 90)  # shown at 11 and 151
    put(299 - 1, 53, 91)  # never shown with this key
    found = tool.questions(row, words)
    assert [(question.at, question.back) for question in found] == [(150, 139), (250, 99)]
    assert found[0].shown.tolist() == [11, 21]
    assert found[0].right.tolist() == [True, False]
    assert found[1].shown.tolist() == [11, 21, 131, 151, 181]
    assert found[1].right.tolist() == [True, False, False, True, False]


def test_softmax_itself_is_judged_perfect(tool: Any) -> None:
    """With keys as values' own names and queries that ask for one of them."""
    qkv = normal(3, tool.TEXTS + 1, HEADS, tool.CONTEXT, DIM, seed=1).float()
    shown, at = torch.tensor([3, 40, 77]), 200
    qkv[1] /= qkv[1].norm(dim=-1, keepdim=True)
    qkv[0, -1, :, at] = 100 * qkv[1, -1, :, 40]
    question = tool.Question(at, 160, shown, torch.tensor([False, True, False]))
    data = tool.Data(qkv, [[]] * tool.TEXTS + [[question]])
    reads = data.targets[data.held_out]
    found = data.judged(reads)
    assert found["error"] == [0.0] * HEADS
    assert found["right"] == [1.0] * HEADS
    assert data.judged(2 * reads)["error"] == pytest.approx([1.0] * HEADS)
    for there in (data.near, data.far):  # 160 tokens back is neither
        assert there[-1, :, at - tool.FIRST].tolist() == [False] * HEADS


def test_the_page_has_the_tables(tool: Any) -> None:
    page = (ROOT / "docs" / "research" / "06-gated-states.md").read_text(encoding="utf-8")
    for name, plan in (("gated-states", tool.EVERY_QUERY), ("gated-states-asked", tool.ASKED)):
        rows = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        lines = tool.tables(tool.Results(rows), plan).splitlines()
        assert len(lines) > 9 * len(plan.sizes)
        for line in lines:
            assert line in page.splitlines()
