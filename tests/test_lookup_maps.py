"""The tool that asks a state for pairs alone: it reads before it writes, and counts what it should."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from test_frontier import tool


@pytest.fixture(scope="module")
def lookups() -> ModuleType:
    return tool("lookup_maps")


def pairs_of(lookups: Any) -> Any:
    """Keys 0, 1, 0, 1 with words 5, 6, 5, 6, each key its own direction; the second text ends after three."""
    directions = torch.eye(8)
    keys = directions[[0, 1, 0, 1]].expand(2, 4, 8)
    values = directions[[4, 5, 4, 5]].expand(2, 4, 8)
    word = torch.tensor([[5, 6, 5, 6], [5, 6, 5, -1]])
    again = torch.tensor([[False, False, True, True], [False, False, True, False]])
    return lookups.Pairs(keys, keys, values, word, again, torch.tensor([[0, 0, 0, 1]] * 2))


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_it_is_asked_before_it_is_told(lookups: Any) -> None:
    state, pairs = lookups.State(lookups.Arm("unit", 8), 8, 0), pairs_of(lookups)
    state.phi_q = state.phi_k = Same()
    state.strength.data.fill_(50.0)  # written whole
    read = state(pairs)
    assert read.shape == (2, 4, 8)
    torch.testing.assert_close(read[:, :2], torch.zeros(2, 2, 8))
    torch.testing.assert_close(read[0, 2:], pairs.v[0, 2:])
    assert lookups.right(read, pairs) == 1.0
    assert lookups.right(read.flip(-1).roll(-2, -1), pairs) < 1.0


def test_softmax_reads_earlier_pairs_only(lookups: Any) -> None:
    pairs = pairs_of(lookups)
    sharp = lookups.Pairs(100 * pairs.q, pairs.k, pairs.v, pairs.word, pairs.again, pairs.last)
    read = lookups.softmax_read(sharp)
    torch.testing.assert_close(read[:, 0], torch.zeros(2, 8))
    assert lookups.right(read, sharp) == 1.0


def test_training_learns_to_tell_keys_apart(lookups: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(6, 8, generator=generator) for _ in range(2))
    order = torch.stack([torch.randperm(6, generator=generator).repeat(2) for _ in range(16)])
    again = torch.arange(12).expand(16, 12) >= 6
    last = (torch.arange(12) - 6).clamp(min=0).expand(16, 12)
    pairs = lookups.Pairs(keys[order], keys[order], values[order], order, again, last)
    arm = lookups.Arm("dpfp", 16, texts=8, steps=60)
    before = lookups.right(lookups.State(arm, 8, 0)(pairs), pairs)
    state = lookups.train(arm, pairs, 0)
    with torch.no_grad():
        assert lookups.right(state(pairs), pairs) > max(before, 0.9)
