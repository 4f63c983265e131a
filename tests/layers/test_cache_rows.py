"""Rows of caches join, leave and are copied, and each decodes as it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equipoise import HybridCache, HybridConfig, branches, hybridize
from equipoise.layers.cache import CacheError
from equipoise.layers.cache_rows import append_rows, copy_rows, duplicate, padding_mask, select_rows
from support import SINGLE_HEADS, random_tokens, tiny_model

LENGTHS = (3, 17, 9, 30)
CASES = [
    pytest.param("llama", {"window": 5}, "both", id="sliding"),
    pytest.param(
        "llama", {"window": 5, "overlap": False, "sinks": 2, "layout": "terraced"}, "both", id="terraced"
    ),
    pytest.param("llama", {"window": 4, "mixing": "shared", "overlap": False}, "both", id="shared"),
    pytest.param("llama", SINGLE_HEADS, "both", id="single-heads"),
    pytest.param("llama", {"window": 5}, "linear", id="linear"),
    pytest.param("llama", {"window": 5}, "none", id="none"),
    pytest.param("llama", {"window": 5}, "sinks", id="sinks"),
    pytest.param("llama", {"window": 5}, "softmax", id="softmax"),
    pytest.param("llama", {"window": 5, "layers": [0]}, "both", id="half-converted"),
    pytest.param("gemma3_text", {"window": 5}, "both", id="local-layers"),
]


def model_of(family: str, settings: dict[str, Any]) -> Any:
    return hybridize(tiny_model(family, dtype=torch.float64), HybridConfig(**settings))


@torch.no_grad()
def prompt(model: Any, length: int) -> tuple[HybridCache, torch.Tensor]:
    """A cache that has read a prompt of its own, and the tokens that come next."""
    tokens = random_tokens(1, length + 12, seed=length)
    cache = model.make_cache()
    model(tokens[:, :length], past_key_values=cache)
    return cache, tokens[:, length:]


@torch.no_grad()
def step(model: Any, cache: HybridCache, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    read = torch.tensor(lengths)
    return model(
        tokens, past_key_values=cache, position_ids=read[:, None], attention_mask=padding_mask(cache, read)
    ).logits[:, -1]


@pytest.mark.parametrize(("family", "settings", "state"), CASES)
def test_rows_that_join_and_leave_decode_as_alone(family: str, settings: dict[str, Any], state: str) -> None:
    model = model_of(family, settings)
    with branches(model, state):
        alone = {}
        for length in LENGTHS:
            cache, following = prompt(model, length)
            with torch.no_grad():
                alone[length] = torch.stack(
                    [model(t, past_key_values=cache).logits[0, -1] for t in following.split(1, 1)]
                )
        caches = {length: prompt(model, length) for length in LENGTHS}
        batch = caches[LENGTHS[0]][0]
        present, taken = [LENGTHS[0]], dict.fromkeys(LENGTHS, 0)

        def steps(count: int) -> None:
            for _ in range(count):
                tokens = torch.cat([caches[row][1][:, taken[row]][:, None] for row in present])
                logits = step(model, batch, tokens, [row + taken[row] for row in present])
                for row, found in zip(present, logits, strict=True):
                    torch.testing.assert_close(found, alone[row][taken[row]], rtol=0, atol=1e-10)
                    taken[row] += 1

        steps(2)
        append_rows(batch, [caches[LENGTHS[1]][0], caches[LENGTHS[2]][0]])
        present += LENGTHS[1:3]
        steps(4)
        kept = [2, 0]  # the longest leaves, the others change places
        present = [present[row] for row in kept]
        select_rows(batch, torch.tensor(kept), [row + taken[row] for row in present])
        steps(3)
        append_rows(batch, [caches[LENGTHS[3]][0]])
        present += [LENGTHS[3]]
        steps(3)


def test_padding_goes_with_the_row_that_needed_it() -> None:
    model = model_of("llama", {"window": 5})
    with branches(model, "softmax"):
        batch, longer = prompt(model, 3)[0], prompt(model, 30)[0]
        before = batch.state_bytes()
        append_rows(batch, [longer])
        assert longer.state_bytes() == 0
        select_rows(batch, torch.tensor([0]), [3])
    assert batch.state_bytes() == before


def test_copies_have_memory_of_their_own() -> None:
    model = model_of("gemma3_text", {"window": 5})
    cache, following = prompt(model, 9)
    kept = duplicate(cache)
    with torch.inference_mode():
        first = model(following, past_key_values=cache).logits
        for copied in copy_rows(kept, 3)[1:]:
            assert torch.equal(model(following, past_key_values=copied).logits, first)
        assert torch.equal(model(following, past_key_values=kept).logits, first)


def test_rows_that_do_not_fit_are_refused() -> None:
    model = model_of("llama", {"window": 5})
    cache, other = prompt(model, 4)[0], prompt(model, 5)[0]
    with branches(model, "linear"):
        linear = prompt(model, 4)[0]
    with pytest.raises(CacheError, match="expected caches made in one branch state"):
        append_rows(cache, [linear])
    with pytest.raises(CacheError, match="each read a token"):
        append_rows(cache, [model.make_cache()])
    half = prompt(model_of("llama", {"window": 5, "layers": [0]}), 4)[0]
    with pytest.raises(CacheError, match="got HybridCacheLayer, DynamicLayer at layer 1"):
        append_rows(cache, [half])
    with pytest.raises(ValueError, match="all hold ranks, or none of them, got 1 of 2"):
        append_rows(other, [prompt(model_of("llama", {"window": 5, "sinks": 2}), 4)[0]])
