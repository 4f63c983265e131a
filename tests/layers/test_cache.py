"""The decode cache: constant in size, bound to its branch state, reordered with its rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from equipoise import HybridCache, HybridConfig, branches, hybridize
from equipoise.layers.cache import CacheError, HybridCacheLayer
from equipoise.ops import Branches
from support import random_tokens, tiny_model

TOKENS = random_tokens(2, 24)


@pytest.fixture
def model() -> Any:
    return hybridize(
        tiny_model(dtype=torch.float64), HybridConfig(window=5, overlap=False, sinks=2, layout="terraced")
    )


@torch.no_grad()
def read(model: Any, cache: Any, tokens: torch.Tensor, **extra: Any) -> torch.Tensor:
    return model(tokens, past_key_values=cache, **extra).logits


def measured(cache: HybridCache) -> int:
    """Bytes of every storage that hangs on the cache, index tensors included."""
    storages = {}
    for layer in cache.layers:
        held = [layer.keys, layer.values]
        if isinstance(layer, HybridCacheLayer) and layer.state is not None:
            held += layer.state.tensors()
        held += [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        for tensor in held:
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("padded", [False, True])
def test_bytes_do_not_grow(padded: bool) -> None:
    model = hybridize(
        tiny_model(max_position_embeddings=8192),
        HybridConfig(window=16, overlap=False, sinks=2, layout="terraced"),
    )
    sizes = []
    for length in (64, 4096):
        tokens = random_tokens(1, length + 1)
        mask = torch.ones_like(tokens)
        mask[:, :3] = not padded
        cache = model.make_cache()
        for cut in (slice(0, length), slice(length, None)):
            read(model, cache, tokens[:, cut], attention_mask=mask[:, : cut.stop])
            assert cache.state_bytes() == measured(cache)
            sizes.append(cache.state_bytes())
    assert len(set(sizes)) == 1
    assert cache.get_seq_length() == 4097


def test_softmax_state_keeps_every_key(model: Any) -> None:
    with branches(model, "softmax"):
        cache = model.make_cache()
        whole = read(model, None, TOKENS)
        split = torch.cat([read(model, cache, TOKENS[:, :10]), read(model, cache, TOKENS[:, 10:])], 1)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-10)
    assert (
        cache.state_bytes() == measured(cache) == 2 * 2 * (2 * 2 * 24 * 8) * 8
    )  # layers, k and v, [B, N, T, D]


ROWS = torch.tensor([True, False])
STATES = [
    ("both", "literal"), ("window", "literal"), ("window", "renormalised"), ("linear", "literal"),
    ("linear", "renormalised"), ("none", "literal"), ("sinks", "literal"), ("softmax", "literal"),
    (Branches(ROWS, ~ROWS, "renormalised"), "literal"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(STATES)))
def test_every_state_decodes_as_it_reads(model: Any, number: int) -> None:
    state, reading = STATES[number]
    with branches(model, state, reading=reading):
        whole = read(model, None, TOKENS, use_cache=False)
        cache = model.make_cache()
        split = torch.cat([read(model, cache, part) for part in TOKENS.split(7, 1)], 1)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-10)
    for other, other_reading in STATES:
        if (other, other_reading) == (state, reading) or ("softmax" in (state, other) and state == other):
            continue
        if state == "softmax":
            continue  # a full cache of keys; refused below
        with (
            branches(model, other, reading=other_reading),
            pytest.raises(CacheError, match=r"branches|softmax"),
        ):
            read(model, cache, TOKENS[:, :1])


def test_a_softmax_cache_does_not_serve_the_hybrid(model: Any) -> None:
    with branches(model, "softmax"):
        cache = model.make_cache()
        read(model, cache, TOKENS)
    with pytest.raises(CacheError, match="expected a cache made by equipoise, got a DynamicLayer"):
        read(model, cache, TOKENS[:, :1])


def test_the_same_state_may_be_entered_again(model: Any) -> None:
    with branches(model, "window"):
        whole = read(model, None, TOKENS)
        cache = model.make_cache()
        first = read(model, cache, TOKENS[:, :9])
    with branches(model, "window"):
        rest = read(model, cache, TOKENS[:, 9:])
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=0, atol=1e-10)


def test_a_copied_prompt_serves_many_continuations(model: Any) -> None:
    whole = read(model, None, TOKENS)
    prompt = model.make_cache()
    read(model, prompt, TOKENS[:, :15])
    for _ in range(2):
        rest = read(model, copy.deepcopy(prompt), TOKENS[:, 15:])
        torch.testing.assert_close(rest, whole[:, 15:], rtol=0, atol=1e-10)


def test_an_empty_foreign_cache_is_taken_over(model: Any) -> None:
    whole = read(model, None, TOKENS)
    cache = DynamicCache(config=model.config)
    split = torch.cat([read(model, cache, part) for part in TOKENS.split(9, 1)], 1)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-10)
    assert all(isinstance(layer, HybridCacheLayer) for layer in cache.layers)


def test_a_filled_foreign_cache_is_refused(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    read(tiny_model(dtype=torch.float64), cache, TOKENS)
    with pytest.raises(CacheError, match="got a DynamicCache with tokens in it"):
        read(model, cache, TOKENS[:, :1])


def test_rows_are_reordered_selected_and_repeated(model: Any) -> None:
    whole = read(model, None, TOKENS)[:, 15:]
    swap = torch.tensor([1, 0])
    for method, argument, rows in (
        ("reorder_cache", swap, swap),
        ("batch_select_indices", torch.tensor([1]), torch.tensor([1])),
        ("batch_repeat_interleave", 2, torch.tensor([0, 0, 1, 1])),
    ):
        cache = model.make_cache()
        read(model, cache, TOKENS[:, :15])
        getattr(cache, method)(argument)
        torch.testing.assert_close(read(model, cache, TOKENS[rows, 15:]), whole[rows], rtol=0, atol=1e-10)


def test_reset_starts_over(model: Any) -> None:
    cache = model.make_cache()
    first = read(model, cache, TOKENS)
    cache.reset()
    assert (cache.get_seq_length(), cache.state_bytes()) == (0, 0)
    torch.testing.assert_close(read(model, cache, TOKENS), first)


def test_training_builds_no_cache(model: Any) -> None:
    model.train()
    assert model(TOKENS, use_cache=True).past_key_values is None
    model.eval()
    assert isinstance(model(TOKENS).past_key_values, HybridCache)
    assert model(TOKENS, use_cache=False).past_key_values is None
