"""LoLCATs checkpoints (arXiv 2410.10254): checked against a donor and made a hybrid of it.

Shapes: H query heads, D head_dim, F columns of a feature map's W (it yields 2 F features, both signs),
r LoRA rank.

A checkpoint says nothing of its window, layout, activation or LoRA alpha; those are arguments, and are never
guessed from a file's name. Only the donor's configuration is needed, so its weights are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from equipoise.config import HybridConfig, Settings
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.models import adapters, storage
from equipoise.models.auto import record_donor
from equipoise.models.families import ConversionError
from equipoise.models.load import ADAPTERS, load_config
from equipoise.models.lolcats_files import LolcatsWeights, read_weights, some
from equipoise.models.storage import CheckpointError
from equipoise.models.surgery import hybridize

DONORS = ("llama", "mistral")
"""The model types that LoLCATs' code converts."""

OTHER_FORMULAS = {
    "exp": "exp_dim takes the maximum off each sign by itself, equipoise's exp off both signs together",
    "elu": "pos_elu has one sign, equipoise's elu has both",
    "relu": "relu has one bias a head and a floor of 1e-12, equipoise's relu a bias a feature and no floor",
    "none": "there is no map without an activation",
}
"""Maps here that are not LoLCATs' map of the like name, and what LoLCATs' one does."""

INITIAL_GAMMA = 0.1
"""Where LoLCATs starts window factors (init_window_factor -2.197); recorded, all heads are overwritten."""


class LolcatsOptions(Settings):
    """What the shapes of a checkpoint cannot say."""

    window: int = Field(default=64, ge=1)
    """w, the number of tokens of a window (sliding) or block (terraced)."""
    layout: Literal["sliding", "terraced"] = "terraced"
    """terraced is LoLCATs' window_tk, sliding its window_sw."""
    feature_map: str = "hedgehog"
    """The activation; hedgehog is LoLCATs' softmax_dim with both signs (fullspace)."""
    affine: bool = False
    """Whether linear weights are scaled by 1 - gamma (affine_attention_factors)."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha; null for twice the rank, as in LoLCATs' configurations (16 at rank 8, 8 at rank 4)."""
    allow_partial: bool = False
    """Leave layers that the files do not cover with softmax attention."""

    @field_validator("feature_map")
    @classmethod
    def _same_formula(cls, name: str) -> str:
        FEATURE_MAPS[name]
        if name in OTHER_FORMULAS:
            raise ValueError(
                f"would not give the checkpoint's outputs: in LoLCATs' code {OTHER_FORMULAS[name]}; only "
                "hedgehog is the same formula in both"
            )
        return name


@dataclass(frozen=True)
class LolcatsImport:
    """What was imported, as the output's run.json records it.

    Attributes:
        hybrid: settings of the converted layers.
        layers: the converted ones.
        softmax_layers: those left as they were.
        heads, head_dim, columns: H, D, F.
        gamma: smallest, mean and largest window weight over layers and heads.
        lora: rank, alpha, whether alpha was assumed, and targets; None without adapters.
        files, replaced: as in `LolcatsWeights`.
    """

    hybrid: HybridConfig
    layers: tuple[int, ...]
    softmax_layers: tuple[int, ...]
    heads: int
    head_dim: int
    columns: int
    gamma: tuple[float, float, float]
    lora: dict[str, Any] | None
    files: tuple[dict[str, Any], ...]
    replaced: int


