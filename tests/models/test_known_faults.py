"""Faults of LoLCATs' published code, each shown not to be here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise import HybridConfig, branches, hybridize
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import LayerInputs
from support import random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(1, 40)
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(
    params=itertools.product(("sliding", "terraced"), ("convex", "shared"), (True, False)), ids=str
)
def model(request: pytest.FixtureRequest) -> Any:
    """The layouts and mixing rules, LoLCATs' own (terraced, shared, disjoint) among them."""
    layout, mixing, overlap = request.param
    config = HybridConfig(window=6, layout=layout, mixing=mixing, overlap=overlap)
    return hybridize(tiny_model(dtype=torch.float64), config)


def test_outputs_do_not_depend_on_the_total_length(model: Any, logits: Logits) -> None:
    whole = logits(model, TOKENS)
    for length in (1, 5, 6, 7, 12, 13, 33):
        torch.testing.assert_close(logits(model, TOKENS[:, :length]), whole[:, :length], **EXACT)


def test_decoding_equals_the_forward_pass(model: Any, logits: Logits) -> None:
    cache = model.make_cache()
    with torch.no_grad():
        steps = [model(TOKENS[:, t : t + 1], past_key_values=cache).logits for t in range(40)]
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, TOKENS), **EXACT)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_no_key_is_counted_twice_where_the_window_covers_all(model: Any, length: int) -> None:
    """T <= w: each output is an average, and a key's weight is at most what its branches give it."""
    mixer = mixers_of(model)[0]
    q, k = (torch.randn(1, heads, length, 8, dtype=torch.float64) for heads in (4, 2))
    ones = torch.ones(1, 2, length, 8, dtype=torch.float64)
    out, _ = mixer.hybrid(LayerInputs(q, k, ones, 8**-0.5))
    torch.testing.assert_close(out, torch.ones_like(out), **EXACT)
    if not mixer.config.overlap:  # disjoint: the window sees every key, so it is plain softmax attention
        v = torch.randn(1, 2, length, 8, dtype=torch.float64)
        out, _ = mixer.hybrid(LayerInputs(q, k, v, 8**-0.5))
        attention = torch.nn.functional.scaled_dot_product_attention
        torch.testing.assert_close(out, attention(q, k, v, is_causal=True, enable_gqa=True), **EXACT)


def test_the_second_prefill_chunk_sees_the_first_ones_window(model: Any, logits: Logits) -> None:
    whole = logits(model, TOKENS)
    for size in (4, 6, 17):
        cache = model.make_cache()
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in TOKENS.split(size, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


def test_padding_is_not_ignored(model: Any, logits: Logits) -> None:
    alone = logits(model, TOKENS[:, 15:])
    mask = torch.ones_like(TOKENS)
    mask[:, :15] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = logits(model, TOKENS, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[:, 15:], alone, **EXACT)
    assert not torch.allclose(logits(model, TOKENS)[:, 15:], alone)
    right = logits(model, TOKENS, attention_mask=mask.flip(1))
    torch.testing.assert_close(right[:, :25], logits(model, TOKENS[:, :25]), **EXACT)


def test_settings_come_from_the_configuration_not_from_the_directorys_name(
    model: Any, tmp_path: Path, logits: Logits
) -> None:
    expected = logits(model, TOKENS)
    plain = tmp_path / "model"
    model.save_pretrained(plain)
    # what LoLCATs parses from names: window, feature dimension, ranks, which checkpoint
    telling = tmp_path / "hybrid-window=64-wsize=64-fd=128-lk=relu-lora_r=8-se=1-layout=sliding-shared"
    plain.rename(telling)
    loaded = AutoModelForCausalLM.from_pretrained(telling)
    assert mixers_of(loaded)[0].config == mixers_of(model)[0].config
    assert torch.equal(logits(loaded, TOKENS), expected)
    with branches(loaded, "window"):
        assert not torch.equal(logits(loaded, TOKENS), expected)
