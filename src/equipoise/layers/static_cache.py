"""A decode cache whose tensors keep their place and shape, for a compiled decoding step.

A hybrid's state has one size anyway. What else a compiled step needs: the tensors are the same objects from
token to token (CUDA graphs record addresses), and the number of tokens read is a tensor too, since a Python
number would be a constant of the graph and every token a new graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from equipoise.layers.cache import CacheError, HybridCache, HybridCacheLayer
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.ops import AttentionState


class StaticHybridCacheLayer(HybridCacheLayer):
    """As `HybridCacheLayer`, with tensors that are written in place.

    The first call (the prompt, not compiled) allocates them; nothing can be taken back.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, mode: AttentionMode) -> None:
        super().__init__(mode)
        self.read_so_far: Tensor | None = None

    def attend(self, mixer: HybridMixer, inputs: LayerInputs) -> Tensor:
        """As in the base class; later states are copied over the first one."""
        count = inputs.k.shape[2]
        out, after = mixer.attend(
            inputs, mode=self.mode, state=self.state, keep_state=True, reuse_state=False
        )
        if self.read_so_far is None:
            self.read_so_far = torch.full((), count, dtype=torch.long, device=inputs.k.device)
            self._allocate(after)
        else:
            self.read_so_far.add_(count)
            self._overwrite(after)
        return out

    def _overwrite(self, state: AttentionState | None) -> None:
        if self.state is None or state is None:
            return
        for kept, new in zip(self.state.tensors(), state.tensors(), strict=True):
            kept.copy_(new)

    def _allocate(self, state: AttentionState | None) -> None:
        """Take over a state, in memory of its own."""
        contiguous = torch.contiguous_format
        self.state = None if state is None else state.map(lambda t: t.clone(memory_format=contiguous))
        assert self.read_so_far is not None
        if torch.compiler.is_compiling():  # a compiled prefill: the graph's outputs are what they are
            return
        for tensor in (self.read_so_far, *([] if self.state is None else self.state.tensors())):
            torch._dynamo.mark_static_address(tensor)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor: in place while the number of rows stays, as for beams."""
        if self.state is None:
            return
        after = self.state.map(function)
        if after.valid.shape == self.state.valid.shape and after.valid.device == self.state.valid.device:
            self._overwrite(after)
        else:
            self._allocate(after)

    def get_seq_length(self) -> int | Tensor:
        """Tokens read so far; a tensor where a graph is being traced, as transformers' static layers do."""
        if self.read_so_far is None:
            return 0
        return self.read_so_far if torch.compiler.is_compiling() else int(self.read_so_far)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the new tokens alone: hybrids build no mask over the past."""
        return query_length, 0

    def activate_past_recording(self) -> None:
        """Refused.

        Raises:
            CacheError: always.
        """
        raise CacheError(
            "a static cache writes over what it held and cannot take tokens back: decode with drafts on "
            "model.make_cache(), without cache_implementation='static'."
        )

    def reset(self) -> None:
        super().reset()
        self.read_so_far = None


class StaticHybridCache(HybridCache):
    """Cache of a model of converted layers only, for compiled decoding.

    Raises:
        CacheError: a layer that was not converted; its keys and values grow with every token.
    """

    def __init__(self, config: PreTrainedConfig, mixers: Iterable[HybridMixer]) -> None:
        mixers = list(mixers)
        super().__init__(config, mixers)
        for mixer in mixers:
            if mixer.mode.kind != "softmax":
                self.layers[mixer.layer_idx] = StaticHybridCacheLayer(mixer.mode)
        others = [i for i, layer in enumerate(self.layers) if not isinstance(layer, StaticHybridCacheLayer)]
        if others:
            raise CacheError(
                "expected a hybrid in every layer for a static cache, got softmax attention in layers "
                f"{others}, whose keys and values grow. Convert with layers='all', or leave "
                "cache_implementation unset."
            )
