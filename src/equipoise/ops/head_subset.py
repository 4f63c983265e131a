"""Hybrid attention whose linear branch, and so its state, only some heads have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.ops.delta import delta_attention
from equipoise.ops.hybrid import hybrid_attention, linear_attention, window_attention
from equipoise.ops.types import (
    AttentionState,
    Branches,
    FeatureMapLike,
    Layout,
    MapHeads,
    StateUpdate,
    ValueMaps,
    accumulation_dtype,
)

_LINEAR_FIELDS = (
    "linear_state", "linear_normalizer", "folded", "folded_segment", "pending", "pending_features",
    "pending_values",
)  # fmt: skip


def heads_of(
    heads: Sequence[int], q: Tensor, k: Tensor, v: Tensor, map_heads: MapHeads = "query"
) -> tuple[Tensor, Tensor, Tensor]:
    """q of some query heads [B, h, T, D], and the keys and values that each of them reads [B, h, ...].

    With ``map_heads`` key_value the keys and values are those of whole key/value heads, once each.
    """
    index = torch.tensor(heads, device=q.device)
    shared = torch.tensor(read_by(heads, q.shape[1] // k.shape[1], map_heads), device=q.device)
    return q[:, index], k[:, shared], v[:, shared]


def read_by(heads: Sequence[int], shared: int, map_heads: MapHeads) -> list[int]:
    """The key/value head that each of some query heads reads, or each that they read, once.

    Args:
        heads: the query heads.
        shared: how many query heads share a key/value head.
        map_heads: ``query`` for one entry a query head, ``key_value`` for one a key/value head.

    Raises:
        ValueError: once, but only some of those that share a key/value head were chosen.
    """
    read = [head // shared for head in heads]
    if map_heads == "query":
        return read
    whole = sorted(set(read))
    if list(heads) != [head * shared + i for head in whole for i in range(shared)]:
        raise ValueError(
            f"expected all {shared} query heads that share a key/value head, or none of them, as their keys "
            f"are mapped once (map_heads key_value); got heads {list(heads)}."
        )
    return whole


def subset_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B N T D"],
    v: Float[Tensor, "B N T E"],
    phi_q: Float[Tensor, "B h T F"] | FeatureMapLike,
    phi_k: Float[Tensor, "B M T F"] | FeatureMapLike,
    *,
    heads: Sequence[int],
    window: int,
    map_heads: MapHeads = "query",
    mixing: str = "convex",
    update: StateUpdate = "additive",
    value_maps: ValueMaps | None = None,
    layout: Layout = "sliding",
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
    """`hybrid_attention` over all keys with its linear branch in h of the H heads.

    The other heads attend to their window at weight 1, whatever ``branches`` says: there is nothing to
    compare them with. S and z of the state have M heads, as many as phi(k).

    Args:
        heads: indices of the h query heads, in order.
        phi_q, phi_k: features, or maps, of those heads; of keys M.
        map_heads: whether keys are mapped for each of those query heads (M = h), or once for all that share a
            key/value head, which must then be chosen together.
        update: how S takes in a key: ``additive``, or by the ``delta`` rule (mixing convex or competing).
        value_maps: with the delta rule, projections of values to the C numbers that S keeps of them, one for
            each of its heads, and back, one for each query head.

    Other arguments and returns as in `hybrid_attention`.

    Raises:
        ValueError: ``value_maps`` without the delta rule; and what `hybrid_attention` raises.
    """
    branches = branches or Branches()
    if value_maps is not None and update != "delta":
        raise ValueError(f"expected value_maps with update delta alone, got update {update}.")
    if mixing != "convex" and update == "additive" and len(heads) == q.shape[1]:
        return hybrid_attention(
            q, k, v, phi_q, phi_k, window=window, mixing=mixing, layout=layout, gate=gate, scale=scale,
            softcap=softcap, key_mask=key_mask, segment_ids=segment_ids, branches=branches, sinks=sinks,
            sink_logits=sink_logits, initial_state=initial_state, output_final_state=output_final_state,
            reuse_state=reuse_state,
        )  # fmt: skip
    apart = mixing == "convex" or update == "delta"  # a mean of two results, of which one is there already
    read = read_by(heads, q.shape[1] // k.shape[1], map_heads)
    parts = (None, None) if initial_state is None else _split(initial_state, read, apart=apart)
    common: dict[str, Any] = {
        "key_mask": key_mask, "segment_ids": segment_ids, "output_final_state": output_final_state,
    }  # fmt: skip
    seen: dict[str, Any] = {
        **common, "window": window, "layout": layout, "scale": scale, "softcap": softcap, "sinks": sinks,
    }  # fmt: skip
    near, window_state = window_attention(
        q, k, v, sink_logits=sink_logits, initial_state=parts[0],
        reuse_state=reuse_state and apart and mixing == "convex", **seen,  # else it is read once more
    )  # fmt: skip
    index, chosen = torch.tensor(heads, device=q.device), heads_of(heads, q, k, v, map_heads)
    share = _of_heads(gate, q, index)
    if apart:
        if mixing != "convex":
            held = None if initial_state is None else _split(initial_state, read, apart=False)[1]
            logits = None if sink_logits is None else sink_logits[index]
            share = _window_share(chosen[0], chosen[1], share, held, {**seen, "sink_logits": logits})
        attention = delta_attention if update == "delta" else linear_attention
        queries, keys, values = chosen
        far, linear_state = attention(
            queries, keys, _projected(values, value_maps, 0), phi_q, phi_k, initial_state=parts[1], **common
        )
        far = _projected(far, value_maps, 1)
        mixed = _mix(near[:, index], far, share, branches, index)
    else:
        mixed, linear_state = hybrid_attention(
            *chosen, phi_q, phi_k, mixing=mixing, gate=share[..., 0], branches=flags_of(branches, index),
            sink_logits=None if sink_logits is None else sink_logits[index], initial_state=parts[1], **seen,
        )  # fmt: skip
    out = near.index_copy(1, index, mixed.to(near.dtype))
    if window_state is None or linear_state is None:
        return out, None
    sums = {name: getattr(linear_state, name) for name in _LINEAR_FIELDS}
    return out, replace(window_state, **sums)


def flags_of(branches: Branches, index: Tensor) -> Branches:
    """The flags of the chosen heads."""

    def of(flag: bool | Tensor) -> bool | Tensor:
        return flag[:, index.to(flag.device)] if isinstance(flag, Tensor) and flag.ndim == 2 else flag

    return Branches(of(branches.window), of(branches.linear), branches.reading)


def _of_heads(gate: float | Tensor, q: Tensor, index: Tensor) -> Tensor:
    """The window's weight of the chosen heads, broadcastable to [B, h, T, 1]."""
    if not isinstance(gate, Tensor):
        gate = torch.tensor(gate, dtype=accumulation_dtype(q.dtype), device=q.device)
    whole = gate.expand(*q.shape[:3])
    return whole[:, index, :, None]


