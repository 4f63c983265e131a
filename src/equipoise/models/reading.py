"""Reading a prompt into a decode cache, chunk by chunk, and what identifies the model that read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from equipoise.layers.cache import HybridCache
from equipoise.layers.cache_rows import duplicate
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode
from equipoise.models.adapters import adapter_layers

CHUNK = 2048
"""Tokens read at once: memory grows with the chunk, not with the text."""
_VOLATILE = (
    "_attn_implementation", "_name_or_path", "architectures", "dtype", "equipoise", "transformers_version",
    "use_cache",
)  # fmt: skip
"""Entries of a configuration that do not change what a model computes, or that the weights tell better."""


@dataclass(frozen=True)
class PromptState:
    """A prompt that has been read.

    Attributes:
        cache: what the model remembers of it, one row. Going on from it changes it: `fork` it to keep it.
        tokens: the prompt's [1, T].
        mode: the branch state it was read in; the model has to be in the same one to go on.
    """

    cache: HybridCache
    tokens: Int[Tensor, "1 T"]
    mode: AttentionMode

    def fork(self) -> HybridCache:
        """A copy of the cache to go on from, so that the state serves any number of times."""
        return duplicate(self.cache)

    def inputs(self, tokens: Int[Tensor, "1 N"]) -> dict[str, Any]:
        """What ``model.generate(**inputs)`` takes to go on with new tokens; the prompt is not read again.

        Raises:
            ValueError: no new token.
        """
        if tokens.shape[1] == 0:
            raise ValueError("expected at least one token to go on from the state with, got none.")
        whole = torch.cat([self.tokens.to(tokens.device), tokens], 1)
        return {
            "input_ids": whole, "attention_mask": torch.ones_like(whole), "past_key_values": self.fork(),
        }  # fmt: skip


@torch.inference_mode()
def read_chunks(
    model: Any,
    cache: HybridCache,
    tokens: Int[Tensor, "1 T"],
    *,
    chunk: int = CHUNK,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Read tokens into a cache of one row, after what it has read already.

    Args:
        model: a converted model, in the branch state of the cache.
        cache: is changed.
        tokens: at least one.
        chunk: how many at once.
        progress: called with the number of tokens of each chunk that was read.

    Returns:
        The logits after the last token [1, V].
    """
    if tokens.shape[1] == 0:
        raise ValueError("expected at least one token to read, got none.")
    logits = tokens.new_empty(0)
    for part in tokens.split(chunk, 1):
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if progress is not None:
            progress(part.shape[1])
    return logits


def read_prompt(
    model: Any,
    tokens: Int[Tensor, "1 T"],
    *,
    chunk: int = CHUNK,
    after: PromptState | None = None,
    progress: Callable[[int], object] | None = None,
) -> PromptState:
    """Read a prompt in the branch state the model is in.

    Args:
        model: a converted model.
        tokens: the prompt, or what follows ``after``.
        chunk: tokens read at once; memory grows with it, not with the prompt.
        after: a state to go on from; it stays as it is.
        progress: called with the number of tokens of each chunk that was read.

    Raises:
        ValueError: no token.
    """
    cache = model.make_cache() if after is None else after.fork()
    read_chunks(model, cache, tokens, chunk=chunk, progress=progress)
    whole = tokens if after is None else torch.cat([after.tokens.to(tokens.device), tokens], 1)
    return PromptState(cache, whole, current_mode(model))


def current_mode(model: nn.Module) -> AttentionMode:
    """The branch state that the converted layers are in."""
    mixers = mixers_of(model)
    return next((mixer for mixer in mixers if mixer.has_both), mixers[0]).mode


def model_digest(model: nn.Module) -> str:
    """SHA-256 of everything that decides what a model computes: configuration, every weight, adapters' state.

    Reads all weights once: about as long as loading them from the disk's cache.
    """
    config: Any = model.config
    described = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    described["hybrid"] = (config.equipoise or {}).get("hybrid")
    described["adapters"] = [bool(layer.disable_adapters) for layer in adapter_layers(model)]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        update_digest(digest, name, tensor)
    return digest.hexdigest()


def update_digest(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, dtype, shape and bytes to a hash."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    digest.update(flat.view(torch.uint8).numpy())
