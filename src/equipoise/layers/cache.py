"""The decode cache of hybrids: per converted layer one constant-size `AttentionState`, whatever was read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from equipoise.layers.mixer import AttentionMode, HybridMixer
from equipoise.ops import AttentionState


class CacheError(RuntimeError):
    """A cache used in a way it cannot serve; the message says what to do instead."""


class HybridCacheLayer(CacheLayerMixin):
    """State of one converted layer.

    ``update`` only counts and hands back the new keys and values: the attention function reads `state` and
    commits the next one, since only it knows the padding mask and the features.

    Attributes:
        mode: the mode the state was made in; a state of one mode means nothing to another.
        state: None until the first tokens are read.
        length: tokens read so far.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, mode: AttentionMode) -> None:
        super().__init__()
        self.mode, self.state, self.length = mode, None, 0
        self.pending = 0

    state: AttentionState | None
    length: int

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = key_states.shape[-2]
        return key_states, value_states

    def commit(self, state: AttentionState | None) -> None:
        """Take the state after the tokens of the last `update`."""
        self.state = state
        self.length += self.pending
        self.pending = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(function)

    def reset(self) -> None:
        self.state, self.length, self.pending = None, 0, 0

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

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a running sum cannot forget.

        Raises:
            CacheError: unless there is nothing to remove.
        """
        if tokens_to_remove != 0:
            raise CacheError(
                f"expected to only go forward, got crop({tokens_to_remove}): a linear-attention state is a "
                "running sum and cannot drop tokens. Start again from a fresh cache, or decode without an "
                "assistant model."
            )


class HybridCache(Cache):
    """Cache of a hybrid model: constant-size states where layers were converted, the donor's own elsewhere.

    Args:
        config: the model's (decoder) configuration.
        mixers: the mixers of the converted layers; their present mode decides what the cache holds.
    """

    def __init__(self, config: PreTrainedConfig, mixers: Iterable[HybridMixer]) -> None:
        layers: list[Any] = list(DynamicCache(config=config).layers)
        for mixer in mixers:
            # The softmax (teacher) run needs every key and value, so it keeps the donor's own cache layer.
            if mixer.mode.kind != "softmax":
                layers[mixer.layer_idx] = HybridCacheLayer(mixer.mode)
        super().__init__(layers=layers)

    def state_bytes(self) -> int:
        """Bytes the cache holds now, all layers and rows together."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, HybridCacheLayer):
                total += 0 if layer.state is None else layer.state.bytes()
            else:
                held = getattr(layer, "keys", None), getattr(layer, "values", None)
                total += sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
        return total
