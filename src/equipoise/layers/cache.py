"""The decode cache of hybrids: per converted layer one constant-size `AttentionState`, whatever was read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.layers.rollback import DEPTH, Past, part_of
from equipoise.ops import AttentionState


class CacheError(RuntimeError):
    """A cache used in a way it cannot serve; the message says what to do instead."""


class HybridCacheLayer(CacheLayerMixin):
    """State of one converted layer.

    ``update`` only hands back the new keys and values: the attention function calls `attend`, since only it
    knows the padding mask and the features.

    Attributes:
        mode: the mode the state was made in; a state of one mode means nothing to another.
        state: None until the first tokens are read.
        length: tokens read so far.
        past: what `crop` needs; None unless `activate_past_recording` was called.
        offloaded: whether the state waits on the CPU between two calls.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, mode: AttentionMode, *, offloaded: bool = False) -> None:
        super().__init__()
        self.mode, self.state, self.length = mode, None, 0
        self.past, self.offloaded = None, offloaded
        # weak: a copy of the cache must not bring a copy of the model
        self._mixer: weakref.ref[HybridMixer] | None = None

    state: AttentionState | None
    length: int
    past: Past | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def attend(self, mixer: HybridMixer, inputs: LayerInputs) -> Tensor:
        """Attention [B, H, T, E] of the new tokens over all that were read; the state takes them in."""
        if self.offloaded:
            self._map(lambda t: t.to(inputs.q.device))
        self._mixer = weakref.ref(mixer)
        if self.past is None:
            out = self._read(mixer, inputs)
        else:
            out = self._read_and_remember(mixer, inputs, self.past)
        self.length += inputs.k.shape[2]
        if self.offloaded:
            self.offload()
        return out

    def _read(self, mixer: HybridMixer, inputs: LayerInputs, *, reuse: bool = True) -> Tensor:
        out, self.state = mixer.attend(
            inputs, mode=self.mode, state=self.state, keep_state=True, reuse_state=reuse
        )
        return out

    def _read_and_remember(self, mixer: HybridMixer, inputs: LayerInputs, past: Past) -> Tensor:
        """As `_read`; of a long prompt only the end can be taken back, so only that is remembered."""
        early = inputs.k.shape[2] - DEPTH
        if early > 0:
            first = self._read(mixer, part_of(inputs, 0, early), reuse=past.may_reuse())
            past = self.past = Past(self.state)
            return torch.cat([first, self._read_and_remember(mixer, part_of(inputs, early, None), past)], 2)
        if past.checkpoints[-1].length >= DEPTH:
            past.mark(self.state)
        reuse = past.may_reuse()
        past.add(inputs)
        return self._read(mixer, inputs, reuse=reuse)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.past is not None:
            self.past.map(function)
        if self.state is not None:
            self.state = self.state.map(function)

    def tensors(self) -> list[Tensor]:
        """All tensors held, each once."""
        held = [] if self.state is None else self.state.tensors()
        held += [] if self.past is None else self.past.tensors()
        return list({id(t): t for t in held}.values())

    def reset(self) -> None:
        self.state, self.length = None, 0
        self.past = None if self.past is None else Past(None)

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices, ...])

    @property
    def record_past(self) -> bool:
        """Whether tokens read from now on can be taken back (transformers' name for it)."""
        return self.past is not None

    @record_past.setter
    def record_past(self, value: bool) -> None:
        if value != self.record_past:
            self.past = Past(self.state) if value else None

    def activate_past_recording(self) -> None:
        """Let tokens read from now on be taken back by `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -n tokens; the state is then, bit for bit, the one that never read them.

        Args:
            tokens_to_remove: 0 or negative, as transformers has it.

        Raises:
            CacheError: more tokens than were recorded (see `activate_past_recording`), or a positive number.
        """
        if tokens_to_remove > 0:
            raise CacheError(
                f"expected a negative number of tokens to take back, got crop({tokens_to_remove}): "
                f"use crop({-tokens_to_remove}) to remove so many from the end."
            )
        if self.past is None and tokens_to_remove:
            raise CacheError(
                f"expected a cache that remembers what it read, got crop({tokens_to_remove}) on one that "
                "does not: a linear-attention state is a running sum and cannot drop tokens. Call "
                "cache.activate_past_recording() before reading tokens that may have to go."
            )
        if self.past is None:
            return
        if -tokens_to_remove > self.past.length:
            raise CacheError(
                f"expected to take back at most {self.past.length} tokens, those read since recording began "
                f"({DEPTH} or more after longer ones), got crop({tokens_to_remove}). Start again from a "
                "fresh cache, or from a copy.deepcopy of this one made earlier."
            )
        if tokens_to_remove:
            self.state = self.past.back(-tokens_to_remove, partial(_advance, self._mixer, self.mode))
            self.length += tokens_to_remove
        self.past.mark(self.state)


def _advance(
    mixer: weakref.ref[HybridMixer] | None, mode: AttentionMode, inputs: LayerInputs,
    state: AttentionState | None, reuse: bool,
) -> AttentionState | None:  # fmt: skip
    alive = None if mixer is None else mixer()
    if alive is None:
        raise CacheError("the model this cache belongs to is gone: nothing can be taken back without it.")
    with torch.no_grad():
        return alive.attend(inputs, mode=mode, state=state, keep_state=True, reuse_state=reuse)[1]


class HybridCache(Cache):
    """Cache of a hybrid model: constant-size states where layers were converted, the donor's own elsewhere.

    Args:
        config: the model's (decoder) configuration.
        mixers: the mixers of the converted layers; their present mode decides what the cache holds.
        offload: keep the states of converted layers on the CPU between two calls.
    """

    def __init__(
        self, config: PreTrainedConfig, mixers: Iterable[HybridMixer], *, offload: bool = False
    ) -> None:
        layers: list[Any] = list(DynamicCache(config=config).layers)
        for mixer in mixers:
            # The softmax (teacher) run needs every key and value, so it keeps the donor's own cache layer.
            if mixer.mode.kind != "softmax":
                layers[mixer.layer_idx] = HybridCacheLayer(mixer.mode, offloaded=offload)
        super().__init__(layers=layers)

    def state_bytes(self) -> int:
        """Bytes the cache holds now, all layers and rows together."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, HybridCacheLayer):
                total += sum(t.numel() * t.element_size() for t in layer.tensors())
            else:
                held = getattr(layer, "keys", None), getattr(layer, "values", None)
                total += sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
        return total
