"""LoRA adapters inside a model: injected, switched, saved, merged. All of it is peft's work."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

ADAPTER = "default"
FOLDER = "lora"
"""Sub-folder of a checkpoint: an adapter_config.json at the root would send transformers' Auto classes to peft."""
WEIGHTS = "adapter_model.safetensors"


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The modules that carry an adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def add_lora(model: nn.Module, *, rank: int, alpha: float, targets: Iterable[str]) -> None:
    """Inject fresh LoRA adapters; everything else is frozen by it.

    Raises:
        ValueError: no module of the model has one of the names (peft's message lists them).
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets))  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, model, ADAPTER)
    for layer in adapter_layers(model):
        for name, parameter in layer.named_parameters():  # pyright: ignore
            if "lora_" in name:  # float32 masters under whatever the donor is held in
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


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
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
    config = model.peft_config[ADAPTER]  # pyright: ignore[reportIndexIssue]
    config.save_pretrained(str(directory))


def load_lora(model: nn.Module, directory: Path) -> None:
    """Inject the adapters that `save_lora` wrote.

    Raises:
        ValueError: the file's weights are not those of these adapters.
    """
    config = LoraConfig.from_pretrained(str(directory))
    inject_adapter_in_model(config, model, ADAPTER)
    result = set_peft_model_state_dict(model, load_file(directory / WEIGHTS), adapter_name=ADAPTER)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{directory}: the adapters do not fit the model: {len(missing)} weights missing, "
            f"{len(result.unexpected_keys)} unexpected (first: {(missing + list(result.unexpected_keys))[0]})."
        )
    for layer in adapter_layers(model):
        layer.requires_grad_(False)  # pyright: ignore


def unload_lora(model: nn.Module, *, merge: bool) -> None:
    """Take the adapters out, folding them into the weights first if asked."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if merge:
            module.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def base_state_dict(model: nn.Module) -> dict[str, object]:
    """The model's weights under their own names, without adapters."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def save_adapter_checkpoint(model: nn.Module, directory: Path, donor: str) -> None:
    """Write the adapters of an unconverted model as a peft checkpoint, which transformers loads on its own."""
    config = model.peft_config[ADAPTER]  # pyright: ignore[reportIndexIssue]
    config.base_model_name_or_path = str(Path(donor).resolve()) if Path(donor).is_dir() else donor
    config.task_type = "CAUSAL_LM"
    save_lora(model, directory)
