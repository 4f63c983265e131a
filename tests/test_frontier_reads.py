"""The tool that tells a wrong read from a wrong answer."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise import HybridConfig, hybridize
from equipoise.layers.mixer import HybridMixer, LayerInputs
from support import tiny_model
from test_frontier import tool

ROW = np.array([1, 50, 60, 2, 51, 61, 3, 50, 60, 4, 51, 61])
"""Keys 50 and 51, each shown and asked once, 6 tokens apart."""
TEXTS = SimpleNamespace(words=(60, 61), pairs=lambda index: ROW)


@pytest.fixture(scope="module")
def reads() -> ModuleType:
    return tool("frontier_reads")


def hybrid() -> Any:
    delta: dict[str, Any] = {"state_update": "delta", "feature_map": "dpfp", "linear_heads": (1, 3)}
    means: dict[str, Any] = {"feature_map": "constant", "feature_dim": 1, "mixing": "calibrated"}
    config = HybridConfig(window=4, per_layer={0: means, 1: delta})
    return hybridize(tiny_model("llama", vocab_size=70), config)


def test_every_question_of_every_large_head_is_counted(reads: Any) -> None:
    found = reads.outcomes(hybrid(), TEXTS, 4, 0)
    assert set(found) == {(1, 1), (1, 3)}
    assert all(len(of) == 8 for of in found.values())
    assert reads.outcomes(hybrid(), TEXTS, 4, 6) == {}


def test_reads_are_what_the_state_says(reads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value that was shown 6 tokens before its key is asked stands 5 before the key."""

    def perfect(mixer: HybridMixer, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        values = inputs.v[:, [0, 1]]
        return values.roll(5, 2), values

    monkeypatch.setattr(reads, "read_by", perfect)
    found = reads.outcomes(hybrid(), TEXTS, 4, 0)
    assert all(right for of in found.values() for right, *_ in of)
    rows = list(reads.table({10: {(1, 1): [(True, True, 0.1), (True, False, 0.9), (False, False, 0.2)]}}))
    assert rows[-1] == "| 10, layer 1, head 1 | 0.667 | 0.333 | 0.500 | 0.000 | 0.200 |"


def test_the_state_itself_is_asked(reads: Any) -> None:
    model, seen = hybrid(), list[tuple[Tensor, Tensor]]()

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if mixer.layer_idx == 1:
            seen.append(reads.read_by(mixer, inputs))

    with reads.observe(model, observer), torch.no_grad():
        model(input_ids=torch.from_numpy(ROW[None]), use_cache=False)
    read, values = seen[0]
    assert read.shape == values.shape == (1, 2, 12, 8)
    assert read[:, :, 1:].abs().sum() > 0
    assert reads.points_at(2 * values[0, 0, 3], values[0, 0]) == 3
