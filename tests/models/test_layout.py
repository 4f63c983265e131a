"""Reach and state bytes, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from equipoise import HybridConfig, hybridize, reach, state_bytes
from equipoise.models.layout import equal_window
from support import tiny_model


def made(model_type: str = "llama", *, donor: dict[str, Any] | None = None, **settings: Any) -> Any:
    return hybridize(tiny_model(model_type, **(donor or {})), HybridConfig(**settings))


def test_reach() -> None:
    four = {"num_hidden_layers": 4}
    assert reach(made(donor=four, window=64)) == 4 * 63 == 252
    assert reach(made(donor=four, window=10, layout="terraced")) == 4 * 10 + 10 - 1
    assert reach(made(donor=four, window=64, layers=(0, 1, 2))) is None  # one layer keeps full softmax
    assert reach(made(window=None)) == 0
    assert reach(made(donor=four, window=10, layout="terraced"), window=64) == 252
    # Gemma: the first layer is local, window 6
    assert reach(made("gemma3_text", window=10)) == 5 + 2 * 9
    assert reach(made("gemma3_text", window=10, layers="all")) == 3 * 9
    assert reach(made("gemma3_text", window=10), window=3) == 5 + 2 * 2
    assert reach(tiny_model()) is None


def test_state_bytes() -> None:
    # 2 layers; 2 key/value heads and 4 query heads of 8; K and V at 2 bytes, S and z at 4
    def kv(tokens: int) -> int:
        return 2 * (2 * tokens * 2 * 8 * 2)

    def sums(heads: int, features: int) -> int:
        return 2 * (heads * features * (8 + 1) * 4)

    assert state_bytes(made(window=10)) == kv(10) + sums(4, 16)
    assert state_bytes(made(window=10, sinks=3, map_heads="key_value")) == kv(13) + sums(2, 16)
    assert state_bytes(made(window=10, layout="terraced", feature_multiple=4)) == kv(20) + sums(4, 32)
    assert state_bytes(made(window=None, feature_multiple=1)) == sums(4, 8)
    assert state_bytes(made(window=10, feature_map=None)) == kv(10)
    assert state_bytes(made(window=10, layers=(1,))) == (kv(10) + sums(4, 16)) // 2


def test_equal_window() -> None:
    model = made(window=10)
    per_token = 2 * 2 * 8 * 2
    expected = 10 + 4 * 16 * 9 * 4 // per_token - 4
    assert equal_window(model) == expected
    assert equal_window(model, sinks=0) == expected + 4
    assert equal_window(made(window=2, feature_map=None)) == 1


def test_the_published_equal_window() -> None:
    """Llama-3-8B, D_phi = 2D, w = 64, a state per query head: about 1,100 tokens of keys and values."""
    heads, kv_heads, size = 32, 8, 128
    state = heads * 2 * size * (size + 1) * 4
    assert 64 + state // (2 * kv_heads * size * 2) == pytest.approx(1100, rel=0.01)
