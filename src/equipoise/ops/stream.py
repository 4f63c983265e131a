"""The fast path on CPU: one pass over chunks of queries whose scratch memory stays in cache.

Computes what `equipoise.ops.walk` does, for sliding windows; `equipoise.ops.with_sinks` adds the sinks. Three
things make it faster: the window's softmax is one fused call on a band of C + w - 1 keys, the running sums
are updated in place, and every chunk writes straight into the output. Shapes follow the legend in
`equipoise.ops.types`; C is the chunk, X the tokens of history and call on one axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from equipoise.ops.tokens import Tokens, causal_mask, index_tokens, last_slots, window_mask
from equipoise.ops.types import AttentionState, Call, FeatureMapLike, accumulation_dtype, history_length

HIDDEN = -1e30
"""Score of a key that is not seen. Not -inf: a row of padding sees no key, yet its softmax must be finite."""


@dataclass(frozen=True)
class Weights:
    """What each branch's normalised output is multiplied by [B, H, T, 1]; None where it is not computed."""

    window: Tensor | None
    linear: Tensor | None


def unsupported(call: Call) -> str | None:
    """Why this path cannot take a call; None if it can."""
    if call.layout != "sliding":
        return "terraced windows"
    flags = (call.branches.window, call.branches.linear)
    both = all(flag is True for flag in flags)
    if call.window == 0 or (call.sinks and (call.lagging or not both or call.mixing == "shared")):
        return "sinks"
    if call.phi_k is not None and isinstance(call.phi_q, Tensor) != isinstance(call.phi_k, Tensor):
        return "features of queries as a tensor and of keys as a map, or the reverse"
    if call.mixing != "convex" and not both and None not in (call.window, call.phi_k):
        return f"one branch of mixing {call.mixing!r} switched off"
    if call.lagging and not both and call.branches.reading == "renormalised":
        return "one branch of disjoint attention renormalised"
    if call.mixing not in ("convex", "shared", "calibrated"):
        return f"mixing {call.mixing!r}"
    if call.mixing == "calibrated" and call.lagging:
        return "mixing 'calibrated' of disjoint attention"
    return None


