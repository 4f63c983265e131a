"""Taking tokens back out of a running sum, exactly.

S and z are sums in floating point: a token that was added cannot be subtracted again without a trace. So
nothing is subtracted. A state is kept as it was (a checkpoint) beside the keys and values read since, and
going back reads those of them that stay a second time, call by call as they came: the state is then, bit
for bit, the one that never saw the others. Memory stays constant: two checkpoints, and a bounded number of
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from equipoise.layers.mixer import LayerInputs
from equipoise.ops import AttentionState

DEPTH = 512
"""At least so many of the last tokens can be taken back: more than any draft is long."""

Advance = Callable[[LayerInputs, AttentionState | None, bool], AttentionState | None]
"""(inputs, state, whether the state's tensors may be changed) -> the state after the inputs' tokens."""


def part_of(inputs: LayerInputs, start: int, stop: int | None) -> LayerInputs:
    """The tokens start..stop of what one call received."""
    rows = slice(start, stop)
    return replace(
        inputs, q=inputs.q[:, :, rows], k=inputs.k[:, :, rows], v=inputs.v[:, :, rows],
        key_mask=None if inputs.key_mask is None else inputs.key_mask[:, rows],
        segment_ids=None if inputs.segment_ids is None else inputs.segment_ids[:, rows],
        rotation=None if inputs.rotation is None else inputs.rotation.map(lambda t: t[:, rows]),
    )  # fmt: skip


@dataclass
class Checkpoint:
    """A state, and what was read after it, call by call."""

    state: AttentionState | None
    parts: list[LayerInputs] = field(default_factory=list[LayerInputs])

    @property
    def length(self) -> int:
        """Tokens read after it."""
        return sum(part.k.shape[2] for part in self.parts)


class Past:
    """What going back needs: the last two checkpoints.

    A new one begins where tokens were taken back, and wherever the last one has `DEPTH` tokens behind it.

    Args:
        state: what has been read before; there is no way back beyond it.
    """

    def __init__(self, state: AttentionState | None) -> None:
        self.checkpoints = [Checkpoint(state)]

    @property
    def length(self) -> int:
        """How many tokens can be taken back."""
        return sum(checkpoint.length for checkpoint in self.checkpoints)

    def mark(self, state: AttentionState | None) -> None:
        """Make this state, the present one, a checkpoint."""
        if self.checkpoints[-1].length:
            self.checkpoints = [self.checkpoints[-1], Checkpoint(state)]

    def may_reuse(self) -> bool:
        """Whether the present state's tensors may be changed: not while a checkpoint holds them."""
        return self.checkpoints[-1].length > 0

    def add(self, inputs: LayerInputs) -> None:
        """Remember what is being read."""
        # copies: views of a call's projections would keep all of them
        k, v = inputs.k.detach().clone(), inputs.v.detach().clone()
        # of every row: rows are selected, and one may stand for all
        rotation = inputs.rotation and inputs.rotation.map(lambda t: t.expand(len(k), -1, -1))
        part = replace(inputs, q=_blank(inputs.q, len(k)), k=k, v=v, sink_logits=None, rotation=rotation)
        self.checkpoints[-1].parts.append(part)

    def back(self, count: int, advance: Advance) -> AttentionState | None:
        """The state ``count`` >= 1 tokens ago, at most `length`; what came later is forgotten."""
        while count > self.checkpoints[-1].length:
            count -= self.checkpoints.pop().length
        last = self.checkpoints[-1]
        keep, kept, state = last.length - count, list[LayerInputs](), last.state
        for part in last.parts:
            if keep <= 0:
                break
            part = part if part.k.shape[2] <= keep else part_of(part, 0, keep)
            state = advance(part, state, bool(kept))
            kept.append(part)
            keep -= part.k.shape[2]
        last.parts = kept
        return state

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to everything held: selecting rows, moving devices."""
        for checkpoint in self.checkpoints:
            if checkpoint.state is not None:
                checkpoint.state = checkpoint.state.map(function)
            checkpoint.parts = [_mapped(part, function) for part in checkpoint.parts]

    def tensors(self) -> list[Tensor]:
        """Everything held beside the present state."""
        held: list[Tensor] = []
        for checkpoint in self.checkpoints:
            held += [] if checkpoint.state is None else checkpoint.state.tensors()
            held += [t for part in checkpoint.parts for t in (part.k, part.v)]
            turned = [part.rotation for part in checkpoint.parts if part.rotation is not None]
            held += [t for rotation in turned for t in (rotation.cos, rotation.sin)]
        return held


def _mapped(inputs: LayerInputs, function: Callable[[Tensor], Tensor]) -> LayerInputs:
    k = function(inputs.k)
    return replace(
        inputs, q=_blank(inputs.q.to(k.device), len(k)), k=k, v=function(inputs.v),
        key_mask=None if inputs.key_mask is None else function(inputs.key_mask),
        segment_ids=None if inputs.segment_ids is None else function(inputs.segment_ids),
        rotation=inputs.rotation and inputs.rotation.map(function),
    )  # fmt: skip


def _blank(q: Tensor, rows: int) -> Tensor:
    """Queries without content: no state depends on them, nor on sink logits."""
    return q.new_zeros(()).expand(rows, *q.shape[1:])
