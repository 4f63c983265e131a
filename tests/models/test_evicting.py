"""The donor with an evicting cache, through a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise import HybridConfig, branches, hybridize
from equipoise.layers.cache import CacheError
from equipoise.layers.mixer import AttentionMode
from equipoise.ops.eviction import Eviction
from support import padding_mask, random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 24)


@pytest.fixture
def model() -> Any:
    return hybridize(tiny_model(dtype=torch.float64), HybridConfig(window=5))


def evicting(budget: int, recent: int, **more: Any) -> AttentionMode:
    return AttentionMode("evicting", eviction=Eviction(budget, recent, **more))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_with_room_for_all_it_is_the_donor(family: str, logits: Logits) -> None:
    model = hybridize(tiny_model(family, dtype=torch.float64), HybridConfig(window=5))
    mask = padding_mask("left", 24).long()
    with branches(model, "softmax"):
        expected = logits(model, TOKENS, attention_mask=mask)
    with branches(model, evicting(25, 4)):
        out = logits(model, TOKENS, attention_mask=mask)
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-6)


def test_where_all_is_recent_it_is_the_training_free_window(model: Any, logits: Logits) -> None:
    with branches(model, AttentionMode("swa", window=6)):
        expected = logits(model, TOKENS)
    with branches(model, evicting(6, 6)):
        torch.testing.assert_close(logits(model, TOKENS), expected, rtol=0, atol=1e-10)
    with branches(model, evicting(6, 2)):
        other = logits(model, TOKENS)
    assert torch.equal(other[:, 0], expected[:, 0])
    assert (other - expected).abs().max() > 1e-3


def test_packed_rows_are_what_each_is_alone(model: Any, logits: Logits) -> None:
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    with branches(model, evicting(6, 2, rule="observed", every=3)):
        packed = logits(model, TOKENS, position_ids=positions)
        alone = torch.cat([logits(model, TOKENS[:, :10]), logits(model, TOKENS[:, 10:])], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)


def test_caches_are_refused(model: Any) -> None:
    with branches(model, evicting(6, 2)):
        for run in (lambda: model(TOKENS), lambda: model.generate(TOKENS, max_new_tokens=2)):
            with pytest.raises(CacheError, match="keeps no cache: pass use_cache=False"):
                run()


def test_modes_compare_by_their_eviction() -> None:
    assert evicting(6, 2).same_as(evicting(6, 2))
    assert not evicting(6, 2).same_as(evicting(6, 3))
    with pytest.raises(ValueError, match="needs an eviction"):
        AttentionMode("evicting")
