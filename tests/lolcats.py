"""LoLCATs checkpoints as its code writes them, and a float64 evaluation of its published equations.

Written from arXiv 2410.10254; shares nothing with equipoise. Shapes: H query heads, N key/value heads,
T tokens, D head_dim, F columns of a map's W, r LoRA rank, V vocabulary.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from support import normal

H, N, D, F, LAYERS, RANK, WINDOW = 4, 2, 8, 4, 2, 3, 6
HIDDEN = 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
State = dict[str, Tensor]


# ---- checkpoints as LoLCATs writes them


def distilled(*, layers: int = LAYERS, heads: int = H, size: int = D, columns: int = F) -> State:
    """Feature maps and window factors, as the distillation checkpoint holds them."""
    state: State = {}
    for i in range(layers):
        place = f"model.layers.{i}.self_attn"
        for role, seed in (("q", 1), ("k", 2)):
            weight = normal(heads, size, columns, seed=10 * i + seed, dtype=torch.float32)
            state[f"{place}.feature_map_{role}.mlp.layer"] = weight
        state[f"{place}.window_factors"] = normal(1, heads, 1, 1, seed=10 * i + 3, dtype=torch.float32) - 1
    return state


def tuned(*, layers: int = LAYERS, rank: int = RANK, targets: tuple[str, ...] = PROJECTIONS) -> State:
    """LoRA weights, as the fine-tuning checkpoint holds them."""
    state: State = {}
    sizes = {"q_proj": H * D, "k_proj": N * D, "v_proj": N * D, "o_proj": HIDDEN}
    for i, (p, target) in itertools.product(range(layers), enumerate(targets)):
        place = f"base_model.model.model.layers.{i}.self_attn.{target}"
        size = H * D if target == "o_proj" else HIDDEN
        seed = 100 + 20 * i + 2 * p
        state[f"{place}.lora_A.default.weight"] = normal(rank, size, seed=seed, dtype=torch.float32) * 0.2
        state[f"{place}.lora_B.default.weight"] = (
            normal(sizes[target], rank, seed=seed + 1, dtype=torch.float32) * 0.2
        )
    return state


def written(path: Path, state: State, **beside: object) -> Path:
    torch.save({"model_state_dict": state, "step": 7, "eval/loss": 1.5, **beside}, path)
    return path


class Attack:
    """Writes a file when a pickle of it is loaded by a careless reader."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


class Rotary(torch.nn.Module):
    """Angles of base 10000 in float64."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None] * 10000.0 ** (-torch.arange(0, D, 2).double() / D)
        return angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)


def exact(place: Path) -> Any:
    """A model in float64 throughout: transformers takes a Llama's norms and angles in float32 even then."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(HIDDEN, eps=1e-6, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    model.model.rotary_emb = Rotary()
    return model


# ---- the published equations, from arXiv 2410.10254 and nothing of equipoise


def window_of(length: int, layout: str) -> Tensor:
    """Which keys the softmax sees [T, T]."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    near = i // WINDOW - j // WINDOW <= 1 if layout == "terraced" else i - j < WINDOW
    return near & (j <= i)


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """[H, T, D] -> [H, T, 2 F]."""
    projected = torch.einsum("hdf,hld->hlf", weight, x)
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1).clamp(min=1e-12)


def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, state: State, place: str, near: Tensor, far: Tensor, affine: bool
) -> Tensor:
    """[H, T, D] each, after rotary embedding and with keys and values repeated to H heads."""
    gamma = torch.sigmoid(state[f"{place}.window_factors"].double())[0]
    scores = torch.einsum("hmd,hnd->hmn", q, k) * D**-0.5
    scores = scores.masked_fill(~near, -1e8)
    soft = gamma * torch.exp(scores - scores.amax(-1, keepdim=True))
    features = [
        hedgehog(x, state[f"{place}.feature_map_{role}.mlp.layer"].double())
        for x, role in ((q, "q"), (k, "k"))
    ]
    linear = torch.einsum("hmf,hnf->hmn", *features).masked_fill(~far, 0)
    weights = soft + (1 - gamma if affine else 1.0) * linear
    return weights @ v / weights.sum(-1, keepdim=True)


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of [H, T, D], base 10000, halves paired."""
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, D, 2).double() / D)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def evaluated(
    donor: State,
    tokens: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    *,
    lora: State | None = None,
    scaling: float = 2.0,
) -> Tensor:
    """Logits [T, V] of a Llama, written out: donor weights, LoRA as W + alpha / r B A, attention as given."""
    donor = {name: tensor.double() for name, tensor in donor.items()}

    def project(x: Tensor, i: int, name: str) -> Tensor:
        weight = donor[f"model.layers.{i}.self_attn.{name}.weight"]
        place = f"base_model.model.model.layers.{i}.self_attn.{name}.lora"
        if lora is not None and f"{place}_A.default.weight" in lora:
            down, up = (lora[f"{place}_{role}.default.weight"].double() for role in "AB")
            weight = weight + scaling * up @ down
        return x @ weight.T

    def heads(x: Tensor) -> Tensor:
        return x.view(len(tokens), -1, D).transpose(0, 1)

    x = donor["model.embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        y = normed(x, donor[f"{layer}.input_layernorm.weight"])
        q, k, v = (heads(project(y, i, name)) for name in PROJECTIONS[:3])
        q, k = rotated(q), rotated(k)
        k, v = k.repeat_interleave(H // N, 0), v.repeat_interleave(H // N, 0)
        out = attend(q, k, v, i).transpose(0, 1).reshape(len(tokens), H * D)
        x = x + project(out, i, "o_proj")
        y = normed(x, donor[f"{layer}.post_attention_layernorm.weight"])
        gate, up, down = (donor[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return normed(x, donor["model.norm.weight"]) @ donor["lm_head.weight"].T


def published(
    donor: State, tokens: Tensor, state: State, *, layout: str, affine: bool, **adapters: Any
) -> Tensor:
    """Logits [T, V] of LoLCATs' model."""
    near = window_of(len(tokens), layout)
    far = torch.ones_like(near).tril() & ~near

    def attend(q: Tensor, k: Tensor, v: Tensor, i: int) -> Tensor:
        return hybrid_attention(q, k, v, state, f"model.layers.{i}.self_attn", near, far, affine)

    return evaluated(donor, tokens, attend, **adapters)


def weights_of(donor: Path) -> State:
    return AutoModelForCausalLM.from_pretrained(donor).state_dict()


def published_code_masks(length: int) -> tuple[Tensor, Tensor]:
    """(window, linear) [T, T] of LoLCATs' get_masks: blocks from the end, and one block counted twice."""
    i, j = (torch.arange(length) + (-length) % WINDOW for _ in range(2))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if length <= WINDOW:  # the block beside the only one is itself
        return causal, causal
    near = (i[:, None] // WINDOW - j[None] // WINDOW <= 1) & causal
    return near, causal & ~near
