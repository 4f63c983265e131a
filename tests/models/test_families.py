"""Every supported family, tiny and random: the hybrid decodes, pads, saves, teaches and reverts exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from equipoise import HybridConfig, branches, hybridize, record_donor, revert
from equipoise.layers.interface import mixers_of
from equipoise.models.families import SUPPORTED
from support import FAMILIES, random_tokens, tiny_model

CONFIG = HybridConfig(window=5, gate="per_head", gate_value=0.3)
DELTA = HybridConfig(
    window=5, feature_map="trilinear", state_update="delta", rotary="undone", gate="quadratic",
    write_gate="quadratic", value_divisor=2, map_heads="key_value",
)  # fmt: skip
DISJOINT = HybridConfig(window=5, mixing="shared", overlap=False, sinks=2, layout="terraced", layers="all")


def test_every_supported_family_is_here() -> None:
    assert set(FAMILIES) == set(SUPPORTED)


def logits(model: Any, tokens: torch.Tensor, **extra: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **{"use_cache": False, **extra}).logits


def decoded(model: Any, tokens: torch.Tensor, prefill: int, **extra: Any) -> torch.Tensor:
    """Logits of a prefill and then one token at a time."""
    cache, outs, start = model.make_cache(), [], 0
    with torch.no_grad():
        for stop in (prefill, *range(prefill + 1, tokens.shape[1] + 1)):
            cut = {n: t[:, start:stop] if n == "position_ids" else t[:, :stop] for n, t in extra.items()}
            outs.append(model(tokens[:, start:stop], past_key_values=cache, **cut).logits)
            start = stop
    return torch.cat(outs, 1)


@pytest.mark.parametrize("config", [CONFIG, DISJOINT, DELTA], ids=["convex", "shared", "delta"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_decoding_equals_the_full_forward(family: str, config: HybridConfig) -> None:
    tokens = random_tokens(2, 26)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 5e-4)):
        model = hybridize(tiny_model(family, dtype=dtype), config)
        full = logits(model, tokens)
        torch.testing.assert_close(decoded(model, tokens, 11), full, rtol=0, atol=tolerance)
    assert full.std() > 0.1


@pytest.mark.parametrize("config", [CONFIG, DISJOINT, DELTA], ids=["convex", "shared", "delta"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_padded_batches_equal_single_rows(family: str, config: HybridConfig) -> None:
    model = hybridize(tiny_model(family, dtype=torch.float64), config)
    tokens, mask = random_tokens(2, 26), torch.ones(2, 26, dtype=torch.long)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    alone = logits(model, tokens[:1, 9:])[0]
    whole = logits(model, tokens, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(whole[0, 9:], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole[1], logits(model, tokens[1:])[0], rtol=0, atol=1e-10)
    step = decoded(model, tokens, 12, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(step[0, 9:], alone, rtol=0, atol=1e-10)
    right = mask.flip(1)
    torch.testing.assert_close(
        logits(model, tokens, attention_mask=right)[0, :17],
        logits(model, tokens[:1, :17])[0],
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("family", SUPPORTED)
def test_teacher_reload_and_revert(family: str, tmp_path: Path) -> None:
    donor = tiny_model(family)
    tokens = random_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    expected = logits(donor, tokens)
    expected_padded = logits(donor, tokens, attention_mask=mask)[mask.bool()]
    donor.save_pretrained(tmp_path / "donor")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")
    before = model.config.to_dict()
    implementation = model.config._attn_implementation
    hybridize(model, CONFIG)
    record_donor(model, str(tmp_path / "donor"))
    hybrid = logits(model, tokens)
    assert (hybrid - expected).abs().max() > 1e-2

    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "delta", delta=True)
    for kind in ("full", "delta"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded, tokens), hybrid)
        with branches(loaded, "softmax"):
            torch.testing.assert_close(logits(loaded, tokens), expected, rtol=0, atol=1e-4)
            padded = logits(loaded, tokens, attention_mask=mask)[mask.bool()]
            torch.testing.assert_close(padded, expected_padded, rtol=0, atol=1e-4)
            cached = decoded(loaded, tokens, 6)
            torch.testing.assert_close(cached, expected, rtol=0, atol=1e-3)
    assert not list((tmp_path / "delta").glob("model*.safetensors"))
    assert sum(f.stat().st_size for f in (tmp_path / "delta").iterdir()) < 60_000

    revert(loaded)
    assert type(loaded) is type(donor)
    assert torch.equal(logits(loaded, tokens), expected)
    revert(model)
    assert type(model) is type(donor)
    assert model.config.model_type == family
    assert {**model.config.to_dict(), "architectures": None} == {**before, "architectures": None}
    assert model.config._attn_implementation == implementation
    assert not mixers_of(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any("equipoise" in name or name == "hybrid" for m in model.modules() for name in vars(m))
    assert torch.equal(logits(model, tokens), expected)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in donor.named_parameters()}


@pytest.mark.parametrize("family", SUPPORTED)
def test_generate(family: str) -> None:
    """Greedy decoding, its options, and the same without a cache."""
    model = hybridize(tiny_model(family), CONFIG)
    tokens, mask = random_tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    greedy = model.generate(tokens, **options)
    assert torch.equal(greedy, model.generate(tokens, **options, use_cache=False))
    assert torch.equal(greedy, model.generate(tokens, **options, prefill_chunk_size=4))
    assert torch.equal(greedy, model.generate(tokens, **options, past_key_values=model.make_cache()))
    alone = model.generate(tokens[:1, 5:], attention_mask=mask[:1, 5:], max_new_tokens=8, do_sample=False)
    assert torch.equal(greedy[0, 5:], alone[0])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generate_samples_and_beams(family: str) -> None:
    model = hybridize(tiny_model(family), DISJOINT)
    tokens, mask = random_tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "attention_mask": mask}
    samples = []
    for cached in (True, False):
        torch.manual_seed(3)
        samples.append(
            model.generate(tokens, **options, do_sample=True, num_return_sequences=3, use_cache=cached)
        )
        beams = model.generate(tokens, **options, do_sample=False, num_beams=3, use_cache=cached)
        samples.append(beams)
    assert samples[0].shape == (6, 20)
    assert torch.equal(samples[0], samples[2])
    assert torch.equal(samples[1], samples[3])
