"""Performer, Taylor and landmark maps through a whole model: caches, checkpoints, gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise import HybridConfig, hybridize
from equipoise.layers.interface import mixers_of
from equipoise.ops.dispatch import backend
from support import padding_mask, random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 24)
FORMS: dict[str, dict[str, Any]] = {
    "convex": {},
    "lolcats": {"mixing": "shared", "overlap": False, "gate": "per_head"},
    "linear": {"window": None, "map_heads": "key_value"},
    "gated": {"write_gate": "per_token"},
}


@pytest.mark.parametrize("name", ["performer", "taylor", "landmark"])
@pytest.mark.parametrize("form", FORMS)
def test_decoding_equals_the_forward_pass(name: str, form: str, logits: Logits) -> None:
    config = HybridConfig(**{"window": 5, "feature_map": name, **FORMS[form]})
    model = hybridize(tiny_model(dtype=torch.float64), config)
    mask = padding_mask("left", 24).long()
    expected = logits(model, TOKENS, attention_mask=mask)
    with backend("walk"):  # the path that takes anything
        torch.testing.assert_close(logits(model, TOKENS, attention_mask=mask), expected, rtol=0, atol=1e-9)
    cache, parts = model.make_cache(), [slice(0, 15), *(slice(i, i + 1) for i in range(15, 24))]
    seen = [
        logits(model, TOKENS[:, p], past_key_values=cache, use_cache=True, attention_mask=mask[:, : p.stop])
        for p in parts
    ]
    torch.testing.assert_close(torch.cat(seen, 1)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["performer", "taylor", "landmark"])
def test_checkpoints_and_gradients(name: str, tmp_path: Path, logits: Logits) -> None:
    model = hybridize(tiny_model(), HybridConfig(window=5, feature_map=name))
    for parameter in (p for mixer in mixers_of(model) for p in mixer.parameters()):
        parameter.data.add_(0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))
    loaded.train()
    loaded(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad.abs().max() > 0 for m in mixers_of(loaded) for p in m.parameters())
