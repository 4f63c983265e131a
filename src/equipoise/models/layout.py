"""The layers of a model: which are converted or local, how far they reach, what their state weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from equipoise.config import HybridConfig
from equipoise.layers.interface import mixer_of
from equipoise.models.families import ConversionError


@dataclass(frozen=True)
class LayerReport:
    """What each layer of a converted model runs, by index.

    Attributes:
        converted: hybrid layers.
        local: layers left with the donor's own sliding window.
        softmax: layers left with the donor's full attention.
    """

    converted: tuple[int, ...]
    local: tuple[int, ...]
    softmax: tuple[int, ...]


ATTENTION_NAMES = ("self_attn", "attention", "attn")
"""What a decoder layer calls its attention: nearly everyone's name, GPT-NeoX's, GPT-2's."""


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder's layers in their order; none where the model is not laid out so."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore
    layers = getattr(decoder, "layers", None)
    return list(getattr(decoder, "h", ()) if layers is None else layers)  # h: GPT-2's name for them


def attention_modules(model: nn.Module) -> list[Any]:
    """The attention module of every decoder layer.

    Raises:
        ConversionError: the model's layers are not laid out so.
    """
    layers = decoder_layers(model)
    for name in ATTENTION_NAMES:
        if len(layers) and all(isinstance(getattr(layer, name, None), nn.Module) for layer in layers):
            return [getattr(layer, name) for layer in layers]
    raise ConversionError(
        f"cannot convert {type(model).__name__}: expected decoder layers with an attention module each "
        f"({', '.join(ATTENTION_NAMES)})."
    )


def head_sizes(config: Any, module: Any) -> tuple[int, int, int]:
    """H, N and D of a layer; families without grouped queries do not name N, GPT-NeoX names D head_size."""
    heads: int = config.num_attention_heads
    size: int = module.head_size if getattr(module, "head_dim", None) is None else module.head_dim
    return heads, getattr(config, "num_key_value_heads", None) or heads, size


DROPOUTS = ("attention_dropout", "attn_pdrop")
"""Under which names configurations keep the dropout of attention weights."""


def is_local(config: Any, index: int) -> bool:
    """Whether the donor's layer has a sliding window of its own."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[index] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def selected_layers(config: Any, hybrid: HybridConfig, count: int) -> frozenset[int]:
    """Indices of the layers to convert.

    Raises:
        ConversionError: an index that is not there, a kind of layer unknown here, or nothing to convert.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConversionError(
            f"cannot convert {config.model_type!r}: layers of type {sorted(kinds)} are unknown here."
        )
    if hybrid.layers == "all":
        return frozenset(range(count))
    if hybrid.layers == "global":
        chosen = frozenset(i for i in range(count) if not is_local(config, i))
        if not chosen:
            raise ConversionError(
                f"nothing to convert: all {count} layers of this {config.model_type} are local already "
                f"(window {config.sliding_window}). Set layers='all' to convert them too."
            )
        return chosen
    wrong = [i for i in hybrid.layers if not 0 <= i < count]
    if wrong or not hybrid.layers:
        raise ConversionError(f"expected layers between 0 and {count - 1}, got {list(hybrid.layers)}.")
    return frozenset(int(i) for i in hybrid.layers)


def report_layers(model: nn.Module) -> LayerReport:
    """Sort the model's layers by what they run."""
    config: Any = model.config.get_text_config(decoder=True)  # pyright: ignore
    converted: list[int] = []
    local: list[int] = []
    softmax: list[int] = []
    for index, module in enumerate(attention_modules(model)):
        kind = converted if mixer_of(module) is not None else local if is_local(config, index) else softmax
        kind.append(index)
    return LayerReport(tuple(converted), tuple(local), tuple(softmax))


def reach(model: nn.Module, *, window: int | None = None) -> int | None:
    """How many tokens back information can travel through stacked windows alone; None if without limit.

    A sliding window relays w - 1 tokens a layer; terraced windows one block of w a layer, and w - 1 once
    more. Beyond reach only the linear branch (or a sink) can answer. Layers left with full softmax make it
    unlimited.

    Args:
        model: a converted model.
        window: a window to assume for all converted layers instead of their own, sliding.
    """
    config: Any = model.config.get_text_config(decoder=True)  # pyright: ignore
    total, last_block = 0, 0
    for index, module in enumerate(attention_modules(model)):
        mixer = mixer_of(module)
        if mixer is None:
            if not is_local(config, index):
                return None
            total += config.sliding_window - 1
        elif window is not None:
            total += window - 1
        elif mixer.config.window is not None and mixer.config.layout == "terraced":
            total += mixer.config.window
            last_block = max(last_block, mixer.config.window - 1)
        elif mixer.config.window is not None:
            total += mixer.config.window - 1
    return total + last_block


KV_BYTES = 2
"""Bytes an element of K and V takes at inference: bfloat16."""
STATE_BYTES = 4
"""Bytes an element of S and z takes: float32, whatever the model's dtype."""


def state_bytes(model: nn.Module) -> int:
    """Decode state of the converted layers for one sequence, in bytes: K, V and sinks in bfloat16, S and z in
    float32.

    Counts w tokens of K and V a layer (terraced: 2 w) and every feature of S and z.
    """
    total = 0
    for module in attention_modules(model):
        mixer = mixer_of(module)
        if mixer is None:
            continue
        config, size = mixer.config, mixer.head_dim
        windows = config.head_windows or [config.window or 0] * mixer.kv_heads
        tokens = sum(windows) * (2 if config.layout == "terraced" else 1) + config.sinks * mixer.kv_heads
        total += 2 * tokens * size * KV_BYTES
        if config.feature_map is not None:
            total += mixer.states * linear_head_bytes(config, size)
    return total


def linear_head_bytes(config: HybridConfig, head_dim: int) -> int:
    """Of S and z of one head; the delta rule has no z."""
    columns = config.value_size(head_dim) + (config.state_update == "additive")
    return config.features(head_dim) * columns * STATE_BYTES


def equal_window(model: nn.Module, *, sinks: int = 4) -> int:
    """The window with which training-free SWA + sinks, the same in every layer, takes as many bytes."""
    per_token = sum(
        2 * mixer.kv_heads * mixer.head_dim * KV_BYTES
        for module in attention_modules(model)
        if (mixer := mixer_of(module)) is not None
    )
    return max(1, state_bytes(model) // per_token - sinks)
