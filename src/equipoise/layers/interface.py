"""equipoise in transformers' attention interface: one attention function, one mask function, two hooks.

The attention function is the single path of every converted model: teacher runs, hybrids, ablations,
decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache

from equipoise.layers.cache import CacheError, HybridCache, HybridCacheLayer
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.layers.rotary import Rotation
from equipoise.layers.softmax import donor_attention
from equipoise.ops import segment_ids_from_cu_seqlens

ATTENTION = "equipoise"
"""The name under which transformers finds the functions below."""


def mixer_of(module: nn.Module) -> HybridMixer | None:
    """The layer's mixer; by attribute, as PEFT may have wrapped the module around it."""
    mixer = getattr(module, "hybrid", None)
    return mixer if isinstance(mixer, HybridMixer) else None


def mixers_of(model: nn.Module) -> list[HybridMixer]:
    """The mixers of all converted layers, in the order of the layers."""
    found = [module for module in model.modules() if isinstance(module, HybridMixer)]
    return sorted(found, key=lambda mixer: mixer.layer_idx)


def equipoise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    segment_ids: Tensor | None = None,
    s_aux: Tensor | None = None,
    equipoise_cache: Cache | None = None,
    equipoise_rotary: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it: [B, H, T, D] in, [B, T, H, E] out.

    Raises:
        ValueError: a feature of the donor's attention that the hybrid does not carry over.
    """
    _refuse(attention_mask, dropout, kwargs)
    if s_aux is not None and softcap is not None:
        raise ValueError("sink logits (s_aux) beside soft-capped scores: no donor tested here has both.")
    if segment_ids is not None:  # one row of positions may stand for the whole batch
        segment_ids = segment_ids.expand(query.shape[0], -1)
    mixer = mixer_of(module)
    layer = _cache_layer(equipoise_cache, module)
    rotation: Rotation | None = None
    if mixer is not None and mixer.rotary is not None and equipoise_rotary is not None:
        rotation = Rotation(*equipoise_rotary, mixer.rotary)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    hybrid = None if mixer is None or mixer.mode.kind == "softmax" else mixer
    if hybrid is None and isinstance(layer, HybridCacheLayer):
        raise CacheError(
            "this cache was made for the hybrid and holds no past keys for softmax attention; "
            "make the cache inside the `branches` block that uses it."
        )
    mask = _last(attention_mask, (key if hybrid is None else query).shape[2])
    inputs = LayerInputs(
        query, key, value, scale, softcap, mask, segment_ids, sliding_window, s_aux, rotation
    )
    out = donor_attention(inputs) if hybrid is None else _converted(hybrid, inputs, layer)
    if mixer is not None and mixer.observer is not None:
        mixer.observer(mixer, inputs, out)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _converted(mixer: HybridMixer, inputs: LayerInputs, layer: object) -> Tensor:
    mode = mixer.mode
    if mode.of_whole_texts and layer is not None:
        raise CacheError(f"mode {mode.kind!r} measures whole texts and keeps no cache: pass use_cache=False.")
    if mode.kind == "blend":
        # as many outputs as windows, in every layer: made again in the backward pass rather than kept
        blended: Any = checkpoint(_blended, mixer, inputs, mode, use_reentrant=False)
        return blended
    if layer is None:
        return mixer.attend(inputs, mode=mode)[0]
    if not isinstance(layer, HybridCacheLayer):
        raise CacheError(
            f"expected a cache made by equipoise, got a {type(layer).__name__} layer. Pass "
            "past_key_values=None, or model.make_cache()."
        )
    if not layer.mode.same_as(mode):
        raise CacheError(
            "the model's branches were switched after this cache was made: its state was summed for other "
            "branches. Make the cache inside the `branches` block that uses it."
        )
    return layer.attend(mixer, inputs)


def _blended(mixer: HybridMixer, inputs: LayerInputs, mode: AttentionMode) -> Tensor:
    """The sum over windows of weight times attention, head by head."""
    blend, sinks = mode.blend, mode.sinks
    assert blend is not None
    total: Tensor | None = None
    for window, weight in zip(blend.windows, blend.weights, strict=True):
        if window is None:
            out = donor_attention(inputs)
        else:
            out = mixer.attend(inputs, mode=AttentionMode("swa", window=window, sinks=sinks))[0]
        total = weight[:, None, None] * out if total is None else total + weight[:, None, None] * out
    assert total is not None
    return total


def _refuse(attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"expected a 2D padding mask [batch, tokens], got a mask of shape {list(attention_mask.shape)}. "
            "Custom 4D masks have no counterpart in linear attention; for packed sequences pass segment_ids."
        )
    if dropout:
        raise ValueError(f"expected attention dropout 0, got {dropout}: set config.attention_dropout = 0.")
    if kwargs.get("cache") is not None:
        raise ValueError(
            "paged continuous batching keeps keys and values in pages; a hybrid's state has none. Call "
            "generate()."
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError("this donor uses position biases, which converted layers do not carry over.")


def _last(mask: Tensor | None, count: int) -> Tensor | None:
    """The mask of the last ``count`` tokens as bools; None when it hides nothing."""
    if mask is None:
        return None
    mask = mask[:, -count:]
    if mask.shape[1] < count:
        raise ValueError(
            f"expected an attention mask that covers past and new tokens ({count} or more), got "
            f"{mask.shape[1]}."
        )
    mask = mask.bool()
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def _cache_layer(cache: Cache | None, module: nn.Module) -> object:
    index = getattr(module, "layer_idx", None)
    if cache is None or index is None or index >= len(cache.layers):
        return None
    return cache.layers[index]


def equipoise_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Hand the 2D padding mask on as it is (FlashAttention's convention): nothing T x T is built."""
    return attention_mask


