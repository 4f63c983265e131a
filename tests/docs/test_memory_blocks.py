"""The readers of tools/memory_blocks.py: bytes, and what they read."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from equipoise.ops import linear_attention
from support import F64, load_tool, normal

HEADS, LENGTH, DIM = 2, 16, 8


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("memory_blocks")


@pytest.fixture
def qkv() -> Any:
    return tuple(normal(1, HEADS, LENGTH, DIM, seed=s) for s in range(3))


SEEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def test_every_memory_fits_the_bytes_of_one_state(tool: ModuleType) -> None:
    for size in (64, 128):
        found = {memory.name: memory.numbers(32) for memory in tool.memories(size, 32)}
        assert found[f"F = {size}"] == size * 33
        assert max(found.values()) == size * 33
        blocks = [memory for memory in tool.memories(size, 32) if memory.blocks > 1 and memory.features]
        for memory in blocks:  # two more features a block would not fit
            assert memory.numbers(32) + memory.blocks * 2 * 33 > size * 33
    assert tool.Memory(4, 14).numbers(32) == 4 * (14 * 33 + 32)


def test_one_state_is_linear_attention(tool: ModuleType, qkv: Any) -> None:
    q, k, v = qkv
    reader = tool.Reader(tool.Memory(1, 6), HEADS, DIM, 0).double()
    expected, _ = linear_attention(q, k, v, reader.phi_q, reader.phi_k)
    torch.testing.assert_close(reader(q, k, v, SEEN), expected)


def test_blocks_by_hand(tool: ModuleType, qkv: Any) -> None:
    """Query 10 of 16 tokens in 4 blocks sees two whole ones and three tokens of the third."""
    q, k, v = qkv
    reader = tool.Reader(tool.Memory(4, 6), HEADS, DIM, 0).double()
    with torch.no_grad():
        reader.temperature.fill_(0.7)
    parts, scores = [], []
    for block in (slice(0, 4), slice(4, 8), slice(8, 11)):
        weights = reader.phi_q(q)[0, 1, 10] @ reader.phi_k(k)[0, 1, block].T
        parts.append(weights / weights.sum() @ v[0, 1, block])
        count = block.stop - block.start
        score = 0.7 * q[0, 1, 10] @ k[0, 1, block].mean(0) / DIM**0.5
        scores.append(score + torch.tensor(count, dtype=F64).log())
    expected = torch.stack(scores).softmax(0) @ torch.stack(parts)
    torch.testing.assert_close(reader(q, k, v, SEEN)[0, 1, 10], expected)


def test_the_oracle_with_blocks_of_one_token_is_softmax(tool: ModuleType, qkv: Any) -> None:
    q, k, v = qkv
    weights = tool.softmax_of_the_past(q, k, SEEN)
    for features in (0, 6):
        reader = tool.Reader(tool.Memory(LENGTH, features), HEADS, DIM, 0).double()
        torch.testing.assert_close(reader(q, k, v, SEEN, shares=weights), weights @ v)


def test_the_page_has_the_results() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "research" / "04-memory-blocks.md").read_text(encoding="utf-8")
    rows = json.loads((docs / "results" / "memory-blocks.json").read_text(encoding="utf-8"))
    kinds = {(row["size"], row["memory"], row["numbers"]) for row in rows}
    assert len(rows) == 3 * len(kinds) == 39
    for size, name, numbers in kinds:
        errors = [sum(row["error"]) / 16 for row in rows if (row["size"], row["memory"]) == (size, name)]
        name = name if not name.startswith("F") else f"one state, {name}"
        assert f"| {name} | {numbers:,} | {sum(errors) / 3:.3f} [" in page
