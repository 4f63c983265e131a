"""How many sequences fit: known at start, since a hybrid's state has one size whatever it has read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from equipoise.layers.cache import HybridCache, HybridCacheLayer
from equipoise.serve.settings import ServeSettings
from equipoise.settings import ConfigError


@dataclass(frozen=True)
class Capacity:
    """What one sequence takes, and how many there may be.

    Attributes:
        constant_bytes: of the state, for any length.
        token_bytes: a token of its context on top; 0 unless layers have softmax attention over all keys.
        sequence_bytes: both, at the full context length.
        sequences: how many fit.
    """

    constant_bytes: int
    token_bytes: int
    sequence_bytes: int
    sequences: int

    def words(self, settings: ServeSettings) -> str:
        """What the server states at start."""
        of = "whatever its length" if not self.token_bytes else f"at {settings.context_length:,} tokens"
        limit = "--max-sequences" if self.sequences == settings.max_sequences else "--state-memory"
        return (
            f"a sequence takes {self.sequence_bytes:,} bytes of state {of}: {self.sequences:,} at once "
            f"({limit}), {self.sequences * self.sequence_bytes:,} bytes of {int(settings.state_memory):,}"
        )


@torch.inference_mode()
def capacity_of(model: Any, settings: ServeSettings) -> Capacity:
    """Read two tokens and look at what the model keeps of them.

    Joining rows needs the memory of one layer twice for a moment; it is set aside.

    Raises:
        ConfigError: not even one sequence fits.
    """
    cache: HybridCache = model.make_cache()
    model(torch.zeros(1, 2, dtype=torch.long, device=model.device), past_key_values=cache, logits_to_keep=1)
    constant = a_token = largest = 0
    for layer in cache.layers:
        if isinstance(layer, HybridCacheLayer):
            size = 0 if layer.state is None else layer.state.bytes()
            constant += size
        else:
            held: Any = layer
            each = sum(t.numel() * t.element_size() for t in (held.keys, held.values)) // 2
            limited = isinstance(layer, DynamicSlidingWindowLayer)
            tokens = min(layer.sliding_window, settings.context_length) if limited else 0
            constant += each * tokens
            a_token += 0 if limited else each
            size = each * (tokens or settings.context_length)
        largest = max(largest, size)
    total = constant + a_token * settings.context_length
    fitting = int(settings.state_memory) // max(1, total + largest)
    if fitting == 0:
        raise ConfigError(
            f"--state-memory: a sequence takes {total + largest:,} bytes of state, got "
            f"{int(settings.state_memory):,} for all of them; set it to at least that."
        )
    return Capacity(constant, a_token, total, min(fitting, settings.max_sequences))
