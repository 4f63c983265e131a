"""The walk over blocks of queries behind `equipoise.ops.hybrid`.

Shapes follow the legend in `equipoise.ops.types`. A block of C queries sees
- for the window: the C + R keys around it (R = how far a window looks back), and the sinks left behind;
- for linear attention: the running state (S, z) of all keys already folded, and the keys in between.
With overlap keys are folded as soon as their block is done; disjoint, folding lags by R, so that the state
never holds a key that some later query still has in its window.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from equipoise.ops.folded import Folded
from equipoise.ops.mix import MIXING_RULES, Branch
from equipoise.ops.sinks import Sinks
from equipoise.ops.tokens import causal_mask, index_tokens, last_slots, window_mask
from equipoise.ops.types import AttentionState, Call, FeatureMapLike, accumulation_dtype, history_length


class Walk:
    """One pass over the queries.

    Attributes, all but the call itself on one axis of R + T tokens, history first:
        keys, values: [B, N, X, D], [B, N, X, E].
        features: phi(k) [B, M, X, F] where it was given as a tensor.
        tokens: validity, segments, ranks of the X tokens.
        folded: what linear attention has summed up.
        sinks: what the window has left behind.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.dtype = accumulation_dtype(call.q.dtype)
        self.batch, self.heads, self.length, _ = call.q.shape
        self.history = history_length(call.window, call.layout)
        self.tokens = index_tokens(
            batch=self.batch, length=self.length, device=call.q.device, key_mask=call.key_mask,
            segment_ids=call.segment_ids, state=call.state, sinks=call.sinks, layout=call.layout,
        )  # fmt: skip
        self._take_up()
        self.window_on = self._flag(call.branches.window) if call.window is not None else False
        self.linear_on = self._flag(call.branches.linear) if call.phi_k is not None else False
        # Rows whose linear branch stands alone attend to every key, also where the hybrid's is disjoint.
        self.all_keys: bool | Tensor = False
        if call.branches.reading == "renormalised":
            off = self.window_on
            self.all_keys = ~off if isinstance(off, Tensor) else not off
        self.gates = self._gates()
        self._masks: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _take_up(self) -> None:
        """Put history and new tokens on one axis."""
        call, state, past = self.call, self.call.state, self.tokens.history
        self.queries, self.keys, self.values = self._clean(call.q), self._clean(call.k), self._clean(call.v)
        self.query_features = self._clean(call.phi_q) if isinstance(call.phi_q, Tensor) else None
        self.features = self._clean(call.phi_k) if isinstance(call.phi_k, Tensor) else None
        self.folded = Folded.of(state, past - (self.history if call.lagging else 0) if state else 0)
        self.sinks = Sinks.of(state)
        if state is None:
            return
        self.keys = torch.cat([state.keys, self.keys], 2)
        self.values = torch.cat([state.values, self.values], 2)
        if self.features is not None:
            before = state.features
            if before is None:  # overlap never looks back at a feature: zeros only keep the axis aligned
                before = self.features.new_zeros(*self.features.shape[:2], past, self.features.shape[-1])
            self.features = torch.cat([before, self.features], 2)

    def _clean(self, tensor: Tensor) -> Tensor:
        """What stands in padding may be anything, NaN included: 0 takes its place, and comes out."""
        mask = self.call.key_mask
        return tensor if mask is None else tensor.masked_fill(~mask[:, None, :, None], 0)

    def _flag(self, flag: bool | Tensor) -> bool | Tensor:
        """[B] or [B, H] -> [B, 1 or H, 1, 1], to broadcast against scores and outputs."""
        if isinstance(flag, bool):
            return flag
        return flag.to(self.call.q.device).reshape(self.batch, -1, 1, 1)

    def _gates(self) -> Tensor:
        gate = torch.as_tensor(self.call.gate, dtype=self.dtype, device=self.call.q.device)
        return gate.expand(self.batch, self.heads, self.length)[..., None]

    def run(self, output_final_state: bool) -> tuple[Tensor, AttentionState | None]:
        """The output [B, H, T, E], and the state after the last token if asked for."""
        chunk = self.call.chunk_size
        blocks = [self._block(s, min(s + chunk, self.length)) for s in range(0, self.length, chunk)]
        out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
        return self._clean(out.to(self.call.q.dtype)), self._final_state() if output_final_state else None

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
            features = self.features if self.call.lagging else None
            left = max(0, rows.stop - self.history)
            self.sinks = self.sinks.leave(
                left, self.call.sinks, self.keys, self.values, features, self.tokens
            )
        return self._mix(window, linear, self.gates[:, :, start:stop])

    # ---- the two branches

    def _window(self, start: int, rows: slice) -> Branch:
        columns = slice(max(0, rows.start - self.history), rows.stop)
        keys, values = self.keys[:, :, columns].to(self.dtype), self.values[:, :, columns].to(self.dtype)
        mask = self._block_masks(rows, columns)[1]
        if self.sinks.keys is not None and self.sinks.values is not None:
            keys = torch.cat([self.sinks.keys.to(self.dtype), keys], 2)
            values = torch.cat([self.sinks.values.to(self.dtype), values], 2)
            mask = torch.cat([self.sinks.mask(self.tokens, rows), mask.expand(self.batch, -1, -1, -1)], -1)
        queries = self.queries[:, :, start : start + rows.stop - rows.start].to(self.dtype)
        scores = _products(queries, keys) * self.call.scale
        if self.call.softcap is not None:
            scores = torch.tanh(scores / self.call.softcap) * self.call.softcap
        scores = scores.masked_fill(~mask, -torch.inf)
        if self.call.sink_logits is not None:
            logits = self.call.sink_logits.to(self.dtype)[None, :, None, None]
            scores = torch.cat([logits.expand(*scores.shape[:3], 1), scores], -1)
        top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(self.dtype).min)
        weights = torch.exp(scores - top)
        mass = weights.sum(-1, keepdim=True)
        seen = weights[..., -keys.shape[2] :]  # all but the sink's: its value is 0
        return Branch(_weighted(seen, values), mass, mask.any(-1, keepdim=True), top)

    def _linear(self, start: int, rows: slice) -> Branch:
        columns = self._linear_columns(rows)
        fresh, fresh_values = self._key_features(columns), self.values[:, :, columns].to(self.dtype)
        features, values, mask = fresh, fresh_values, self._linear_mask(rows, columns)
        sinks = self.sinks
        if self.call.lagging and self.all_keys is not False and sinks.keys is not None:
            assert sinks.values is not None
            sink_mask = sinks.mask(self.tokens, rows) & self.all_keys
            features = torch.cat([self._sink_features(sinks.keys), features], 2)
            values = torch.cat([sinks.values.to(self.dtype), values], 2)
            mask = torch.cat([sink_mask, mask.expand(*sink_mask.shape[:-1], -1)], -1)
        phi_q = self._query_features(start, rows)
        weights = _products(phi_q, features).masked_fill(~mask, 0)
        near = Branch(_weighted(weights, values), weights.sum(-1, keepdim=True), mask.any(-1, keepdim=True))
        branch = self.folded.add_to(near, phi_q, self.tokens, rows)
        stop = max(columns.start, rows.stop - (self.history if self.call.lagging else 0))
        if stop > columns.start:  # no later query has these keys in its window
            count = stop - columns.start
            self.folded = self.folded.fold(
                stop, fresh[:, :, :count], fresh_values[:, :, :count], self.tokens,
                skip_sinks=self.call.sinks if self.call.lagging else 0,
            )  # fmt: skip
        return branch

    def _linear_columns(self, rows: slice) -> slice:
        """The keys not yet folded that some query of the block may see."""
        if not self.call.lagging or self.all_keys is not False:
            return slice(self.folded.stop, rows.stop)
        # the last min(R, w) keys are in every query's window
        near = min(self.history, cast(int, self.call.window))
        return slice(self.folded.stop, max(self.folded.stop, rows.stop - near))

    def _mix(self, window: Branch | None, linear: Branch | None, gate: Tensor) -> Tensor:
        if window is None or linear is None:  # a hybrid of one branch: no gate to speak of
            branch, flag = (window, self.window_on) if linear is None else (linear, self.linear_on)
            assert branch is not None
            return branch.normalised() * flag
        window_term, linear_term = MIXING_RULES[self.call.mixing](window, linear, gate)
        out = window_term * self.window_on + linear_term * self.linear_on
        if self.call.branches.reading == "renormalised":
            window_on, linear_on = (
                torch.as_tensor(flag, device=out.device) for flag in (self.window_on, self.linear_on)
            )
            out = torch.where(window_on & ~linear_on, window.normalised(), out)
            out = torch.where(linear_on & ~window_on, linear.normalised(), out)
        return out

    # ---- masks and features

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

    def _linear_mask(self, rows: slice, columns: slice) -> Tensor:
        causal, window = self._block_masks(rows, columns)
        if not self.call.lagging or self.all_keys is True:
            return causal
        return causal & (~window | self.all_keys)

    def _query_features(self, start: int, rows: slice) -> Tensor:
        part = slice(start, start + rows.stop - rows.start)
        if self.query_features is not None:
            return self.query_features[:, :, part].to(self.dtype)
        return cast(FeatureMapLike, self.call.phi_q)(self.queries[:, :, part].to(self.dtype))

    def _key_features(self, columns: slice) -> Tensor:
        if self.features is not None:
            return self.features[:, :, columns].to(self.dtype)
        features = cast(FeatureMapLike, self.call.phi_k)(self.keys[:, :, columns].to(self.dtype))
        if self.tokens.valid is not None:  # phi(0) need not be 0
            features = features.masked_fill(~self.tokens.valid[:, None, columns, None], 0)
        return features

    def _sink_features(self, keys: Tensor) -> Tensor:
        if self.sinks.features is not None:
            return self.sinks.features.to(self.dtype)
        return cast(FeatureMapLike, self.call.phi_k)(keys.to(self.dtype))

    # ---- what the call leaves behind

    def _final_state(self) -> AttentionState:
        call, tokens, count = self.call, self.tokens, self.history
        valid = tokens.valid
        if valid is None:
            valid = torch.ones(self.batch, tokens.length, dtype=torch.bool, device=call.q.device)
        lagging_features = self.features if call.lagging else None
        segmented = tokens.segments is not None
        sinks = self.sinks.or_empty(call.sinks, self.keys, self.values, lagging_features, segmented)
        folded = self.folded
        if call.phi_k is not None:
            folded = folded.or_empty(self._key_features(slice(0, 1)), self.values.shape[-1], segmented)

        def last(tensor: Tensor | None, dim: int, fill: int = 0) -> Tensor | None:
            return None if tensor is None else last_slots(tensor, count, dim, fill)

        return AttentionState(
            keys=last_slots(self.keys, count, 2), values=last_slots(self.values, count, 2),
            valid=last_slots(valid, count, 1), linear_state=folded.sums, linear_normalizer=folded.normalizer,
            folded=folded.count, segments=last(tokens.segments, 1, -1), folded_segment=folded.segment,
            ranks=last(tokens.ranks, 1), offsets=last(tokens.offsets, 1), sink_keys=sinks.keys,
            sink_values=sinks.values, sink_valid=sinks.valid, sink_segment=sinks.segment,
            features=last(lagging_features, 2), sink_features=sinks.features,
        )  # fmt: skip


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, H, C, X] x [B, N or H, n, X] -> [B, H, C, n], without repeating keys for their query heads."""
    batch, heads, count, size = rows.shape
    grouped = rows.reshape(batch, columns.shape[1], heads // columns.shape[1] * count, size)
    return (grouped @ columns.mT).view(batch, heads, count, columns.shape[2])


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """[B, H, C, n] x [B, N, n, E] -> [B, H, C, E]."""
    batch, heads, count, size = weights.shape
    grouped = weights.reshape(batch, values.shape[1], heads // values.shape[1] * count, size)
    return (grouped @ values).view(batch, heads, count, values.shape[-1])