class Stream:
    """One call, cut into chunks. Everything is on the axis X: history first, then the T new tokens."""

    def __init__(self, call: Call, *, totals: bool = False) -> None:
        """``totals``: whether the logarithms of the denominators are asked for beside the output."""
        self.call, self.totals = call, totals
        self.dtype = accumulation_dtype(call.q.dtype)
        self.batch, self.heads, self.length, self.size = call.q.shape
        self.kv_heads, self.value_size = call.k.shape[1], call.v.shape[-1]
        self.history = history_length(call.window, call.layout)
        self.tokens = self._tokens()
        self.past = self.tokens.history
        self.lag = self.history if call.lagging else 0
        mask = call.key_mask
        self.queries, self.keys, self.values = (self._clean(x, mask) for x in (call.q, call.k, call.v))
        both = call.window is not None and call.phi_k is not None
        self.shared, self.calibrated = (both and call.mixing == name for name in ("shared", "calibrated"))
        self.masks: dict[tuple[int, int, int], tuple[Tensor | None, Tensor]] = {}

    def _tokens(self) -> Tokens:
        call = self.call
        tokens = index_tokens(
            batch=self.batch, length=self.length, device=call.q.device, key_mask=call.key_mask,
            segment_ids=call.segment_ids, state=call.state, sinks=0, layout=call.layout,
        )  # fmt: skip
        if tokens.valid is None or not bool(tokens.valid.all()):
            return tokens
        return Tokens(tokens.history, tokens.length, None, tokens.segments, None, None)

    @staticmethod
    def _clean(tensor: Tensor, mask: Tensor | None) -> Tensor:
        """What stands in padding may be anything, NaN included."""
        return tensor if mask is None else tensor.masked_fill(~mask[:, None, :, None], 0)

    @property
    def joint(self) -> bool:
        """Whether both branches have one denominator."""
        return self.shared or self.calibrated

    # ---- slices

    def chunks(self) -> list[slice]:
        """Rows of each chunk, on the axis X."""
        size, end = self.call.chunk_size, self.past + self.length
        return [slice(start, min(start + size, end)) for start in range(self.past, end, size)]

    def band(self, rows: slice) -> slice:
        """The keys that some window of the rows reaches."""
        assert self.call.window is not None
        return slice(max(0, rows.start - self.call.window + 1), rows.stop)

    def near(self, rows: slice) -> slice:
        """The keys that linear attention sees but that are not folded yet."""
        folded = max(0, rows.start - self.lag)
        stop = rows.stop - cast(int, self.call.window) if self.call.lagging else rows.stop
        return slice(folded, max(folded, stop))

    def folding(self, rows: slice) -> slice:
        """The keys that are folded once the rows are done; starts where `near` does."""
        start = max(0, rows.start - self.lag)
        return slice(start, max(start, rows.stop - self.lag))

    def take(self, new: Tensor, old: Tensor | None, columns: slice) -> Tensor:
        """Columns of the axis X of a tensor [B, heads, T, ...] and its history, in the dtype of sums."""
        start, stop = columns.start - self.past, columns.stop - self.past
        if start >= 0 or old is None:
            return new[:, :, max(start, 0) : stop].to(self.dtype)
        parts = [old[:, :, columns.start : min(columns.stop, self.past)], new[:, :, : max(stop, 0)]]
        return torch.cat([part.to(self.dtype) for part in parts], 2)

    def key_values(self, columns: slice) -> tuple[Tensor, Tensor]:
        state = self.call.state
        keys, values = (None, None) if state is None else (state.keys, state.values)
        return self.take(self.keys, keys, columns), self.take(self.values, values, columns)

    def row_slice(self, rows: slice) -> slice:
        """Rows of the axis X as rows of the call's own tensors."""
        return slice(rows.start - self.past, rows.stop - self.past)

    # ---- masks

    def block(self, rows: slice, columns: slice, branch: str) -> tuple[Tensor | None, Tensor]:
        """(bias on scores, or None for linear attention; 0/1 weights) of a block [B or 1, 1, rows, columns].

        Blocks of one shape share theirs where nothing depends on the tokens.
        """
        key = (rows.start - columns.start, rows.stop - rows.start, columns.stop - columns.start)
        if branch == "linear":
            key = (~key[0], *key[1:])
        if self.tokens.uniform and key in self.masks:
            return self.masks[key]
        device = self.call.q.device
        seen = causal_mask(self.tokens, rows, columns, device)
        bias = None
        if branch == "window":
            assert self.call.window is not None
            seen = window_mask(
                self.tokens, rows, columns, seen, window=self.call.window, layout="sliding", sinks=0
            )
            bias = torch.zeros(seen.shape, dtype=self.dtype, device=device).masked_fill_(~seen, HIDDEN)
        elif self.call.lagging:
            assert self.call.window is not None
            seen = seen & ~window_mask(
                self.tokens, rows, columns, seen, window=self.call.window, layout="sliding", sinks=0
            )
        found = (bias, seen.to(self.dtype))
        if self.tokens.uniform:
            self.masks[key] = found
        return found

    def same_segment(self, rows: slice, segment: Tensor | None) -> Tensor | None:
        """Rows that may see the folded keys [B, 1, rows, 1]; None if all may."""
        if self.tokens.segments is None or segment is None:
            return None
        return (self.tokens.segments[:, rows] == segment[:, None])[:, None, :, None].to(self.dtype)

    # ---- features

    def query_features(self, rows: slice) -> Tensor:
        part = self.row_slice(rows)
        if isinstance(self.call.phi_q, Tensor):
            return self._clean(self.call.phi_q[:, :, part], self._mask(part)).to(self.dtype)
        return cast(FeatureMapLike, self.call.phi_q)(self.queries[:, :, part].to(self.dtype))

    def key_features(self, columns: slice) -> Tensor:
        """phi(k), 0 in padding."""
        state, phi = self.call.state, self.call.phi_k
        if isinstance(phi, Tensor):
            features = self.take(phi, None if state is None else state.features, columns)
        else:
            keys = self.take(self.keys, None if state is None else state.keys, columns)
            features = cast(FeatureMapLike, phi)(keys)
        if self.tokens.valid is not None:
            features = features.masked_fill(~self.tokens.valid[:, None, columns, None], 0)
        return features

    def _mask(self, part: slice) -> Tensor | None:
        return None if self.call.key_mask is None else self.call.key_mask[:, part]

    # ---- how the branches are weighted

    def weights(self) -> Weights:
        """Each branch's weight under ``convex`` mixing, switched-off branches and their reading included."""
        call = self.call
        window_on, linear_on = (
            flag if isinstance(flag, bool) else flag.to(call.q.device).reshape(self.batch, -1, 1, 1)
            for flag in (call.branches.window, call.branches.linear)
        )
        if call.window is None or call.phi_k is None:  # one branch: no gate to speak of
            flag = linear_on if call.window is None else window_on
            alone = (
                torch.as_tensor(flag, device=call.q.device)
                .to(self.dtype)
                .expand(self.batch, self.heads, 1, 1)
            )
            return Weights(None, alone) if call.window is None else Weights(alone, None)
        gate = torch.as_tensor(call.gate, dtype=self.dtype, device=call.q.device)
        gate = gate.expand(self.batch, self.heads, self.length)[..., None]
        if call.lagging:
            gate = torch.where(self.linear_sees(), gate, torch.ones_like(gate))
        if window_on is False and linear_on is True:
            alone = gate * 0 + 1 if call.branches.reading == "renormalised" else 1 - gate
            return Weights(None, alone)
        window, linear = gate * window_on, (1 - gate) * linear_on
        if call.branches.reading == "renormalised" and not (window_on is True and linear_on is True):
            one, other = (torch.as_tensor(flag, device=call.q.device) for flag in (window_on, linear_on))
            window = torch.where(one & ~other, torch.ones_like(window), window)
            linear = torch.where(other & ~one, torch.ones_like(linear), linear)
        return Weights(window, linear)

    def linear_sees(self) -> Tensor:
        """Whether any key lies before the window of each new token [B, 1, T, 1]."""
        assert self.call.window is not None
        valid, segments = self.tokens.valid, self.tokens.segments
        total = self.past + self.length
        if valid is None:
            valid = torch.ones(self.batch, total, dtype=torch.bool, device=self.call.q.device)
        index = torch.arange(total, device=valid.device).expand_as(valid)
        # first real token of each one's segment so far, as a running maximum of segment starts
        starts = torch.zeros_like(valid)
        starts[:, 0] = True
        if segments is not None:
            starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        group = starts.long().cumsum(1)
        real = torch.where(valid, index, total)
        first = torch.full((self.batch, total + 1), total, device=valid.device)
        first = first.scatter_reduce(1, group, real, "amin").gather(1, group)
        seen = first <= index - self.call.window
        state = self.call.state
        if state is not None and state.folded is not None:
            carried = (state.folded > 0)[:, None]
            if segments is not None and state.folded_segment is not None:
                carried = carried & (segments == state.folded_segment[:, None])
            seen = seen | carried
        return seen[:, None, self.past :, None]

    # ---- what the call leaves behind

    def final_state(self, sums: Tensor | None, normalizer: Tensor | None) -> AttentionState:
        """The state after the last token, in the form that `equipoise.ops.walk` leaves."""
        call, tokens, count, state = self.call, self.tokens, self.history, self.call.state
        total = self.past + self.length
        columns = slice(max(0, total - count), total)

        def last(new: Tensor, old: Tensor | None) -> Tensor:
            start = columns.start - self.past
            if start >= 0 or old is None:
                part = new[:, :, max(start, 0) :]
            else:
                part = torch.cat([old[:, :, columns.start :], new], 2)
            return last_slots(part, count, 2)

        valid = tokens.valid
        if valid is None:
            valid = torch.ones(self.batch, total, dtype=torch.bool, device=call.q.device)
        features = None
        if call.lagging and isinstance(call.phi_k, Tensor):
            clean = self._clean(call.phi_k, call.key_mask)
            features = last(clean, None if state is None else state.features)
        folded = folded_segment = None
        if call.phi_k is not None:
            folded, folded_segment = self._folded(valid, total - self.lag)
        return AttentionState(
            keys=last(self.keys, None if state is None else state.keys),
            values=last(self.values, None if state is None else state.values),
            valid=last_slots(valid, count, 1), linear_state=sums, linear_normalizer=normalizer, folded=folded,
            segments=None if tokens.segments is None else last_slots(tokens.segments, count, 1, -1),
            folded_segment=folded_segment, features=features,
        )  # fmt: skip

    def _folded(self, valid: Tensor, stop: int) -> tuple[Tensor, Tensor | None]:
        """How many keys are folded [B], and the segment they belong to."""
        state, segments = self.call.state, self.tokens.segments
        fresh = valid[:, max(0, self.past - self.lag) : max(0, stop)]
        before = torch.zeros(self.batch, dtype=torch.long, device=valid.device)
        if state is not None and state.folded is not None:
            before = state.folded
        if segments is None:
            return before + fresh.sum(1), None
        if fresh.shape[1] == 0:
            old = None if state is None else state.folded_segment
            return before, torch.full_like(before, -1) if old is None else old
        own = segments[:, stop - 1].clone()
        same = segments[:, max(0, self.past - self.lag) : stop] == own[:, None]
        if state is not None and state.folded_segment is not None:
            before = before * (state.folded_segment == own)
        return before + (fresh & same).sum(1), own
