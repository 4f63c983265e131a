"""What the operators pass around: which branches run, and the state between two calls.

Shape legend, here and in every file of this package:
    B batch    H query heads    N key/value heads (H a multiple of N)    T new tokens    D head_dim
    E value head_dim    F feature dimension D_phi    M heads of phi(k), either H or N
    R tokens of history a window needs    P sinks    W slots of tokens that wait beside S
    C what S keeps of a value, E where no value maps are given
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Layout = Literal["sliding", "terraced"]
Reading = Literal["literal", "renormalised"]
StateUpdate = Literal["additive", "delta"]
MapHeads = Literal["query", "key_value"]
ValueMaps = tuple[Float[Tensor, "M E C"], Float[Tensor, "h C E"]]
"""What a state keeps of values, vA, and what is made of what it answers, oB."""
FeatureMapLike = Callable[[Tensor], Tensor]
"""Maps a block [B, heads, t, D] to features [B, heads', t, F]; applied block by block."""


@dataclass(frozen=True)
class Branches:
    """Which branches of the hybrid run, and how the survivor is read when one does not.

    Attributes:
        window: whether the sliding-window softmax runs; a bool, or a bool tensor [B] or [B, H].
        linear: whether linear attention runs; likewise.
        reading: ``literal`` zeroes the ablated branch's term and leaves the rest as it was (arXiv
            2510.05901); ``renormalised`` lets the survivor attend alone at weight 1, the linear branch then
            over all keys.
    """

    window: bool | Tensor = True
    linear: bool | Tensor = True
    reading: Reading = "literal"

    def __post_init__(self) -> None:
        if self.reading not in ("literal", "renormalised"):
            raise ValueError(f"expected reading 'literal' or 'renormalised', got {self.reading!r}.")
        for name in ("window", "linear"):
            flag = getattr(self, name)
            if isinstance(flag, Tensor) and (flag.dtype != torch.bool or flag.ndim not in (1, 2)):
                raise ValueError(
                    f"Branches.{name}: expected a bool or a bool tensor [B] or [B, H], "
                    f"got {flag.dtype} {tuple(flag.shape)}."
                )


@dataclass(frozen=True)
class AttentionState:
    """Everything a layer must remember to go on: constant in size, whatever the length read.

    Attributes:
        keys, values: the last R tokens [B, N, R, D] and [B, N, R, E]; slots not yet filled are invalid.
        valid: which of them are real tokens [B, R].
        linear_state: S, the sum of phi(k) v^T over the keys folded so far [B, M, F, C], float32 or wider.
        linear_normalizer: z, the sum of phi(k) over the same keys [B, M, F].
        folded: how many keys that is [B].
        segments: segment id of the R tokens [B, R], where sequences are packed.
        folded_segment: segment the folded keys belong to [B].
        ranks: how many real tokens of its segment came before each of the R tokens [B, R]; kept for sinks.
        offsets: distance of each of the R tokens from its segment's first real token [B, R]; kept for
            terraces.
        sink_keys, sink_values, sink_valid, sink_segment: sinks that have left the window [B, N, P, D],
            [B, N, P, E], [B, P], [B].
        pending, pending_features, pending_values: how many tokens count as folded but wait beside S, which
            lacks them yet [B], and what they add [B, M, W, F], [B, N, W, E]; only a backend that writes S
            once for several tokens leaves any, and `settled` adds them.
        features, sink_features: phi(k) of the tokens above, where features were given as tensors and linear
            attention lags behind the window (disjoint) [B, M, R, F], [B, M, P, F].
        others: states of the heads whose windows are of other sizes, in order of the sizes; everything above
            is then of the heads with the longest window.
    """

    keys: Float[Tensor, "B N R D"]
    values: Float[Tensor, "B N R E"]
    valid: Bool[Tensor, "B R"]
    linear_state: Float[Tensor, "B M F C"] | None = None
    linear_normalizer: Float[Tensor, "B M F"] | None = None
    folded: Int[Tensor, " B"] | None = None
    segments: Int[Tensor, "B R"] | None = None
    folded_segment: Int[Tensor, " B"] | None = None
    ranks: Int[Tensor, "B R"] | None = None
    offsets: Int[Tensor, "B R"] | None = None
    sink_keys: Float[Tensor, "B N P D"] | None = None
    sink_values: Float[Tensor, "B N P E"] | None = None
    sink_valid: Bool[Tensor, "B P"] | None = None
    sink_segment: Int[Tensor, " B"] | None = None
    pending: Int[Tensor, " B"] | None = None
    pending_features: Float[Tensor, "B M W F"] | None = None
    pending_values: Float[Tensor, "B N W E"] | None = None
    features: Float[Tensor, "B M R F"] | None = None
    sink_features: Float[Tensor, "B M P F"] | None = None
    others: tuple[AttentionState, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> AttentionState:
        """Apply a function to every tensor: selecting rows, moving devices, detaching."""
        present = ((name, getattr(self, name)) for name in TENSOR_NAMES)
        changed = {name: function(t) for name, t in present if t is not None}
        return replace(self, **changed, others=tuple(other.map(function) for other in self.others))

    def settled(self) -> AttentionState:
        """The same state with every waiting token added to S, in new memory; itself where none can wait."""
        if self.others:
            whole = replace(self, others=()).settled()
            return replace(whole, others=tuple(other.settled() for other in self.others))
        waiting, features, values = self.pending, self.pending_features, self.pending_values
        if waiting is None or features is None or values is None or self.linear_state is None:
            return self
        absent = torch.arange(features.shape[2], device=waiting.device) >= waiting[:, None]
        features, values = (  # what lies in the other slots may be anything
            x.to(self.linear_state.dtype).masked_fill(absent[:, None, :, None], 0) for x in (features, values)
        )
        values = values.repeat_interleave(features.shape[1] // values.shape[1], 1)
        sums = self.linear_state + features.mT @ values
        return replace(self, linear_state=sums, pending=None, pending_features=None, pending_values=None)

    @staticmethod
    def concatenate(states: Sequence[AttentionState]) -> AttentionState:
        """The states' rows as one batch, in order.

        Raises:
            ValueError: they do not hold the same things, so they are not of one layer in one mode.
        """
        states = [state.settled() for state in states]
        merged: dict[str, Tensor | None] = {}
        if len({len(state.others) for state in states}) > 1:
            raise ValueError("expected states of the same windows by head, got some with fewer sizes.")
        for name in TENSOR_NAMES:
            parts = [t for state in states if (t := getattr(state, name)) is not None]
            if parts and len(parts) != len(states):
                raise ValueError(
                    f"expected states that all hold {name}, or none of them, got {len(parts)} of "
                    f"{len(states)}: they were read with different settings."
                )
            merged[name] = torch.cat(parts) if parts else None
        others = zip(*(state.others for state in states), strict=True)
        known: dict[str, Any] = {**merged, "others": tuple(map(AttentionState.concatenate, others))}
        return AttentionState(**known)

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        own = [t for name in TENSOR_NAMES if (t := getattr(self, name)) is not None]
        return own + [t for other in self.others for t in other.tensors()]

    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


TENSOR_NAMES = tuple(f.name for f in fields(AttentionState) if f.name != "others")
"""What of a state is a tensor, where it is there."""


@dataclass(slots=True)
class Call:
    """The arguments of one `hybrid_attention` call. Never changed; freezing costs 3 µs of a step's 35."""

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
    reuse_state: bool = False
    sink_logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Donor:
    """What the transfer loss learns from, cut from the graph: a donor's attention in one layer.

    Attributes:
        q, k: its queries [B, H, T, D] and keys [B, N, T, D].
        scale, softcap, window: of its scores; no softcap or window where None.
        key_mask, segment_ids: real tokens and packed sequences [B, T]; all and one where None.
        sink_logits: learned score per head of attending to nothing [H]; none where None.
    """

    q: Tensor
    k: Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None
    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    sink_logits: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the inputs are: in bfloat16 z loses 60% by 4k tokens."""
    return torch.promote_types(dtype, torch.float32)


def history_length(window: int | None, layout: Layout) -> int:
    """R: how many past tokens a query may look back on, and so the tokens a state keeps.

    At least one, so that a state always carries its position and segment along.
    """
    if window is None:
        return 1
    return max(1, 2 * window - 1 if layout == "terraced" else window - 1)


def needs_gradient(call: Call) -> bool:
    """Whether autograd records this call."""
    if not torch.is_grad_enabled():
        return False
    tensors = (call.q, call.k, call.v, call.phi_q, call.phi_k, call.gate, call.sink_logits)
    if any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        return True
    return any(_may_learn(phi) for phi in (call.phi_q, call.phi_k))


def _may_learn(phi: object) -> bool:
    """Whether a feature map may have parameters; of a plain function one cannot know."""
    if phi is None or isinstance(phi, Tensor):
        return False
    return not isinstance(phi, torch.nn.Module) or any(p.requires_grad for p in phi.parameters())
