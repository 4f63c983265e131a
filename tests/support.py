"""Tiny models, tokenizers and tensors that several test suites build on. Imports no equipoise."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

F64 = torch.float64

# ---- models

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    # larger than usual: attention that is all but uniform would hide mistakes
    "initializer_range": 0.3,
}  # fmt: skip
_LOCAL_AND_GLOBAL = {"num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    # grouped_mm has no float64
    "mixtral": {
        "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2,
        "experts_implementation": "eager",
    },
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        **_LOCAL_AND_GLOBAL, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma3_text": {
        **_LOCAL_AND_GLOBAL, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {},
    "gpt_neox": {"num_key_value_heads": None},  # as many as query heads, as in gpt2
    "gpt_oss": {
        "num_hidden_layers": 3, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "experts_implementation": "eager",
    },
    "gpt2": {
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "n_inner": 48, "num_key_value_heads": None,
    },
    "cohere2": {
        "num_hidden_layers": 3, "sliding_window": 6, "logit_scale": 1.0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "glm4": {},
    "starcoder2": {},
    "stablelm": {"qk_layernorm": True},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "experts_implementation": "eager",
    },
    # the second layer has no rotary embedding
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo3": {
        "num_hidden_layers": 3, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma": {},
    "phi": {"qk_layernorm": True},
}  # fmt: skip
"""What a tiny donor of each supported family needs beside the common sizes."""


def tiny_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """A random causal language model of a family, ~20k parameters, in evaluation mode.

    Two layers, 4 query and 2 key/value heads of 8 (Gemma: three layers, the first one local with window 6).
    """
    settings = {**_SIZES, **FAMILIES.get(model_type, {}), **overrides}
    experts = settings.pop("experts_implementation", None)
    config = AutoConfig.for_model(model_type, **settings)
    if experts is not None and dtype is F64:
        config._experts_implementation = experts
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens, trained on the spot; no chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["def window(size):\n    return size", "the quick brown fox jumps"] * 4, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


SINGLE_HEADS: dict[str, Any] = {
    "window": 5, "head_windows": (5, 2), "sinks": 2, "linear_heads": (1, 3), "gate": "per_token",
    "write_gate": "per_token", "feature_map": "unit", "feature_multiple": 1, "state_update": "delta",
    "rotary": "undone",
}  # fmt: skip
"""What the recipe `equipoise` makes of a layer with 4 query and 2 key/value heads."""


def load_tool(name: str) -> Any:
    """A script of tools/, as a module."""
    path = Path(__file__).parents[1] / "tools" / f"{name}.py"
    described = importlib.util.spec_from_file_location(name, path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # dataclasses look it up there
    described.loader.exec_module(module)
    return module


def random_tokens(*shape: int, seed: int = 0, vocab: int = 64) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- tensors


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Standard normal numbers that depend on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def attention_inputs(
    length: int, *, batch: int = 2, heads: int = 4, kv: int = 2, size: int = 6, value: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, D], k [B, N, T, D], v [B, N, T, E] in float64."""
    return (
        normal(batch, heads, length, size, seed=3 * seed),
        normal(batch, kv, length, size, seed=3 * seed + 1),
        normal(batch, kv, length, value, seed=3 * seed + 2),
    )


class PositiveMap(torch.nn.Module):
    """phi(x) = exp(x W), W per head; heads of the input are shared by consecutive maps."""

    def __init__(self, maps: int, size: int = 6, features: int = 7, seed: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(normal(maps, size, features, seed=seed + 100) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        repeats = self.weight.shape[0] // x.shape[1]
        return (x.repeat_interleave(repeats, 1) @ self.weight.to(x.dtype)).exp()


def masks_by_name(length: int) -> dict[str, dict[str, Tensor]]:
    """What operators are asked under: nothing, padding on either side, packed rows, and both; two rows."""
    left, right, packed = padding_mask("left", length), padding_mask("right", length), segments_of(length)
    assert left is not None
    assert right is not None
    return {
        "plain": {},
        "left": {"key_mask": left},
        "right": {"key_mask": right},
        "packed": {"segment_ids": packed},
        "both": {"key_mask": left, "segment_ids": packed},
    }


def padding_mask(kind: str, length: int, *, batch: int = 2, seed: int = 0) -> Tensor | None:
    """``none``, ``left`` (first row), ``right`` (second row) or ``holes`` (anywhere)."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    pad = max(1, length // 3)
    if kind == "left":
        mask[0, :pad] = False
    elif kind == "right":
        mask[-1, length - pad :] = False
    else:
        mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    return mask


def segments_of(length: int, *, batch: int = 2, share: float = 0.12, seed: int = 0) -> Tensor:
    """Segment ids that change at random places."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < share).long().cumsum(1)