def import_lolcats(
    files: Sequence[Path], donor: str, options: LolcatsOptions | None = None
) -> tuple[PreTrainedModel, LolcatsImport]:
    """Make a hybrid of a donor from the files of a LoLCATs checkpoint.

    Args:
        files: state dicts as .pt or safetensors: feature maps and window factors, and LoRA where there is
            any; where two hold the same tensor the later one counts, as in LoLCATs' own loader.
        donor: directory or Hub name of the model they were trained on. Shapes are checked; whether it is
            that very model cannot be.
        options: what the files cannot say.

    Returns:
        A model to be saved with ``save_pretrained(directory, delta=True)``, and what was imported. The
        donor's weights are on the meta device; load the saved directory to run it.

    Raises:
        CheckpointError: a file or donor that cannot be read, or does not fit; nothing in it is executed.
        ConversionError: a donor that LoLCATs does not convert, or a window it cannot have.
        ConfigError, UnknownNameError: options that cannot be used.
    """
    options = options or LolcatsOptions()
    model = _empty_donor(donor)
    text: Any = model.config
    weights = read_weights(files)
    heads, head_dim, columns = _check_maps(weights, text, donor)
    layers = _check_layers(weights, int(text.num_hidden_layers), options)
    hybrid = HybridConfig(
        window=options.window,
        layout=options.layout,
        mixing="shared-affine" if options.affine else "shared",
        gate="per_head",
        gate_value=INITIAL_GAMMA,
        overlap=False,
        feature_map=options.feature_map,
        feature_multiple=_multiple(options.feature_map, columns, head_dim),  # pyright: ignore[reportArgumentType]
        layers="all" if len(layers) == text.num_hidden_layers else layers,
    )
    rank = _check_lora(weights, model)
    hybridize(model, hybrid)
    record_donor(model, donor)
    storage.load_generation_config(model, donor, {})
    lora = None
    if rank is not None:
        alpha = 2.0 * rank if options.lora_alpha is None else options.lora_alpha
        adapters.add_lora(model, rank=rank, alpha=alpha, targets=weights.lora)
        assumed = options.lora_alpha is None
        lora = {"rank": rank, "alpha": alpha, "alpha_assumed": assumed, "targets": sorted(weights.lora)}
    _fill(model, weights)
    gammas = torch.cat([weights.factors[i].flatten() for i in layers]).double().sigmoid()
    return model, LolcatsImport(
        hybrid=hybrid, layers=layers,
        softmax_layers=tuple(i for i in range(int(text.num_hidden_layers)) if i not in layers),
        heads=heads, head_dim=head_dim, columns=columns,
        gamma=(gammas.min().item(), gammas.mean().item(), gammas.max().item()),
        lora=lora, files=weights.files, replaced=weights.replaced,
    )  # fmt: skip


def _empty_donor(donor: str) -> PreTrainedModel:
    """The donor's modules without its weights: an import adds to them and reads none."""
    if (Path(donor) / ADAPTERS).is_file():
        raise CheckpointError(f"{donor}: expected the whole model LoLCATs started from, got adapters of one.")
    config = load_config(donor)
    kind = str(config.model_type)
    if kind not in DONORS:
        raise ConversionError(
            f"{donor}: expected a donor of a type that LoLCATs converts ({', '.join(DONORS)}), got {kind}. "
            "Give the model the checkpoint was trained on."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _check_maps(weights: LolcatsWeights, config: Any, donor: str) -> tuple[int, int, int]:
    """(H, D, F), the same in all layers and the donor's."""
    layers = sorted(weights.maps.keys() | weights.factors.keys())
    if not layers:
        raise CheckpointError(
            "the files hold no feature maps. LoLCATs saves them apart from LoRA: give its distillation "
            "checkpoint as well."
        )
    missing = [
        f"layers.{i}.self_attn.{name}"
        for i in layers
        for name, there in (
            ("feature_map_q.mlp.layer", "q" in weights.maps.get(i, {})),
            ("feature_map_k.mlp.layer", "k" in weights.maps.get(i, {})),
            ("window_factors", i in weights.factors),
        )
        if not there
    ]
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights are missing of layers that have others: {some(missing)}. An import "
            "needs both maps and window factors of each layer."
        )
    first = tuple(weights.maps[layers[0]]["q"].shape)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if len(first) != 3 or first[:2] != (heads, head_dim):
        raise CheckpointError(
            f"layers.{layers[0]}: expected feature maps [H, D, F] with H = {heads} heads of D = {head_dim}, "
            f"as {donor} has, got {list(first)}. The checkpoint belongs to another donor."
        )
    for i in layers:
        for name, tensor, shape in (
            ("feature_map_q", weights.maps[i]["q"], first),
            ("feature_map_k", weights.maps[i]["k"], first),
            ("window_factors", weights.factors[i], (1, heads, 1, 1)),
        ):
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"layers.{i}.self_attn.{name}: expected {list(shape)}, got {list(tensor.shape)}; all "
                    "layers need the same shapes."
                )
    return heads, head_dim, first[2]


