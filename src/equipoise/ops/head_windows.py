"""Hybrid attention whose window has a length of its own in each key/value head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.ops.head_subset import flags_of, heads_of, read_by, subset_attention
from equipoise.ops.hybrid import window_attention
from equipoise.ops.types import (
    AttentionState,
    Branches,
    FeatureMapLike,
    MapHeads,
    StateUpdate,
    ValueMaps,
    accumulation_dtype,
)


def window_groups(windows: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(window, the key/value heads that have it), the longest first."""
    sizes = sorted(set(windows), reverse=True)
    return [(size, [head for head, window in enumerate(windows) if window == size]) for size in sizes]


def head_windows_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B N T D"],
    v: Float[Tensor, "B N T E"],
    phi_q: Float[Tensor, "B h T F"] | FeatureMapLike | None,
    phi_k: Float[Tensor, "B M T F"] | FeatureMapLike | None,
    *,
    windows: Sequence[int],
    heads: Sequence[int] = (),
    map_heads: MapHeads = "query",
    mixing: str = "convex",
    update: StateUpdate = "additive",
    value_maps: ValueMaps | None = None,
    gate: float | Tensor = 0.5,
    scale: float | None = None,
    softcap: float | None = None,
    key_mask: Bool[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
    branches: Branches | None = None,
    sinks: int = 0,
    sink_logits: Float[Tensor, " H"] | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    reuse_state: bool = False,
) -> tuple[Float[Tensor, "B H T E"], AttentionState | None]:
    """`subset_attention` with a window for each of the N key/value heads, which its query heads share.

    Heads of one window run together, so that a call costs as much as there are different windows. A state
    holds as many tokens of each head as its window needs, and no more.

    Args:
        windows: tokens of each key/value head's window [N].
        heads: indices of the query heads that have a linear branch, in order; none if empty.
        phi_q, phi_k, map_heads, value_maps: features, or maps, of those heads, as in `subset_attention`.

    Other arguments and returns as in `hybrid_attention`.

    Raises:
        ValueError: not a window for each key/value head, or a state of other windows; and what
            `hybrid_attention` raises.
    """
    if len(windows) != k.shape[1]:
        raise ValueError(f"expected a window for each of {k.shape[1]} key/value heads, got {list(windows)}.")
    groups, shared = window_groups(windows), q.shape[1] // k.shape[1]
    states = _states_of(initial_state, len(groups))
    own = [[head * shared + i for head in chosen for i in range(shared)] for _, chosen in groups]
    if heads and not any(set(heads) <= set(members) for members in own):
        # a map knows all of its heads or none
        phi_q, phi_k = _features(*heads_of(heads, q, k, v, map_heads)[:2], phi_q, phi_k)
    common: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "key_mask": key_mask, "segment_ids": segment_ids, "sinks": sinks,
        "output_final_state": output_final_state, "reuse_state": reuse_state,
    }  # fmt: skip
    outs: list[Tensor] = []
    after: list[AttentionState | None] = []  # not list[...](): torch.compile cannot trace that
    for (window, chosen), members, state in zip(groups, own, states, strict=True):
        index = torch.tensor(members, device=q.device)
        parts = q[:, index], k[:, chosen], v[:, chosen]
        logits = None if sink_logits is None else sink_logits[index]
        settings: dict[str, Any] = {
            **common, "window": window, "sink_logits": logits, "initial_state": state,
        }  # fmt: skip
        linear = [place for place, head in enumerate(heads) if head in members]
        if linear:
            own_heads = [members.index(heads[place]) for place in linear]
            keys = linear if map_heads == "query" else read_by(linear, shared, map_heads)
            out, state = subset_attention(
                *parts, _of_places(phi_q, linear), _of_places(phi_k, keys),
                heads=own_heads, map_heads=map_heads, mixing=mixing, update=update,
                value_maps=None if value_maps is None else (value_maps[0][keys], value_maps[1][linear]),
                gate=gate.expand(*q.shape[:3])[:, index] if isinstance(gate, Tensor) else gate,
                branches=flags_of(branches or Branches(), index), **settings,
            )  # fmt: skip
        else:
            out, state = window_attention(*parts, **settings)
        outs.append(out)
        after.append(state)
    order = torch.tensor(list(chain.from_iterable(own)), device=q.device).argsort()
    return torch.cat(outs, 1)[:, order], _joined(after)


def _states_of(state: AttentionState | None, count: int) -> list[AttentionState | None]:
    states: list[AttentionState | None] = [None] * count
    if state is None:
        return states
    if len(state.others) != count - 1:
        raise ValueError(
            f"expected initial_state of a call with {count} different windows, got one of "
            f"{len(state.others) + 1}."
        )
    states[:] = replace(state, others=()), *state.others
    return states


def _joined(states: Sequence[AttentionState | None]) -> AttentionState | None:
    known = [state for state in states if state is not None]
    return replace(known[0], others=tuple(known[1:])) if known else None


def _features(queries: Tensor, keys: Tensor, phi_q: Any, phi_k: Any) -> tuple[Tensor, Tensor]:
    """Features of all linear heads as tensors, in the dtype that sums run in."""
    dtype = accumulation_dtype(queries.dtype)
    with torch.autocast(queries.device.type, enabled=False):
        found = [
            phi if isinstance(phi, Tensor) else phi(x.to(dtype))
            for phi, x in ((phi_q, queries), (phi_k, keys))
        ]
    return found[0], found[1]


def _of_places(phi: Any, places: Sequence[int]) -> Any:
    return phi[:, list(places)] if isinstance(phi, Tensor) else phi
