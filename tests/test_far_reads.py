"""The tool that trains one state on whole texts: what it counts, and that it learns where weights are."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from test_frontier import tool

WORDS = (7, 8)
ROW = [1, 7, 2, 8, 0, 0, 1, 7, 2, 8]
"""Key 1 has value 7, key 2 has 8; both are asked again six tokens later."""


@pytest.fixture(scope="module")
def far() -> ModuleType:
    return tool("far_reads")


def seen(far: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    q, k, v, output = (torch.randn(1, len(ROW), 8, generator=generator) for _ in range(4))
    lost = torch.full((1, len(ROW)), 0.5)
    lost[0, [6, 8]] = 4.0
    return far.Seen(np.array([ROW]), q, k, v, output, lost)


def test_answers_are_counted_beyond_the_limit(far: Any) -> None:
    of = seen(far)

    def reading(values: list[int]) -> Any:
        """A state that reads the values of such places before each answer."""
        reads = torch.zeros(1, len(ROW), 8)
        reads[0, [6, 8]] = of.v[0, values] * 3
        return lambda q, k, v: reads

    assert far.right(reading([1, 3]), of, WORDS, 2) == 1.0
    assert far.right(reading([3, 3]), of, WORDS, 2) == 0.5
    assert np.isnan(far.right(reading([1, 3]), of, WORDS, 6))  # none lies further back


def test_lookups_have_more_weight_with_every_power(far: Any) -> None:
    of = seen(far)
    assert far.share_of_lookups(of, WORDS, 2, 1) == pytest.approx(8 / 12)
    assert far.share_of_lookups(of, WORDS, 2, 2) == pytest.approx(32 / 34)
    assert far.share_of_lookups(of, WORDS, 6, 2) == 0


@pytest.mark.parametrize("feature_map", ["dpfp", "trilinear"])
def test_training_reads_what_has_weight(far: Any, feature_map: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are asked again behind noise that nobody asks for, and only then there is weight."""
    generator = torch.Generator().manual_seed(1)
    pairs, count = 4, 32
    keys = torch.randn(count, pairs, 8, generator=generator)
    noise = torch.randn(count, pairs, 8, generator=generator)
    values = torch.randn(count, 3 * pairs, 8, generator=generator)
    k, q = (torch.cat([keys, noise, end], 1) for end in (noise, keys))
    output = torch.cat([torch.zeros(count, 2 * pairs, 8), values[:, :pairs]], 1)
    lost = torch.cat([torch.full((count, 2 * pairs), 0.01), torch.ones(count, pairs)], 1)
    of = far.Seen(np.zeros((count, 3 * pairs)), q, k, values, output, lost)
    monkeypatch.setattr(far, "STEPS", 120)
    monkeypatch.setattr(far, "ROWS", 16)
    arm = far.Arm(feature_map, 16)
    torch.manual_seed(0)

    def error(state: Any, part: slice) -> float:
        with torch.no_grad():
            return (state(of.q, of.k, of.v) - output)[:, part].square().mean().item()

    asked = slice(2 * pairs, None)
    untrained, trained = far.State(arm, 8, 0), far.train(arm, of, 0)
    assert error(trained, asked) < 0.6 * error(untrained, asked)
