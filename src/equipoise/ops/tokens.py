"""Which key may be seen by which query: positions, segments, padding, sinks and the layout of the window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from equipoise.ops.types import AttentionState, Layout


@dataclass(frozen=True)
class Tokens:
    """History and new tokens side by side on one axis of length X = history + T.

    Attributes:
        history: how many of them come from the state.
        length: X.
        valid: real tokens [B, X]; None when all are.
        segments: segment ids [B, X]; None when there is one segment.
        ranks: number of real tokens before, in the same segment [B, X]; only where sinks or terraces need it.
        offsets: distance from the segment's first real token [B, X]; likewise.
    """

    history: int
    length: int
    valid: Tensor | None
    segments: Tensor | None
    ranks: Tensor | None
    offsets: Tensor | None

    @property
    def uniform(self) -> bool:
        """Whether every row of the batch sees the same keys."""
        return self.valid is None and self.segments is None


def segment_ids_from_cu_seqlens(cu_seqlens: Int[Tensor, " S"], length: int) -> Int[Tensor, "1 T"]:
    """Segment ids of one packed row, from the bounds that FlashAttention's variable-length calls take.

    Args:
        cu_seqlens: where each of S - 1 sequences starts, and the length of the row last; some may be empty.
        length: T of the row.

    Raises:
        ValueError: bounds that do not cover the row from 0 to T in order.
    """
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
        raise ValueError(
            f"expected cu_seqlens that rise from 0 to the row's length, {length}, got {bounds}: sequences "
            "are packed into one row, and a token outside of all of them would see its neighbours'."
        )
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)[None]


def index_tokens(
    *,
    batch: int,
    length: int,
    device: torch.device,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    state: AttentionState | None,
    sinks: int,
    layout: Layout,
) -> Tokens:
    """Number the new tokens [B, T], continuing from the state's."""
    history = 0 if state is None else state.valid.shape[1]
    valid, segments = key_mask, segment_ids
    if state is not None:
        new_valid = (
            torch.ones(batch, length, dtype=torch.bool, device=device) if key_mask is None else key_mask
        )
        valid = torch.cat([state.valid, new_valid], 1)
        if segment_ids is not None:
            assert state.segments is not None
            segments = torch.cat([state.segments, segment_ids], 1)
    ranks = offsets = None
    if sinks or layout == "terraced":
        new_valid = (
            torch.ones(batch, length, dtype=torch.bool, device=device) if key_mask is None else key_mask
        )
        ranks = _ranks(new_valid, segment_ids, state)
        if layout == "terraced":
            offsets = _offsets(ranks, state)
            if state is not None and state.offsets is not None:
                offsets = torch.cat([state.offsets, offsets], 1)
        if state is not None and state.ranks is not None:
            ranks = torch.cat([state.ranks, ranks], 1)
    return Tokens(history, history + length, valid, segments, ranks, offsets)


def _ranks(valid: Tensor, segments: Tensor | None, state: AttentionState | None) -> Tensor:
    counted = valid.long().cumsum(1)
    before = counted - valid.long()
    carried = torch.zeros_like(before[:, :1])
    starts = torch.zeros_like(valid)
    if segments is not None:
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    if state is not None and state.ranks is not None:
        carried = state.ranks[:, -1:] + state.valid[:, -1:].long()
        if segments is not None and state.segments is not None:
            starts[:, 0] = segments[:, 0] != state.segments[:, -1]
    # `before` never falls, so the largest value at a start so far is the latest start's.
    return before - torch.where(starts, before, -carried).cummax(1).values


def _offsets(ranks: Tensor, state: AttentionState | None) -> Tensor:
    slots = torch.arange(ranks.shape[1], device=ranks.device).expand_as(ranks)
    carried = torch.zeros_like(ranks[:, :1])
    if state is not None and state.offsets is not None:
        carried = state.offsets[:, -1:] + 1
    return slots - torch.where(ranks == 0, slots, -carried).cummax(1).values


def causal_mask(tokens: Tokens, rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Keys a query could see at all: not later, real, of its own segment [B or 1, 1, rows, columns]."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(columns.start, columns.stop, device=device)[None]
    mask = (j <= i)[None, None]
    if tokens.valid is not None:
        mask = mask & tokens.valid[:, None, None, columns]
    if tokens.segments is not None:
        mask = mask & (tokens.segments[:, None, rows, None] == tokens.segments[:, None, None, columns])
    return mask


def window_mask(
    tokens: Tokens, rows: slice, columns: slice, causal: Tensor, *, window: int, layout: Layout, sinks: int
) -> Tensor:
    """Keys in the query's window or among its sinks; ``causal`` is `causal_mask` of the same block."""
    if layout == "terraced":
        assert tokens.offsets is not None
        blocks = tokens.offsets.div(window, rounding_mode="floor")
        near = blocks[:, None, rows, None] - blocks[:, None, None, columns] <= 1
    else:
        i = torch.arange(rows.start, rows.stop, device=causal.device)[:, None]
        j = torch.arange(columns.start, columns.stop, device=causal.device)[None]
        near = (i - j < window)[None, None]
    if sinks:
        assert tokens.ranks is not None
        near = near | (tokens.ranks[:, None, None, columns] < sinks)
    return near & causal


def last_slots(tensor: Tensor, count: int, dim: int, fill: int = 0) -> Tensor:
    """The last ``count`` entries along ``dim``, filled up in front where there are fewer.

    A copy, not a view: a view would keep the whole prompt in memory for as long as the state lives.
    """
    size = tensor.shape[dim]
    if size >= count:
        return tensor.narrow(dim, size - count, count).clone()
    after = tensor.ndim - 1 - (dim % tensor.ndim)
    return functional.pad(tensor, (0, 0) * after + (count - size, 0), value=fill)