def _flag(flag: bool | Tensor, like: Tensor, index: Tensor) -> Tensor:
    """Whether a branch runs, broadcastable to [B, h, T, E]."""
    on = torch.as_tensor(flag, device=like.device)
    if on.ndim == 2:
        on = on[:, index]
    return on.view(*on.shape, *[1] * (4 - on.ndim))


def _projected(values: Tensor, maps: ValueMaps | None, which: int) -> Tensor:
    """In the dtype that sums run in."""
    if maps is None:
        return values
    dtype = accumulation_dtype(values.dtype)
    with torch.autocast(values.device.type, enabled=False):
        return values.to(dtype) @ maps[which].to(dtype)


def _mix(near: Tensor, far: Tensor, gate: Tensor, branches: Branches, index: Tensor) -> Tensor:
    window, linear = (_flag(flag, near, index) for flag in (branches.window, branches.linear))
    share = gate
    if branches.reading == "renormalised":
        share = torch.where(window & ~linear, 1.0, torch.where(linear & ~window, 0.0, gate))
    return share * near * window + (1 - share) * far * linear


def _window_share(
    q: Tensor, k: Tensor, score: Tensor, state: AttentionState | None, seen: dict[str, Any]
) -> Tensor:
    """The window's part of a softmax that has the score as one more key [B, h, T, 1].

    The other part is that key's term where all values are 1, and so their mean.
    """

    def ones(x: Tensor) -> Tensor:
        return torch.ones_like(x[..., :1])

    if state is not None:
        nothing = score.new_zeros(*q.shape[:2], 1, 1)
        state = replace(
            state, values=ones(state.values), linear_state=nothing, linear_normalizer=nothing[..., 0],
            sink_values=None if state.sink_values is None else ones(state.sink_values),
        )  # fmt: skip
    settings: dict[str, Any] = {**seen, "output_final_state": False}
    other, _ = hybrid_attention(
        q, k, ones(k), ones(q), ones(q), mixing="competing", gate=score[..., 0], initial_state=state,
        branches=Branches(window=False), **settings,
    )  # fmt: skip
    return 1 - other


def _split(
    state: AttentionState, read: Sequence[int], *, apart: bool
) -> tuple[AttentionState, AttentionState]:
    """One state as all heads' windows and those of the heads read; linear attention apart keeps one token."""
    window = replace(state, **dict.fromkeys(_LINEAR_FIELDS))
    index = torch.tensor(read, device=state.keys.device)
    if not apart:
        sinks = [None if t is None else t[:, index] for t in (state.sink_keys, state.sink_values)]
        chosen = {"keys": state.keys[:, index], "values": state.values[:, index]}
        return window, replace(state, **chosen, sink_keys=sinks[0], sink_values=sinks[1])
    last = slice(-1, None)
    linear = AttentionState(
        keys=state.keys[:, index, last], values=state.values[:, index, last], valid=state.valid[:, last],
        segments=None if state.segments is None else state.segments[:, last],
        **{name: getattr(state, name) for name in _LINEAR_FIELDS},
    )  # fmt: skip
    return window, linear
