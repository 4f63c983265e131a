"""The tool behind decision 30: what it pays for states, and that its attention is the library's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from equipoise.ops import hybrid_attention
from support import load_tool, normal

TOOLS = Path(__file__).parents[1] / "tools"
WINDOWS = [[36, 48, 32, 36], [8, 2, 8, 16], [12, 24, 4, 20], [24, 8, 180, 54]]


@pytest.fixture(scope="module")
def tool() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))  # tools import each other as scripts do
        return load_tool("small_states")


@pytest.mark.parametrize("features", [0, 1, 2, 4, 8])
def test_states_are_paid_for_by_windows(tool: Any, features: int) -> None:
    cut = tool.cut_back(WINDOWS, features)
    budget, state = 2 * 32 * 2 * sum(map(sum, WINDOWS)), 16 * features * 33 * 4
    spent = 2 * 32 * 2 * sum(map(sum, cut)) + state
    assert budget - 128 < spent <= budget
    assert min(map(min, cut)) >= 2
    assert (cut == WINDOWS) == (features == 0)


def test_one_feature_is_what_the_library_computes(tool: Any) -> None:
    """Constant features with a write gate, mixed by `calibrated`, over all keys."""
    states = tool.States(tool.Arm(1, overlap=True), seed=0).double()
    states.key.data = 0.1 * normal(*states.key.shape)
    q, k, v = (normal(2, 4, 40, 32, seed=seed) for seed in range(3))
    attention = tool.Attention([[6] * 4] * 4, states, overlap=True)
    with torch.no_grad():
        got, _ = attention(SimpleNamespace(layer_idx=1), q, k, v, None, scaling=32**-0.5)
        score = ((q @ states.query[1]) + states.offset[1])[..., 0]
        written = (k @ states.key[1]).exp()
        wanted, _ = hybrid_attention(
            q, k, v, torch.ones_like(written), written, window=6, mixing="calibrated", gate=score,
            sinks=tool.SINKS,
        )  # fmt: skip
    torch.testing.assert_close(got.transpose(1, 2), wanted)
