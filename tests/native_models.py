"""A tiny random model of every hybrid that ships with transformers. Imports no equipoise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    # larger than usual: mixers that hardly matter would hide mistakes
    "initializer_range": 0.3,
}  # fmt: skip
_SSM = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
_MOE = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_routed_experts": 4,
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
_TWICE = ["linear_attention", "full_attention"] * 2
_LATENT = {
    **_MOE, "layer_types": _TWICE, "mlp_layer_types": ["dense"] * 4, "num_key_value_heads": 4,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 12,
}  # fmt: skip
_ZAMBA = {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_expand": 2}

_SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_LATENT, "q_lora_rank": 8},
    "bamba": {**_SSM, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_SSM, "mamba_d_ssm": 64, "num_hidden_layers": 2},
    "granitemoehybrid": {
        **_SSM, **_MOE, "layer_types": _TWICE, "shared_intermediate_size": 16,
        "position_embedding_type": "rope",
    },
    "jamba": {**_MOE, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_LATENT, "q_lora_rank": None, "linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {**_MOE, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "minimax": {**_MOE, "layer_types": _TWICE, "block_size": 16},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
    },
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "qwen3_5_moe_text": {**_DELTA, **_MOE},
    "qwen3_5_text": _DELTA,
    "qwen3_next": {**_DELTA, **_MOE},
    "recurrent_gemma": {
        "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
        "w_init_variance_scale": 0.3,
    },
    "zamba": {
        **_ZAMBA, "mamba_d_state": 8, "n_mamba_heads": 2, "mamba_dt_rank": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "num_hidden_layers": 6,
    },
    "zamba2": {
        **_ZAMBA, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1,
        "chunk_size": 16, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
}  # fmt: skip

NATIVE: tuple[str, ...] = tuple(_SETTINGS)

HOLDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_SETTINGS, ("l", "a", "l", "a")),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), ("l", "l", "l", "a")),
    "falcon_h1": ("al", "al"),
    "nemotron_h": ("l", "a", "", "l"),
    "zamba": ("l", "l", "al", "l", "al", "l"),
    "zamba2": ("l", "al", "l", "al"),
}
"""The mixers in each layer of the tiny models: attention, linear."""

PROJECTIONS = ("o_proj", "out_proj", "linear_out")
"""What the last linear map of a mixer is called."""


def native_model(model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
    """In float32 and evaluation mode, ~20k parameters; every parameter random, so that nothing is inert."""
    wanted = {**_SIZES, **_SETTINGS[model_type], **overrides}
    known = AutoConfig.for_model(model_type).to_dict().keys()
    own = _SETTINGS[model_type].keys() | overrides.keys()
    config = AutoConfig.for_model(model_type, **{k: v for k, v in wanted.items() if k in known or k in own})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float().eval()


def output_projection(mixer: Any) -> Any:
    """The last linear map of a mixer."""
    return next(getattr(mixer, name) for name in PROJECTIONS if hasattr(mixer, name))


def silence(mixer: Any) -> None:
    """Make a mixer put out zeros, by its output projection; layers tied to it keep theirs."""
    projection = output_projection(mixer)
    for name, _ in list(projection.named_parameters()):
        setattr(projection, name, torch.nn.Parameter(torch.zeros_like(getattr(projection, name))))


@torch.no_grad()
def own_text(model: Any, *, documents: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [documents, length] drawn from the model itself: no other model predicts them better."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (documents, 1), generator=generator)
    while ids.shape[1] < length:
        chances = model(ids, use_cache=False).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return ids
