"""Turning a donor into a hybrid in place, and back."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from equipoise._register import PREFIX
from equipoise.config import HybridConfig
from equipoise.layers.interface import ATTENTION, mixer_of, mixers_of, pass_cache, prepare_decoder
from equipoise.layers.mixer import HybridMixer
from equipoise.layers.rotary import layout_of
from equipoise.models.adapters import unload_lora
from equipoise.models.branches import branches
from equipoise.models.families import ConversionError, ParityError, check_family
from equipoise.models.layout import DROPOUTS, attention_modules, head_sizes, is_local, selected_layers

log = logging.getLogger(__name__)

PARITY_TOKENS = 24
DIFFERENT_ATTENTION = {
    "add_cross_attention": "attends to an encoder too, and only causal self-attention converts",
    "use_bidirectional_attention": "looks ahead, and linear attention's state holds only what came before",
}
"""Settings of families that convert, with which they do not."""


def hybridize(
    model: PreTrainedModel, config: HybridConfig, *, seed: int = 0, check: bool = True
) -> PreTrainedModel:
    """Convert a donor in place: the same object, now a hybrid of class ``Equipoise…`` (returned for
    convenience).

    The donor's weights are untouched and shared; each converted layer gains a float32 `HybridMixer` at
    ``self_attn.hybrid`` (GPT-NeoX: ``attention.hybrid``, GPT-2: ``attn.hybrid``). Undo with `revert`.

    Args:
        model: a causal language model of a supported family.
        config: what the converted layers compute, and which layers are converted.
        seed: of the feature maps' initialisation.
        check: run the parity self-test: in teacher mode the converted model must give the donor's logits.

    Raises:
        ConversionError: the family, a layer or a setting that cannot be converted, and why.
        ParityError: the self-test failed; one of the ConversionErrors.
        UnknownNameError: no such feature map or mixing rule.
    """
    from equipoise.models.auto import classes_of

    check_family(model.config.model_type)
    _check_donor(model, config)
    config_class, model_class = classes_of(model.config.model_type)
    expected = _parity_logits(model) if check else None
    _adopt_config(model, config_class)
    model.config.equipoise = {"hybrid": config.model_dump(mode="json"), "donor": None, "merged": False}
    model.__class__ = model_class
    try:
        attach(model, config, seed=seed)
        if expected is not None:
            _check_parity(model, expected)
    except Exception:
        revert(model)
        raise
    return model


def attach(model: PreTrainedModel, config: HybridConfig, *, seed: int = 0) -> None:
    """Add mixers, hooks and the attention function to a model of an ``Equipoise…`` class.

    Raises:
        ConversionError: no layer to convert.
    """
    decoder: Any = model.get_decoder()
    text: Any = model.config.get_text_config(decoder=True)
    modules = attention_modules(model)
    chosen = selected_layers(text, config, len(modules))
    strangers = sorted(config.per_layer.keys() - chosen)
    if strangers:
        raise ConversionError(
            f"expected layers that are converted in per_layer ({sorted(chosen)}), got {strangers}."
        )
    for index, module in enumerate(modules):
        if index in chosen:
            module.hybrid = make_mixer(module, text, config, index, seed)
        module._equipoise_hook = module.register_forward_pre_hook(pass_cache, with_kwargs=True)
    decoder._equipoise_hook = decoder.register_forward_pre_hook(prepare_decoder, with_kwargs=True)
    model.set_attn_implementation(ATTENTION)


def make_mixer(
    module: Any, text: Any, config: HybridConfig, index: int, seed: int, device: torch.device | None = None
) -> HybridMixer:
    """A mixer on the layer's device or the one given: float32, or float64 where the donor is held in that."""
    parameter = next(module.parameters())
    heads, kv_heads, size = head_sizes(text, module)
    own = config.for_layer(index)
    rotary = layout_of(module, text.model_type.removeprefix(PREFIX))
    mixer = HybridMixer(own, heads=heads, kv_heads=kv_heads, head_dim=size, layer_idx=index, rotary=rotary)
    mixer.reset_parameters(seed)
    return mixer.to(device or parameter.device, torch.promote_types(parameter.dtype, torch.float32))


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Give the donor back in place: its class, configuration, attention and weights (adapters taken out).

    Raises:
        ConversionError: the model is not converted, or its adapters were merged into the weights.
    """
    from equipoise.models.auto import donor_classes_of

    donor_config, donor_class = donor_classes_of(model.config.model_type)
    if (model.config.equipoise or {}).get("merged"):
        raise ConversionError(
            "the LoRA adapters were merged into the weights: the donor's are gone. Load the donor."
        )
    unload_lora(model, merge=False)
    decoder: Any = model.get_decoder()
    for module in (*attention_modules(model), decoder):
        hook = module.__dict__.pop("_equipoise_hook", None)
        if hook is not None:  # none yet where a conversion stopped half-way
            hook.remove()
        if mixer_of(module) is not None:
            del module.hybrid
    previous = getattr(model.config, "equipoise_donor_attention", None) or "sdpa"
    _adopt_config(model, donor_config)
    for name in ("equipoise", "equipoise_donor_attention"):
        model.config.__dict__.pop(name, None)
    if model.config.architectures:  # named after the hybrid where it was saved
        model.config.architectures = [donor_class.__name__]
    model.__class__ = donor_class
    model.set_attn_implementation(previous)
    return model


def config_as(config: Any, config_class: type[Any]) -> Any:
    """A copy of a configuration, as one of another class."""
    new = copy.deepcopy(config)
    new.__class__ = config_class
    new.__dict__.pop("model_type", None)  # read from config.json it shadows the class's
    return new


def _adopt_config(model: PreTrainedModel, config_class: type[Any]) -> None:
    """Give the model a configuration of its own, of another class; other models may share the old one."""
    old: Any = model.config
    new = config_as(old, config_class)
    new.equipoise_donor_attention = old._attn_implementation
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _check_donor(model: PreTrainedModel, config: HybridConfig) -> None:
    text: Any = model.config.get_text_config(decoder=True)
    name = model.config.model_type
    expected: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    if not isinstance(model, expected):
        raise ConversionError(
            f"expected a causal language model ({expected.__name__}), got a {type(model).__name__}: "
            "load the donor with AutoModelForCausalLM."
        )
    if not model._can_set_attn_implementation():
        raise ConversionError(
            f"cannot convert {name!r}: its attention does not go through the attention interface."
        )
    for field in DROPOUTS:
        if getattr(text, field, 0):
            raise ConversionError(
                f"expected attention dropout 0, got {getattr(text, field)}: load the donor with {field}=0.0."
            )
    for field, meaning in DIFFERENT_ATTENTION.items():
        if getattr(text, field, False):
            raise ConversionError(f"cannot convert this {name}: it {meaning} ({field}).")
    context = text.max_position_embeddings
    if config.window is not None and context is not None and config.window >= context:
        raise ConversionError(
            f"expected a window shorter than the donor's context of {context} tokens, got {config.window}: "
            "such a window is full attention. Choose a smaller one, for instance 64."
        )
    modules = attention_modules(model)
    chosen = selected_layers(text, config, len(modules))
    local = [i for i in range(len(modules)) if i not in chosen and is_local(text, i)]
    if local:
        log.info("layers %s are local already (their own window) and stay as they are", local)


def _parity_logits(model: PreTrainedModel) -> torch.Tensor | None:
    """The model's logits on a fixed prompt, padding included; None where weights are not there yet."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    text: Any = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, text.vocab_size, (2, PARITY_TOKENS), generator=generator).to(model.device)
    mask = torch.ones_like(tokens)
    mask[0, : PARITY_TOKENS // 3] = 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    finally:
        model.train(training)
    return logits[mask.bool()].double()


def _check_parity(model: PreTrainedModel, expected: torch.Tensor) -> None:
    with branches(model, "softmax"):
        got = _parity_logits(model)
    assert got is not None
    # Some donors give NaN for padded rows in float64 (eager masks overflow there); those rows say nothing.
    defined = expected.isfinite()
    got, expected = got[defined], expected[defined]
    # eager attention takes its softmax in float32 whatever the dtype, so float64 donors get no tighter bound
    tolerance = (1e-4 if model.dtype.itemsize >= 4 else 5e-2) * max(1.0, expected.abs().max().item())
    difference = (got - expected).abs().max().item() if len(got) else float("nan")
    if not difference <= tolerance:
        raise ParityError(
            f"parity self-test failed for {type(model).__name__}: with its own softmax attention the "
            f"converted model differs from the donor by {difference:.2e} (allowed {tolerance:.2e}). The "
            "donor does something in its attention that the interface does not pass on; please report the "
            "model type. Nothing was changed."
        )


__all__ = ["attach", "hybridize", "mixers_of", "revert"]
