"""Models in other forms: hybrids with their LoRA merged, and the donor's own architecture back."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from equipoise.models.adapters import has_adapters, unload_lora
from equipoise.models.auto import merge_adapters
from equipoise.models.families import ConversionError
from equipoise.models.load import adapters_base, load_config, load_model, load_tokenizer
from equipoise.models.storage import resolve_donor
from equipoise.models.surgery import revert
from equipoise.train.outputs import RUN, staged

Lora = Literal["merge", "drop", "keep"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        model_type: transformers' name of the architecture.
        softmax: whether it is the donor's architecture again.
        lora: what became of the adapters: merged, dropped, kept, or none where there were none.
        parameters: of the model, adapters that were kept apart included.
        dtype: the weights'; feature maps and gates stay float32.
    """

    model_type: str
    softmax: bool
    lora: Literal["merged", "dropped", "kept", "none"]
    parameters: int
    dtype: str


def export(
    source: str,
    output: Path,
    *,
    softmax: bool = False,
    lora: Lora | None = None,
    dtype: torch.dtype | None = None,
) -> Exported:
    """Write a converted model in another form, all of its weights included, to a directory that is ready.

    Args:
        source: a model that equipoise made: a hybrid, or the donor with LoRA (recipe ``lora-only``).
        output: see `equipoise.train.outputs.claimed`.
        softmax: give the donor's architecture back.
        lora: merge the adapters into the weights, drop them, or keep them apart (hybrids only). None drops
            them with ``softmax``, which gives the donor back bit by bit, and merges them without.
        dtype: of the weights; None for the one they are stored in, for a delta the donor's.

    Raises:
        CheckpointError: not a model, or the donor of a delta is missing.
        ConversionError: not a model of equipoise's, or its adapters were merged before and cannot be dropped.
    """
    lora = lora or ("drop" if softmax else "merge")
    described = check(source, softmax=softmax, lora=lora)
    tokenizer = load_tokenizer(source)
    # Not on a GPU: everything here is reading, adding and writing.
    model = load_model(source, device="cpu", dtype=dtype or stored_dtype(source))
    had_adapters = has_adapters(model)
    _settle_adapters(model, lora)
    if described and softmax:
        model.config.equipoise = dict(described, merged=False)
        revert(model)
    with staged(output) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if hasattr(model, "make_cache") and (Path(source) / RUN).is_file():
            shutil.copyfile(Path(source) / RUN, staging / RUN)  # a hybrid's audit wants to know
    done: dict[Lora, Any] = {"merge": "merged", "drop": "dropped", "keep": "kept"}
    return Exported(
        model_type=model.config.model_type,
        softmax=not hasattr(model, "make_cache"),
        lora=done[lora] if had_adapters else "none",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def check(source: str, *, softmax: bool, lora: Lora) -> dict[str, Any]:
    """What the configuration says of the conversion, once the export is known to make sense.

    Raises:
        CheckpointError, ConversionError: as `export`.
    """
    config = load_config(source)
    described: dict[str, Any] = getattr(config, "equipoise", None) or {}
    adapted = adapters_base(source) is not None
    if not described and not adapted:
        raise ConversionError(
            f"{source}: expected a model that equipoise converted, got a plain {config.model_type}; there is "
            "nothing to export from it."
        )
    if lora == "keep" and (softmax or adapted):
        raise ConversionError(
            "adapters are kept apart in hybrids only: choose whether the softmax model has them merged "
            "(--lora merge) or dropped (--lora drop)."
        )
    if lora == "drop" and described.get("merged"):
        raise ConversionError(
            f"{source}: its adapters were merged into the weights, so the donor's are gone: export from the "
            "checkpoint it was merged from, or take the merged weights (--lora merge)."
        )
    return described


def _settle_adapters(model: PreTrainedModel, lora: Lora) -> None:
    if lora == "keep" or not has_adapters(model):
        return
    if lora == "merge" and hasattr(model, "make_cache"):
        merge_adapters(model)
    else:
        unload_lora(model, merge=lora == "merge")


def stored_dtype(source: str) -> torch.dtype:
    """The dtype that a model's weights are stored in; a delta has its donor's.

    Raises:
        CheckpointError: the donor of a delta is missing.
    """
    config, place = load_config(source), source
    described: dict[str, Any] = getattr(config, "equipoise", None) or {}
    if described.get("checkpoint") == "delta":
        place, _ = resolve_donor(source, described.get("donor"))
        config = load_config(place)
    if config.dtype is not None:
        return config.dtype
    files = sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
    for file in files:
        with safe_open(str(file), framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                return weights.get_tensor(name).dtype
    return torch.float32