def _check_layers(weights: LolcatsWeights, count: int, options: LolcatsOptions) -> tuple[int, ...]:
    layers = tuple(sorted(weights.maps))
    beyond = [i for i in layers if i >= count]
    if beyond:
        raise CheckpointError(
            f"the files have feature maps for layers {some(beyond)}, but the donor has {count} layers. The "
            "checkpoint belongs to another donor."
        )
    absent = [i for i in range(count) if i not in layers]
    if absent and not options.allow_partial:
        raise CheckpointError(
            f"the files have no feature maps for {len(absent)} of {count} layers: {some(absent)}. Give the "
            "missing files, or say --allow-partial to leave these layers with softmax attention."
        )
    return layers


def _multiple(feature_map: str, columns: int, head_dim: int) -> int:
    """The feature dimension in multiples of D."""
    features = columns * (2 if FEATURE_MAPS[feature_map].two_sided else 1)
    if features not in (head_dim, 2 * head_dim, 4 * head_dim):
        raise CheckpointError(
            f"feature maps of {columns} columns give {features} features; equipoise has maps of {head_dim}, "
            f"{2 * head_dim} and {4 * head_dim} features for heads of {head_dim}."
        )
    return features // head_dim


def _check_lora(weights: LolcatsWeights, model: PreTrainedModel) -> int | None:
    """The adapters' rank, one for all; None without adapters."""
    ranks: dict[int, str] = {}
    every = set(range(int(model.config.num_hidden_layers)))
    for path, by_layer in weights.lora.items():
        if set(by_layer) != every:
            wrong = sorted(set(by_layer) ^ every)
            raise CheckpointError(
                f"LoRA on {path}: expected it in each of the donor's {len(every)} layers, but layers "
                f"{some(wrong)} differ. A file is missing, or the checkpoint belongs to another donor."
            )
        for i, pair in sorted(by_layer.items()):
            name = f"layers.{i}.{path}"
            if set(pair) != {"A", "B"}:
                raise CheckpointError(
                    f"{name}: expected lora_A and lora_B, got lora_{next(iter(pair))} only."
                )
            try:
                module: Any = model.get_submodule(f"model.{name}")
                out, size = module.weight.shape
            except (AttributeError, ValueError):
                raise CheckpointError(f"{name}: has LoRA, but is no linear module of the donor.") from None
            down, up = tuple(pair["A"].shape), tuple(pair["B"].shape)
            if len(down) != 2 or down[1] != size or up != (out, down[0]):
                raise CheckpointError(
                    f"{name}: expected lora_A [r, {size}] and lora_B [{out}, r], got {list(down)} and "
                    f"{list(up)}. The checkpoint belongs to another donor."
                )
            ranks.setdefault(down[0], name)
    if len(ranks) > 1:
        listed = ", ".join(f"{rank} ({name})" for rank, name in sorted(ranks.items()))
        raise CheckpointError(f"expected LoRA of one rank, got {listed}.")
    return next(iter(ranks), None)


def _fill(model: PreTrainedModel, weights: LolcatsWeights) -> None:
    """Put the checkpoint's tensors into the empty mixers and adapters, exact in float32 or wider."""
    tensors: dict[str, Tensor] = {}
    for i, pair in weights.maps.items():
        for role, tensor in pair.items():
            tensors[f"model.layers.{i}.self_attn.hybrid.phi_{role}.weight"] = tensor
        tensors[f"model.layers.{i}.self_attn.hybrid.gate_logit"] = weights.factors[i].reshape(-1, 1)
    for path, by_layer in weights.lora.items():
        for i, pair in by_layer.items():
            for role, tensor in pair.items():
                tensors[f"model.layers.{i}.{path}.lora_{role}.default.weight"] = tensor
    wide = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in tensors.items()}
    result = model.load_state_dict(wide, strict=False, assign=True)
    left = [name for name in result.missing_keys if ".hybrid." in name or ".lora_" in name]
    odd = left + list(result.unexpected_keys)
    if odd:  # a map registered elsewhere may have parameters of its own
        raise CheckpointError(
            f"the converted layers have weights that a LoLCATs checkpoint does not: {some(odd)}."
        )
