"""What single families do their own way: dropout under another name, projections LoRA attaches to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise import HybridConfig, hybridize, merge_adapters, record_donor
from equipoise.config import FinetuneConfig
from equipoise.models import adapters
from equipoise.models.layout import attention_modules
from equipoise.models.load import load_donor
from equipoise.train.stages import lora_targets
from support import FAMILIES, random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 20)


def test_a_donor_published_with_dropout_converts_and_reloads(tmp_path: Path, logits: Logits) -> None:
    tiny_model("gpt2", attn_pdrop=0.1, resid_pdrop=0.1).save_pretrained(tmp_path / "donor")
    donor: Any = load_donor(str(tmp_path / "donor"))
    assert (donor.config.attn_pdrop, donor.config.resid_pdrop) == (0.0, 0.1)
    assert all(module.attn_dropout.p == 0 for module in attention_modules(donor))
    hybridize(donor, HybridConfig(window=5))
    record_donor(donor, str(tmp_path / "donor"))
    donor.save_pretrained(tmp_path / "delta", delta=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(logits(loaded, TOKENS), logits(donor, TOKENS))
    loaded.train()
    loaded(TOKENS, labels=TOKENS).loss.backward()  # no dropout is asked of the converted attention


@pytest.mark.parametrize("family", list(FAMILIES))
def test_lora_attaches_to_the_attention_of_every_family(family: str, tmp_path: Path, logits: Logits) -> None:
    model = hybridize(tiny_model(family), HybridConfig(window=5))
    targets = lora_targets(model, FinetuneConfig())
    adapters.add_lora(model, rank=2, alpha=4.0, targets=targets)
    carriers = {id(layer) for layer in adapters.adapter_layers(model)}
    for module in attention_modules(model):
        # every linear layer of the attention, q, k, v fused or not, and the output
        own = [
            child for name, child in module.named_children() if name in {t.split(".")[-1] for t in targets}
        ]
        assert len(own) in (2, 4)
        assert all(id(child) in carriers for child in own)
        carriers -= {id(child) for child in own}
    assert not carriers  # and of nothing else
    before = logits(model, TOKENS)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.1)
    tuned = logits(model, TOKENS)
    assert (tuned - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(logits(loaded, TOKENS), tuned)
    merge_adapters(loaded)
    torch.testing.assert_close(logits(loaded, TOKENS), tuned, rtol=0, atol=2e-3)
