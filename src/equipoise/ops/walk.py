"""The walk over blocks of queries behind `equipoise.ops.hybrid`.

Shapes follow the legend in `equipoise.ops.types`. A block of C queries sees
- for the window: the C + R keys around it (R = how far a window looks back);
- for linear attention: the running state (S, z) of all keys already folded, and the keys in between.
With overlap keys are folded as soon as their block is done; disjoint, folding lags by R, so that the state
never holds a key that some later query still has in its window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from equipoise.ops.mix import MIXING_RULES, Branch
from equipoise.ops.tokens import causal_mask, index_tokens, last_slots, window_mask
from equipoise.ops.types import (
    AttentionState,
    Branches,
    FeatureMapLike,
    Layout,
    accumulation_dtype,
    history_length,
)


@dataclass(frozen=True)
class Call:
    """The arguments of one `hybrid_attention` call."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | FeatureMapLike | None
    phi_k: Tensor | FeatureMapLike | None
    window: int | None
    layout: Layout
    mixing: str
    gate: float | Tensor
    lagging: bool
    scale: float
    softcap: float | None
    key_mask: Tensor | None
    segment_ids: Tensor | None
    branches: Branches
    sinks: int
    state: AttentionState | None
    chunk_size: int


@dataclass
class _Folded:
    """Running sums over the keys folded so far; ``stop`` is the first token not yet folded."""

    stop: int
    sums: Tensor | None = None  # S [B, M, F, E]
    normalizer: Tensor | None = None  # z [B, M, F]
    count: Tensor | None = None  # [B]
    segment: Tensor | None = None  # [B]


@dataclass
class _Sinks:
    """Sinks that the window has left behind; ``stop`` is the first token not yet looked at."""

    stop: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    valid: Tensor | None = None
    segment: Tensor | None = None
    features: Tensor | None = None


