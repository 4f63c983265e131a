"""The tool that says which heads look things up: states of groups, their order, full attention in a few."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from equipoise import HybridConfig, hybridize
from equipoise.layers.interface import mixers_of
from support import random_tokens, tiny_model
from test_frontier import tool


@pytest.fixture(scope="module")
def lookups() -> ModuleType:
    return tool("lookup_heads")


AT: Any = SimpleNamespace(heads=4, kv_heads=2, tokens=6, texts=1, draw=lambda split: split)


def test_query_heads_of_a_group_are_one_state(lookups: Any) -> None:
    importance = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 0.0, 1.0]])[..., None]
    values = lookups.by_state(importance, AT)
    assert values.tolist() == [[3.0, 12.0], [48.0, 1.0]]
    assert lookups.ordered(values) == [(1, 0), (0, 1), (0, 0), (1, 1)]


def test_full_attention_in_a_state_is_that_of_its_query_heads(
    lookups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(1, 12)
    donor = tiny_model(dtype=torch.float64)
    own = donor(tokens).logits
    model = hybridize(donor, HybridConfig(window=2, sinks=4, feature_map=None), check=False)
    monkeypatch.setattr(lookups, "scored", lambda model, *_: model(tokens, use_cache=False).logits)
    every = [(layer, head) for layer in (0, 1) for head in (0, 1)]
    torch.testing.assert_close(lookups.restored(model, AT, every), own)
    windows = lookups.restored(model, AT, [])
    one = lookups.restored(model, AT, [(0, 1)])
    assert not torch.allclose(one, windows, atol=1e-6)
    # head 1 of keys is read by query heads 2 and 3
    weights = mixers_of(model)[0].mode.blend.weights  # type: ignore[union-attr]
    assert weights.tolist() == [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]


def test_table(lookups: Any) -> None:
    def way(first: str, recalled: float) -> dict[str, Any]:
        return {"states": [first, "0.0"], "share": [1.0, 0.25], "recall": [recalled, 0.9], "nll": [3.0, 3.0]}

    rows = [
        {
            "name": "source", "donor": "one", "length": 1024, "tokens": 20, "seed": seed,
            "everywhere": way("3.1", 0.5 + seed / 10), "where windows lose much": way("3.2", 0.8),
        }
        for seed in range(3)
    ]  # fmt: skip
    other = {**rows[0], "donor": "other"}
    shown = list(lookups.tables([*rows, other]))
    assert len(shown) == 6
    assert shown[4].startswith("| source (other) | 1024 | 20 | everywhere | 3.1 (1.00), 0.0 (0.25) | 0.500 |")
    assert "everywhere | 3.1 (1.00), 0.0 (0.25) | 0.600 [" in shown[2]
    assert "3.2 (1.00), 0.0 (0.25) | 0.800 [0.800, 0.800] | 0.900" in shown[3]
