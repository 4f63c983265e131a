"""LoRA inside a hybrid: added, switched, saved, merged, taken out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise import ConversionError, branches, merge_adapters, revert
from equipoise.layers.interface import mixers_of
from equipoise.models import adapters
from equipoise.models.storage import CheckpointError
from support import random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 20)
load = AutoModelForCausalLM.from_pretrained


@pytest.fixture
def tuned(converted: Any) -> Any:
    """The converted Llama with adapters that do something."""
    adapters.add_lora(converted, rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
    for name, parameter in converted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn_like(parameter) * 0.3)
    return converted


def test_only_adapters_train(tuned: Any) -> None:
    trained = {name.split(".lora_")[0] for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}
    assert len(adapters.adapter_layers(tuned)) == 4
    assert adapters.has_adapters(tuned)
    assert not adapters.has_adapters(tiny_model())


def test_targets_that_are_not_there(converted: Any) -> None:
    with pytest.raises(ValueError, match="q_prj"):
        adapters.add_lora(converted, rank=2, alpha=4.0, targets=("q_prj",))


@pytest.mark.parametrize("delta", [False, True])
def test_save_and_load(tuned: Any, tmp_path: Path, delta: bool, logits: Logits) -> None:
    expected = logits(tuned, TOKENS)
    tuned.save_pretrained(tmp_path / "saved", delta=delta)
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    loaded = load(tmp_path / "saved")
    assert torch.equal(logits(loaded, TOKENS), expected)
    with branches(loaded, "softmax"):
        torch.testing.assert_close(logits(loaded, TOKENS), logits(tiny_model(), TOKENS), rtol=0, atol=1e-4)
    with branches(loaded, "softmax_lora"):
        assert not torch.allclose(logits(loaded, TOKENS), logits(tiny_model(), TOKENS), atol=1e-2)
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "lora_" in n)
    saved, info = load(tmp_path / "saved", output_loading_info=True)
    assert adapters.has_adapters(saved)
    assert "missing_keys" in info


@pytest.mark.parametrize("delta", [False, True])
def test_bfloat16_donors_keep_float32_adapters(tuned: Any, tmp_path: Path, delta: bool) -> None:
    tuned.save_pretrained(tmp_path / "saved", delta=delta)
    loaded = load(tmp_path / "saved", dtype=torch.bfloat16)
    mine, theirs = ({n: p for n, p in model.named_parameters() if "lora_" in n} for model in (tuned, loaded))
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, mine[name])


def test_softmax_runs_without_adapters_and_gives_them_back(tuned: Any, logits: Logits) -> None:
    hybrid = logits(tuned, TOKENS)
    frozen = tuned.model.layers[0].self_attn.q_proj.lora_A.default.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in tuned.named_parameters()}
    with branches(tuned, "softmax"):
        torch.testing.assert_close(logits(tuned, TOKENS), logits(tiny_model(), TOKENS), rtol=0, atol=1e-4)
    assert {n: p.requires_grad for n, p in tuned.named_parameters()} == before
    assert not frozen.requires_grad
    assert any(before.values())
    assert torch.equal(logits(tuned, TOKENS), hybrid)


def test_switched_off_adapters_stay_off(tuned: Any, logits: Logits) -> None:
    for layer in adapters.adapter_layers(tuned):
        layer.enable_adapters(False)
    without = logits(tuned, TOKENS)
    with branches(tuned, "softmax"):
        pass
    assert torch.equal(logits(tuned, TOKENS), without)


def test_mixers_are_found_under_adapters(tuned: Any) -> None:
    assert [m.layer_idx for m in mixers_of(tuned)] == [0, 1]


def test_merge(tuned: Any, tmp_path: Path, logits: Logits) -> None:
    expected = logits(tuned, TOKENS)
    merge_adapters(tuned)
    torch.testing.assert_close(logits(tuned, TOKENS), expected, rtol=0, atol=1e-4)
    assert not adapters.has_adapters(tuned)
    with pytest.raises(ConversionError, match="do not merge adapters, or save with delta=False"):
        tuned.save_pretrained(tmp_path / "delta", delta=True)
    tuned.save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full")
    assert torch.equal(logits(loaded, TOKENS), logits(tuned, TOKENS))
    for model in (tuned, loaded):
        with pytest.raises(ConversionError, match="'softmax_lora', or a checkpoint saved without merging"):
            branches(model, "softmax").__enter__()
        with pytest.raises(ConversionError, match="the donor's are gone"):
            revert(model)
        with branches(model, "softmax_lora"):
            logits(model, TOKENS)


def test_unload_and_revert_give_the_donor_back(tuned: Any, logits: Logits) -> None:
    revert(tuned)
    assert not adapters.has_adapters(tuned)
    assert not hasattr(tuned, "peft_config")
    assert torch.equal(logits(tuned, TOKENS), logits(tiny_model(), TOKENS))


def test_damaged_or_foreign_adapters_are_refused(tuned: Any, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path / "saved", delta=True)
    path = tmp_path / "saved" / "lora" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: not a complete safetensors file"):
        load(tmp_path / "saved")
    path.write_bytes(whole)
    config = tmp_path / "saved" / "lora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"v_proj"', '"o_proj"'))
    with pytest.raises(ValueError, match="the adapters do not fit the model"):
        load(tmp_path / "saved")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"expected lora/adapter_model.safetensors, found none"):
        load(tmp_path / "saved")