@dataclass
class Walk:
    """One pass over the queries."""

    call: Call
    folded: _Folded = field(init=False)
    sinks: _Sinks = field(init=False)

    def __post_init__(self) -> None:
        call, state = self.call, self.call.state
        self.dtype = accumulation_dtype(call.q.dtype)
        self.batch, self.heads, self.length, _ = call.q.shape
        self.history = history_length(call.window, call.layout)
        self.tokens = index_tokens(
            batch=self.batch, length=self.length, device=call.q.device, key_mask=call.key_mask,
            segment_ids=call.segment_ids, state=state, sinks=call.sinks, layout=call.layout,
        )  # fmt: skip
        self.keys = call.k if state is None else torch.cat([state.keys, call.k], 2)
        self.values = call.v if state is None else torch.cat([state.values, call.v], 2)
        if self.tokens.valid is not None:  # what stands in padding may be anything, NaN included
            absent = ~self.tokens.valid[:, None, :, None]
            self.keys, self.values = self.keys.masked_fill(absent, 0), self.values.masked_fill(absent, 0)
        self._take_up(state)
        self.window_on = self._flag(call.branches.window) if call.window is not None else False
        self.linear_on = self._flag(call.branches.linear) if call.phi_k is not None else False
        alone = call.branches.reading == "renormalised"
        # Rows whose linear branch stands alone attend to every key, also where the hybrid's is disjoint.
        self.all_keys = (not self.window_on if isinstance(self.window_on, bool) else ~self.window_on) if alone else False
        self.gates = self._gates()
        self._masks: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _take_up(self, state: AttentionState | None) -> None:
        past = self.tokens.history
        lag = self.history if self.call.lagging else 0
        self.folded, self.sinks = _Folded(max(0, past - lag)), _Sinks()
        self.features = self.call.phi_k if isinstance(self.call.phi_k, Tensor) else None
        if state is None:
            return
        if state.linear_state is not None:
            self.folded = _Folded(
                past - lag, state.linear_state, state.linear_normalizer, state.folded, state.folded_segment
            )
        self.sinks = _Sinks(
            0, state.sink_keys, state.sink_values, state.sink_valid, state.sink_segment, state.sink_features
        )
        if self.features is not None:
            before = state.features
            if before is None:  # overlap never looks back at a feature: zeros only keep the axis aligned
                before = self.features.new_zeros(*self.features.shape[:2], past, self.features.shape[-1])
            self.features = torch.cat([before, self.features], 2)

    def _flag(self, flag: bool | Tensor) -> bool | Tensor:
        """[B] or [B, H] -> [B, 1 or H, 1, 1], to broadcast against scores and outputs."""
        if isinstance(flag, bool):
            return flag
        return flag.to(self.call.q.device).reshape(self.batch, -1, 1, 1)

    def _gates(self) -> Tensor:
        gate = torch.as_tensor(self.call.gate, dtype=self.dtype, device=self.call.q.device)
        return gate.expand(self.batch, self.heads, self.length)[..., None]

    def run(self, output_final_state: bool) -> tuple[Tensor, AttentionState | None]:
        chunk = self.call.chunk_size
        blocks = [self._block(s, min(s + chunk, self.length)) for s in range(0, self.length, chunk)]
        out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
        return out.to(self.call.q.dtype), self._final_state() if output_final_state else None

    def _block(self, start: int, stop: int) -> Tensor:
        """Output of queries start..stop [B, H, C, E]; folds what they leave behind."""
        past = self.tokens.history
        rows = slice(past + start, past + stop)
        window = linear = None
        if self.call.window is not None:
            window = self._window(start, rows)
        if self.call.phi_k is not None:
            linear = self._linear(start, rows)
        if self.call.sinks:
            self._leave(max(0, rows.stop - self.history))
        return self._mix(window, linear, self.gates[:, :, start:stop])

    # ---- the two branches

    def _window(self, start: int, rows: slice) -> Branch:
        columns = slice(max(0, rows.start - self.history), rows.stop)
        keys, values = self.keys[:, :, columns].to(self.dtype), self.values[:, :, columns].to(self.dtype)
        mask = self._window_mask(rows, columns)
        if self.sinks.keys is not None:
            assert self.sinks.values is not None
            keys = torch.cat([self.sinks.keys.to(self.dtype), keys], 2)
            values = torch.cat([self.sinks.values.to(self.dtype), values], 2)
            mask = torch.cat([self._sink_mask(rows), mask.expand(self.batch, -1, -1, -1)], -1)
        queries = self.call.q[:, :, start : start + rows.stop - rows.start].to(self.dtype)
        scores = self._products(queries, keys) * self.call.scale
        if self.call.softcap is not None:
            scores = torch.tanh(scores / self.call.softcap) * self.call.softcap
        scores = scores.masked_fill(~mask, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(self.dtype).min)
        weights = torch.exp(scores - top)
        return Branch(self._weighted(weights, values), weights.sum(-1, keepdim=True), mask.any(-1, keepdim=True))

    def _linear(self, start: int, rows: slice) -> Branch:
        some_all = self.all_keys is not False
        stop = rows.stop
        if self.call.lagging and not some_all:  # the last min(R, w) keys are in every query's window
            stop = max(self.folded.stop, rows.stop - min(self.history, cast(int, self.call.window)))
        columns = slice(self.folded.stop, stop)
        features = self._key_features(columns)
        values = self.values[:, :, columns].to(self.dtype)
        mask = self._linear_mask(rows, columns)
        fresh, fresh_values = features, values
        if self.call.lagging and some_all and self.sinks.keys is not None:
            assert self.sinks.values is not None
            sink_mask = self._sink_mask(rows) & self.all_keys
            features = torch.cat([self._sink_features(), features], 2)
            values = torch.cat([self.sinks.values.to(self.dtype), values], 2)
            mask = torch.cat([sink_mask, mask.expand(*sink_mask.shape[:-1], -1)], -1)
        phi_q = self._query_features(start, rows)
        weights = self._products(phi_q, features).masked_fill(~mask, 0)
        branch = self._with_state(
            phi_q, rows, self._weighted(weights, values), weights.sum(-1, keepdim=True), mask.any(-1, keepdim=True)
        )
        self._fold(columns, rows.stop, fresh, fresh_values)
        return branch

    def _with_state(
        self, phi_q: Tensor, rows: slice, numerator: Tensor, denominator: Tensor, visible: Tensor
    ) -> Branch:
        """Add what the folded keys contribute."""
        folded = self.folded
        if folded.sums is None or folded.normalizer is None or folded.count is None:
            return Branch(numerator, denominator, visible)
        batch, memories = folded.sums.shape[:2]
        grouped = phi_q.reshape(batch, memories, -1, phi_q.shape[-1])
        far = (grouped @ folded.sums).view_as(numerator)
        weight = (grouped @ folded.normalizer[..., None]).view_as(denominator)
        seen = (folded.count > 0)[:, None, None, None]
        if self.tokens.segments is not None and folded.segment is not None:
            same = (self.tokens.segments[:, rows] == folded.segment[:, None])[:, None, :, None]
            far, weight, seen = far * same, weight * same, seen & same
        return Branch(numerator + far, denominator + weight, visible | seen)

    def _mix(self, window: Branch | None, linear: Branch | None, gate: Tensor) -> Tensor:
        if window is None or linear is None:  # a hybrid of one branch: no gate to speak of
            branch, flag = (window, self.window_on) if linear is None else (linear, self.linear_on)
            assert branch is not None
            return branch.normalised() * flag
        window_term, linear_term = MIXING_RULES[self.call.mixing](window, linear, gate)
        out = window_term * self.window_on + linear_term * self.linear_on
        if self.call.branches.reading == "renormalised":
            w, l = (torch.as_tensor(f, device=out.device) for f in (self.window_on, self.linear_on))
            out = torch.where(w & ~l, window.normalised(), out)
            out = torch.where(l & ~w, linear.normalised(), out)
        return out

    # ---- masks, products, features

    def _block_masks(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """(causal, window) masks of a block; without padding and segments, blocks of one shape share them."""
        key = (rows.start - columns.start, rows.stop - rows.start, columns.stop - columns.start)
        shared = self.tokens.uniform and self.tokens.ranks is None
        if shared and key in self._masks:
            return self._masks[key]
        causal = causal_mask(self.tokens, rows, columns, self.call.q.device)
        window = causal
        if self.call.window is not None:
            window = window_mask(
                self.tokens, rows, columns, causal,
                window=self.call.window, layout=self.call.layout, sinks=self.call.sinks,
            )  # fmt: skip
        if shared:
            self._masks[key] = (causal, window)
        return causal, window

    def _window_mask(self, rows: slice, columns: slice) -> Tensor:
        return self._block_masks(rows, columns)[1]

    def _linear_mask(self, rows: slice, columns: slice) -> Tensor:
        causal, window = self._block_masks(rows, columns)
        if not self.call.lagging or self.all_keys is True:
            return causal
        return causal & (~window | self.all_keys)

    def _sink_mask(self, rows: slice) -> Tensor:
        """Sinks left behind are visible to every query of their segment [B, 1, C, P]."""
        assert self.sinks.valid is not None
        mask = self.sinks.valid[:, None, None, :].expand(-1, -1, rows.stop - rows.start, -1)
        if self.tokens.segments is not None:
            assert self.sinks.segment is not None
            mask = mask & (self.tokens.segments[:, rows] == self.sinks.segment[:, None])[:, None, :, None]
        return mask

    def _products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[B, H, C, X] x [B, N or H, n, X] -> [B, H, C, n], without repeating keys for their query heads."""
        batch, heads, count, size = rows.shape
        grouped = rows.reshape(batch, columns.shape[1], heads // columns.shape[1] * count, size)
        return (grouped @ columns.mT).view(batch, heads, count, columns.shape[2])

    def _weighted(self, weights: Tensor, values: Tensor) -> Tensor:
        """[B, H, C, n] x [B, N, n, E] -> [B, H, C, E]."""
        batch, heads, count, size = weights.shape
        grouped = weights.reshape(batch, values.shape[1], heads // values.shape[1] * count, size)
        return (grouped @ values).view(batch, heads, count, values.shape[-1])

    def _query_features(self, start: int, rows: slice) -> Tensor:
        part = slice(start, start + rows.stop - rows.start)
        if isinstance(self.call.phi_q, Tensor):
            return self.call.phi_q[:, :, part].to(self.dtype)
        assert self.call.phi_q is not None
        return self.call.phi_q(self.call.q[:, :, part].to(self.dtype))

    def _key_features(self, columns: slice) -> Tensor:
        if self.features is not None:
            features = self.features[:, :, columns].to(self.dtype)
        else:
            features = cast(FeatureMapLike, self.call.phi_k)(self.keys[:, :, columns].to(self.dtype))
        if self.tokens.valid is not None:
            features = features.masked_fill(~self.tokens.valid[:, None, columns, None], 0)
        return features

    def _sink_features(self) -> Tensor:
        if self.sinks.features is not None:
            return self.sinks.features
        assert self.sinks.keys is not None
        return cast(FeatureMapLike, self.call.phi_k)(self.sinks.keys.to(self.dtype))

    # ---- what the block leaves behind

    def _fold(self, columns: slice, done: int, features: Tensor, values: Tensor) -> None:
        """Add the keys no later query has in its window to S and z (``columns`` are the features' tokens)."""
        stop = max(columns.start, done - (self.history if self.call.lagging else 0))
        count = stop - columns.start
        if count == 0:
            return
        features, values = features[:, :, :count], values[:, :, :count]
        fresh, folded = slice(columns.start, stop), self.folded
        kept = torch.ones(self.batch, count, dtype=torch.bool, device=features.device)
        if self.tokens.valid is not None:
            kept = kept & self.tokens.valid[:, fresh]
        if self.call.lagging and self.tokens.ranks is not None and self.call.sinks:
            kept = kept & (self.tokens.ranks[:, fresh] >= self.call.sinks)
        segment = None
        if self.tokens.segments is not None:
            segment = self.tokens.segments[:, stop - 1]
            kept = kept & (self.tokens.segments[:, fresh] == segment[:, None])
        if self.tokens.segments is not None or (self.call.lagging and self.call.sinks):
            features = features.masked_fill(~kept[:, None, :, None], 0)
        groups = features.shape[1] // values.shape[1]
        values = values.repeat_interleave(groups, 1) if groups > 1 else values
        sums, normalizer, number = features.mT @ values, features.sum(2), kept.sum(1)
        if folded.sums is not None and folded.normalizer is not None and folded.count is not None:
            old_sums, old_normalizer, old_count = folded.sums, folded.normalizer, folded.count
            if segment is not None and folded.segment is not None:
                same = folded.segment == segment
                old_sums = old_sums * same[:, None, None, None]
                old_normalizer, old_count = old_normalizer * same[:, None, None], old_count * same
            sums, normalizer, number = old_sums + sums, old_normalizer + normalizer, old_count + number
        self.folded = _Folded(stop, sums, normalizer, number, segment)

    def _leave(self, stop: int) -> None:
        """Keep the sinks among the tokens that the next block's window no longer reaches."""
        gone, sinks = slice(self.sinks.stop, stop), self.sinks
        if gone.stop <= gone.start:
            return
        assert self.tokens.ranks is not None
        numbers = torch.arange(self.call.sinks, device=self.call.q.device)
        chosen = self.tokens.ranks[:, gone, None] == numbers
        if self.tokens.valid is not None:
            chosen = chosen & self.tokens.valid[:, gone, None]
        segment = None
        if self.tokens.segments is not None:
            segment = self.tokens.segments[:, stop - 1]
            chosen = chosen & (self.tokens.segments[:, gone] == segment[:, None])[..., None]
        pick = chosen.to(self.dtype).mT[:, None]  # one-hot rows [B, 1, P, n]: exact copies, differentiable
        keep: Tensor | None = None
        if sinks.valid is not None:
            keep = sinks.valid if segment is None else sinks.valid & (sinks.segment == segment)[:, None]

        def update(old: Tensor | None, source: Tensor) -> Tensor:
            new = (pick @ source.to(self.dtype)).to(source.dtype)
            return new if old is None or keep is None else new + old * keep[:, None, :, None]

        features = None
        if self.features is not None and self.call.lagging:
            features = update(sinks.features, self.features[:, :, gone].to(self.dtype))
        valid = chosen.any(1) if keep is None else chosen.any(1) | keep
        self.sinks = _Sinks(
            stop, update(sinks.keys, self.keys[:, :, gone]), update(sinks.values, self.values[:, :, gone]),
            valid, segment, features,
        )  # fmt: skip

    def _final_state(self) -> AttentionState:
        tokens, count = self.tokens, self.history
        valid = tokens.valid
        if valid is None:
            valid = torch.ones(self.batch, tokens.length, dtype=torch.bool, device=self.call.q.device)
        folded, sinks = self._folded_or_empty(), self._sinks_or_empty()

        def last(tensor: Tensor | None, dim: int, fill: int = 0) -> Tensor | None:
            return None if tensor is None else last_slots(tensor, count, dim, fill)

        return AttentionState(
            keys=last_slots(self.keys, count, 2), values=last_slots(self.values, count, 2),
            valid=last_slots(valid, count, 1), linear_state=folded.sums, linear_normalizer=folded.normalizer,
            folded=folded.count, segments=last(tokens.segments, 1, -1), folded_segment=folded.segment,
            ranks=last(tokens.ranks, 1), offsets=last(tokens.offsets, 1), sink_keys=sinks.keys,
            sink_values=sinks.values, sink_valid=sinks.valid, sink_segment=sinks.segment,
            features=last(self.features, 2) if self.call.lagging else None, sink_features=sinks.features,
        )  # fmt: skip

    def _folded_or_empty(self) -> _Folded:
        if self.call.phi_k is None or self.folded.sums is not None:
            return self.folded
        probe = self._key_features(slice(0, 1))
        memories, size = probe.shape[1], probe.shape[-1]
        segment = None if self.tokens.segments is None else self.tokens.segments.new_full((self.batch,), -1)
        return _Folded(
            self.folded.stop,
            probe.new_zeros(self.batch, memories, size, self.values.shape[-1]),
            probe.new_zeros(self.batch, memories, size),
            torch.zeros(self.batch, dtype=torch.long, device=probe.device),
            segment,
        )

    def _sinks_or_empty(self) -> _Sinks:
        if not self.call.sinks or self.sinks.keys is not None:
            return self.sinks
        count = self.call.sinks
        features = None
        if self.features is not None and self.call.lagging:
            features = self.features.new_zeros(*self.features.shape[:2], count, self.features.shape[-1])
        segment = None if self.tokens.segments is None else self.tokens.segments.new_full((self.batch,), -1)
        return _Sinks(
            0, *(t.new_zeros(*t.shape[:2], count, t.shape[-1]) for t in (self.keys, self.values)),
            torch.zeros(self.batch, count, dtype=torch.bool, device=self.keys.device), segment, features,
        )  # fmt: skip