AttentionInterface.register(ATTENTION, equipoise_attention)
AttentionMaskInterface.register(ATTENTION, equipoise_mask)


# ---- hooks: the interface does not hand the cache to the attention function, nor lets it choose one


def pass_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Pre-hook of self_attn: the cache and the rotary embedding travel on through **kwargs.

    GPT-NeoX still calls the cache layer_past.
    """
    kwargs["equipoise_cache"] = kwargs.get("past_key_values", kwargs.get("layer_past"))
    kwargs["equipoise_rotary"] = kwargs.get("position_embeddings")
    return args, kwargs


def prepare_decoder(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Pre-hook of the decoder: choose the cache, and name the segments of packed rows.

    Raises:
        CacheError: a cache of another kind with tokens in it.
        ValueError: packed sequences on top of a cache, or bounds of them that do not fit the row.
    """
    config: Any = decoder.config
    cache = kwargs.get("past_key_values")
    if cache is None:
        use_cache = kwargs.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and decoder.training:  # training never decodes, and states under grad would pile up
            kwargs["use_cache"] = False
        elif use_cache:
            kwargs["past_key_values"] = HybridCache(config, mixers_of(decoder))
    elif not isinstance(cache, HybridCache):
        adopt(cache, decoder)
    if kwargs.get("segment_ids") is None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # one per type of layer where the cache compiles, all the padding mask
            mask = next(iter(mask.values()), None)
        segments, sign = _segments_of(kwargs.get("position_ids"), mask), "position_ids"
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is not None:
            segments, sign = _segments_between(bounds, args, kwargs), "cu_seq_lens_q"
        if segments is not None and cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"these {sign} restart, as for packed sequences, but the cache holds an earlier part "
                "without segments: pass segment_ids with every part, or start from past_key_values=None."
            )
        if segments is not None:
            kwargs["segment_ids"] = segments
    return args, kwargs


_OTHER_CACHES = {
    "StaticCache": "it allocates every key and value in advance; a hybrid's state has one size anyway, and "
    "generate(cache_implementation='static') makes one that compiles",
    "QuantizedCache": "it rounds keys and values to a few bits; sums that every token is added to would lose "
    "most of them",
    "DynamicCache": "its layers are moved before attention has read them; make_cache(offload=True) keeps "
    "states on the CPU between steps",
    "EncoderDecoderCache": "hybrids are decoders without an encoder",
}
"""Why caches of other kinds are not taken over, empty though they are."""


def adopt(cache: Any, decoder: nn.Module) -> None:
    """Fill a fresh cache that transformers made with layers that fit the hybrid.

    Raises:
        CacheError: one with tokens in it, or of a kind that means nothing here.
    """
    config: Any = decoder.config
    stateful = [mixer for mixer in mixers_of(decoder) if mixer.mode.kind != "softmax"]
    taken = any(isinstance(layer, HybridCacheLayer) for layer in getattr(cache, "layers", ()))
    if taken or not stateful:  # filled by us before, or asked to keep every key, as any cache does
        return
    if not isinstance(cache, Cache) or cache.get_seq_length() > 0:
        raise CacheError(
            f"expected a HybridCache, got a {type(cache).__name__} with tokens in it: its keys were never "
            "folded into a state. Start from past_key_values=None."
        )
    name = type(cache).__name__
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise CacheError(
            f"expected a HybridCache, got {'an offloading ' if name == 'DynamicCache' else 'a '}{name}: "
            f"{_OTHER_CACHES.get(name, 'it holds keys and values, and a hybrid holds sums')}. Pass "
            "past_key_values=None, or model.make_cache()."
        )
    cache.layers = HybridCache(config, mixers_of(decoder)).layers
    cache.layer_class_to_replicate = None


def _segments_between(bounds: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Segments from the bounds that transformers' collators make for FlashAttention: of one row, all told."""
    tokens = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
    if tokens.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q bounds the sequences of one packed row, got a batch of {tokens.shape[0]} rows: "
            "pack them into one, or pass segment_ids."
        )
    return segment_ids_from_cu_seqlens(bounds.to(tokens.device), tokens.shape[1])


def _segments_of(position_ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Positions that restart mark packed sequences, unless there is padding, which repeats positions too."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return None
    restarts = position_ids.diff(dim=1) != 1
    if not bool(restarts.any()) or (mask is not None and not bool(mask.all())):
        return None
    return nn.functional.pad(restarts, (1, 0)).long().cumsum(1)
