"""Rows of decode caches: joining, selecting and copying sequences that have read different numbers of tokens.

A converted layer's state has the same shape whatever was read, so its rows stand side by side as they are.
Keys of a layer with softmax attention are aligned on the right and padded on the left; `padding_mask` hides
the padding. Lengths are the caller's to keep: a cache counts for all of its rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from equipoise.layers.cache import CacheError, HybridCache, HybridCacheLayer
from equipoise.layers.rollback import Past
from equipoise.ops import AttentionState


def append_rows(cache: HybridCache, others: Sequence[HybridCache]) -> None:
    """Append the rows of other caches, which are emptied on the way: layer by layer, so that no more than one
    layer is held twice.

    Args:
        cache: gets the rows; all caches have read at least one token in the same mode.
        others: whose rows follow its own, in order.

    Raises:
        CacheError: caches of other models or modes, or with nothing in them.
    """
    for index, layer in enumerate(cache.layers):
        layers: list[Any] = [layer, *(other.layers[index] for other in others)]
        if any(type(one) is not type(layer) for one in layers) or not all(
            one.is_initialized for one in layers
        ):
            raise CacheError(
                "expected caches of one model that have each read a token, got "
                f"{', '.join(type(one).__name__ for one in layers)} at layer {index}."
            )
        if isinstance(layer, HybridCacheLayer):
            _append_states(layer, layers)
        else:
            _append_keys(layer, layers)
        for other in layers[1:]:
            other.reset()


def _append_states(layer: HybridCacheLayer, layers: list[Any]) -> None:
    if not all(layer.mode.same_as(other.mode) for other in layers[1:]):
        raise CacheError("expected caches made in one branch state, got several: their sums do not mix.")
    layer.length = max(one.length for one in layers)
    states = [one.state for one in layers]
    if all(state is None for state in states):  # the mode `none` remembers nothing
        return
    if any(state is None for state in states):
        raise CacheError("expected caches that have each read a token, got one without.")
    layer.state = AttentionState.concatenate(states)
    if layer.record_past:  # the rows have no common past to go back to
        layer.past = Past(layer.state)


def _append_keys(layer: Any, layers: list[Any]) -> None:
    longest = max(one.keys.shape[2] for one in layers)
    for name in ("keys", "values"):
        held = (getattr(one, name) for one in layers)
        padded = [functional.pad(t, (0, 0, longest - t.shape[2], 0)) for t in held]
        setattr(layer, name, torch.cat(padded))
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = max(one.cumulative_length for one in layers)


def select_rows(cache: HybridCache, rows: Int[Tensor, " R"], lengths: Sequence[int]) -> None:
    """Keep some rows, in the order given, and drop padding that no row needs any more.

    Args:
        cache: is changed.
        rows: indices; one may come several times.
        lengths: tokens read, of each row that stays.
    """
    cache.batch_select_indices(rows)
    longest = max(lengths)
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.keys.shape[2] > longest:
            assert layer.values is not None
            layer.keys = layer.keys[:, :, -longest:].clone()  # a view would keep the padding in memory
            layer.values = layer.values[:, :, -longest:].clone()


def copy_rows(cache: HybridCache, copies: int) -> list[HybridCache]:
    """A cache of one row several times over, each with memory of its own.

    The first is the cache itself.
    """
    return [cache, *(duplicate(cache) for _ in range(copies - 1))]


def duplicate(cache: HybridCache) -> HybridCache:
    """A copy with memory of its own, to go on from while the original stays as it is."""
    copied = copy(cache)
    copied.layers = [_duplicate_layer(layer) for layer in cache.layers]
    return copied


def _duplicate_layer(layer: Any) -> Any:
    made = copy(layer)
    if isinstance(layer, HybridCacheLayer):
        made.state = None if layer.state is None else layer.state.map(torch.clone)
        made.past = deepcopy(layer.past)
    else:
        made.keys = None if layer.keys is None else layer.keys.clone()
        made.values = None if layer.values is None else layer.values.clone()
    return made


def padding_mask(cache: HybridCache, lengths: Int[Tensor, " B"]) -> Bool[Tensor, "B S"] | None:
    """The attention mask for one more token of every row; None where no layer needs one.

    Args:
        cache: of B rows.
        lengths: tokens that each of them has read.
    """
    held = [
        layer.keys.shape[2]
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None
    ]
    if not held:
        return None
    positions = torch.arange(max(held), -1, -1, device=lengths.device)  # distance to the new token
    return positions[None] <= lengths[:, None]
