"""`equipoise export`: the donor back bit by bit, LoRA merged, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from equipoise import HybridConfig, branches, hybridize, record_donor
from equipoise.cli import app
from equipoise.models.adapters import add_lora, has_adapters, save_adapter_checkpoint
from support import random_tokens, tiny_model, tiny_tokenizer

TOKENS = random_tokens(2, 20)
PROJECTIONS = {"gpt2": ["c_attn"]}
load = AutoModelForCausalLM.from_pretrained


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def logits(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model.to(dtype)(TOKENS).logits


def make(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, delta: bool = True
) -> tuple[Path, Path]:
    """A donor and a hybrid of it with adapters, on disk."""
    donor, hybrid = folder / "donor", folder / "hybrid"
    tiny_model(family, dtype=dtype, vocab_size=300).save_pretrained(donor)
    model = hybridize(load(donor, dtype=torch.float32), HybridConfig(window=5, gate="per_head"))
    record_donor(model, str(donor))
    tiny_tokenizer().save_pretrained(donor)
    with_lora(model, family)
    model.save_pretrained(hybrid, delta=delta)
    tiny_tokenizer().save_pretrained(hybrid)
    return donor, hybrid


def with_lora(model: Any, family: str = "llama") -> None:
    """Adapters that do something: peft's own start at nothing."""
    add_lora(model, rank=2, alpha=4.0, targets=PROJECTIONS.get(family, ["q_proj", "o_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize(
    ("family", "dtype", "delta"),
    [
        ("llama", torch.bfloat16, True),
        ("llama", torch.float32, False),
        ("gpt2", torch.float32, True),
        ("mixtral", torch.float32, False),
    ],
)
def test_softmax_gives_the_donor_back_bit_by_bit(
    tmp_path: Path, family: str, dtype: torch.dtype, delta: bool
) -> None:
    donor, hybrid = make(tmp_path, family, dtype=dtype, delta=delta)
    done = export(hybrid, "--softmax", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    mine, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "out", donor))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].dtype == dtype and torch.equal(mine[name], theirs[name]) for name in theirs)
    configs = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", donor)]
    assert configs[0] == configs[1]
    mine, theirs = ({p.name for p in place.iterdir()} for place in (tmp_path / "out", donor))
    assert mine - {"manifest.json"} == theirs
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(donor)))
    assert "LoRA dropped" in done.stdout


def test_softmax_with_lora_merged_is_the_softmax_state_with_lora(tmp_path: Path) -> None:
    donor, hybrid = make(tmp_path)
    done = export(hybrid, "--softmax", "--lora", "merge", "--output", tmp_path / "out", "--json")
    assert json.loads(done.stdout) == {
        "output": str(tmp_path / "out"), "model_type": "llama", "softmax": True, "lora": "merged",
        "parameters": sum(p.numel() for p in load(donor).parameters()), "dtype": "float32",
    }  # fmt: skip
    model = load(hybrid)
    with branches(model, "softmax_lora"):
        expected = logits(model)
    merged = load(tmp_path / "out")
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert (logits(merged) - expected).abs().max() < 1e-5
    assert (logits(load(donor)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("delta", [True, False])
def test_merged_hybrid_computes_the_same(tmp_path: Path, delta: bool) -> None:
    _, hybrid = make(tmp_path, delta=delta)
    done = export(hybrid, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    merged = load(tmp_path / "out")
    assert not has_adapters(merged)
    assert (logits(merged) - logits(load(hybrid))).abs().max() < 1e-4
    assert merged.config.equipoise["checkpoint"] == "full"
    assert merged.config.equipoise["merged"]
    # merged weights are no donor's, and say so; taken as they are they are the softmax model with LoRA
    refused = export(tmp_path / "out", "--softmax", "--output", tmp_path / "back")
    assert (refused.exit_code, "merged into the weights" in refused.stderr) == (2, True)
    assert not (tmp_path / "back").exists()
    assert (
        export(tmp_path / "out", "--softmax", "--lora", "merge", "--output", tmp_path / "back").exit_code == 0
    )
    assert load(tmp_path / "back").config.model_type == "llama"


def test_merging_in_bfloat16_rounds_once(tmp_path: Path) -> None:
    """The sum in float32, rounded: not what peft's own merging in bfloat16 gives."""
    donor, hybrid = make(tmp_path, dtype=torch.bfloat16)
    assert export(hybrid, "--softmax", "--lora", "merge", "--output", tmp_path / "out").exit_code == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    adapters = load_file(hybrid / "lora" / "adapter_model.safetensors")
    a, b = (next(t for n, t in adapters.items() if f"layers.0.self_attn.q_proj.lora_{k}" in n) for k in "AB")
    base = load_file(donor / "model.safetensors")[name].float()
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[name], (base + 2 * (b @ a)).bfloat16()
    )


def test_keeping_and_dropping_in_a_hybrid(tmp_path: Path) -> None:
    _, hybrid = make(tmp_path)
    for lora in ("keep", "drop"):
        done = export(hybrid, "--lora", lora, "--output", tmp_path / lora, "--dtype", "bfloat16")
        assert done.exit_code == 0, done.stderr
    kept, dropped = load(tmp_path / "keep"), load(tmp_path / "drop")
    assert (has_adapters(kept), has_adapters(dropped)) == (True, False)
    assert kept.dtype == torch.bfloat16
    assert kept.model.layers[0].self_attn.hybrid.phi_q.weight.dtype == torch.float32
    assert export(hybrid, "--lora", "keep", "--softmax", "--output", tmp_path / "x").exit_code == 2


def test_adapters_alone_are_merged_into_their_model(tmp_path: Path) -> None:
    """What recipe lora-only makes."""
    donor, _ = make(tmp_path)
    tuned = load(donor)
    with_lora(tuned)
    (tmp_path / "tuned").mkdir()
    save_adapter_checkpoint(tuned, tmp_path / "tuned", str(donor))
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    done = export(tmp_path / "tuned", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "LoRA merged" in done.stdout
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    # in float64: what rounding adds in the forward pass differs between processors
    merged, expected = (logits(model, torch.float64) for model in (load(tmp_path / "out"), tuned))
    assert (merged - expected).abs().max() < 1e-5


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    donor, hybrid = make(tmp_path)
    plain = export(donor, "--output", tmp_path / "out")
    assert (plain.exit_code, "got a plain llama" in plain.stderr) == (2, True)
    full = export(hybrid, "--output", donor)
    assert (full.exit_code, "not empty" in full.stderr) == (2, True)
    (hybrid / "tokenizer.json").unlink()
    (hybrid / "tokenizer_config.json").unlink()
    bare = export(hybrid, "--output", tmp_path / "out")
    assert (bare.exit_code, "no tokenizer found" in bare.stderr) == (1, True)
    assert not (tmp_path / "out").exists()
    for done in (plain, full, bare):
        assert "Traceback" not in done.stderr
