"""LoRA adapters inside a model: injected, switched, saved, merged. All of it is peft's work.

peft is imported where it is used: its own import loads transformers' Auto classes, which registers
equipoise's, which needs this module, while peft is not there yet.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from equipoise.files import write_atomically
from equipoise.models.storage import load_tensors

ADAPTER = "default"
FOLDER = "lora"
"""Sub-folder of a checkpoint: an adapter_config.json at the root would send the Auto classes to peft."""
WEIGHTS = "adapter_model.safetensors"


def adapter_layers(model: nn.Module) -> list[Any]:
    """The modules that carry an adapter (peft's BaseTunerLayer)."""
    if "peft" not in sys.modules:  # then nobody can have made one
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def add_lora(model: nn.Module, *, rank: int, alpha: float, targets: Iterable[str]) -> None:
    """Inject fresh LoRA adapters; everything else is frozen by it.

    Raises:
        ValueError: no module of the model has one of the names (peft's message lists them).
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    scaling: Any = alpha  # peft's annotation allows whole numbers only
    names = sorted(targets)
    transposed = any(
        isinstance(module, Conv1D) and f".{path}".endswith(tuple(f".{name}" for name in names))
        for path, module in model.named_modules()
    )  # GPT-2's linear layers keep their weights as [in, out]
    config = LoraConfig(r=rank, lora_alpha=scaling, target_modules=names, fan_in_fan_out=transposed)
    _inject(config, model)


def _inject(config: Any, model: nn.Module) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, ADAPTER)
    for layer in adapter_layers(model):
        for name, parameter in layer.named_parameters():  # pyright: ignore
            if "lora_" in name:  # float32 masters under whatever the donor is held in
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _config_of(model: Any) -> Any:
    return model.peft_config[ADAPTER]


def has_adapters(model: nn.Module) -> bool:
    """Whether the model carries adapters that are not merged."""
    return bool(adapter_layers(model))


@contextmanager
def adapters_disabled(model: nn.Module) -> Generator[None]:
    """The model without its adapters, for the time of the block."""
    layers = [layer for layer in adapter_layers(model) if not layer.disable_adapters]
    # peft's switch also rewrites requires_grad; what was frozen must stay so
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]  # pyright: ignore
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, before in trainable:
            parameter.requires_grad_(before)


def save_lora(model: nn.Module, directory: Path) -> None:
    """Write the adapters as peft does (adapter_config.json and safetensors)."""
    directory.mkdir(parents=True, exist_ok=True)
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    write_atomically(directory / WEIGHTS, lambda path: save_file(weights, path))
    _config_of(model).save_pretrained(str(directory))


def load_lora(model: nn.Module, directory: Path) -> None:
    """Inject the adapters that `save_lora` wrote.

    Raises:
        CheckpointError: the file is damaged.
        ValueError: the file's weights are not those of these adapters.
    """
    weights = load_tensors(directory / WEIGHTS)
    from peft import LoraConfig, set_peft_model_state_dict

    config: Any = LoraConfig.from_pretrained(str(directory))
    _inject(config, model)
    result = set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    missing = [name for name in result.missing_keys if "lora_" in name]
    odd = missing + list(result.unexpected_keys)
    if odd:
        raise ValueError(
            f"{directory}: the adapters do not fit the model: {len(missing)} weights missing, "
            f"{len(result.unexpected_keys)} unexpected (first: {odd[0]})."
        )
    for layer in adapter_layers(model):
        layer.requires_grad_(False)  # pyright: ignore


def unload_lora(model: nn.Module, *, merge: bool) -> None:
    """Take the adapters out, folding them into the weights first if asked."""
    carriers = {id(layer) for layer in adapter_layers(model)}
    for name, module in [(n, m) for n, m in model.named_modules() if id(m) in carriers]:
        layer: Any = module
        if merge:
            _merge(layer)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers put them in, and would save them
        model._hf_peft_config_loaded = False  # pyright: ignore


def _merge(layer: Any) -> None:
    """Sum in float32 and round once, whatever the weights are held in; peft sums in their own dtype."""
    base: nn.Module = layer.get_base_layer()
    dtype: torch.dtype = base.weight.dtype  # pyright: ignore
    base.to(torch.promote_types(dtype, torch.float32))
    layer.merge(safe_merge=True)
    base.to(dtype)


def base_state_dict(model: nn.Module, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's weights (or those given, gathered elsewhere) under their own names, without adapters."""
    weights = model.state_dict() if weights is None else weights
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if ".lora_" not in name
    }


def save_adapter_checkpoint(model: nn.Module, directory: Path, donor: str) -> None:
    """Write the adapters of an unconverted model as a peft checkpoint, which transformers loads by itself."""
    config = _config_of(model)
    config.base_model_name_or_path = str(Path(donor).resolve()) if Path(donor).is_dir() else donor
    config.task_type = "CAUSAL_LM"
    save_lora(model, directory)
