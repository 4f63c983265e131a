"""One call made ready for the kernels: tensors on one axis, masks as numbers, sizes as constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from equipoise.ops.stream import Stream, Weights
from equipoise.ops.stream_forward import mixing_weights
from equipoise.ops.tokens import Tokens, index_tokens
from equipoise.ops.triton.configs import Config, config_for
from equipoise.ops.types import AttentionState, Call, FeatureMapLike

TYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
    torch.float64: tl.float64,
}  # fmt: skip
"""Triton's names of the types that numbers may have."""


COLUMNS = 128
"""Most columns of a map's weight, half its features, that a program holds at once."""


class Tracked(Stream):
    """`Stream`'s account of tokens, weights and state, without its passes over q, k and v.

    Kernels leave padding out as they load, and a look at whether any is there would wait for the device.
    """

    @staticmethod
    def _clean(tensor: Tensor, mask: Tensor | None) -> Tensor:
        return tensor

    def _tokens(self) -> Tokens:
        call = self.call
        return index_tokens(
            batch=self.batch, length=self.length, device=call.q.device, key_mask=call.key_mask,
            segment_ids=call.segment_ids, state=call.state, sinks=0, layout=call.layout,
        )  # fmt: skip

    def state(self, sums: Tensor | None, normalizer: Tensor | None) -> AttentionState:
        """The state after the last token; what stands in padding is 0 in it."""
        state = self.final_state(sums, normalizer)
        absent = ~state.valid[:, None, :, None]
        features = state.features
        return replace(
            state, keys=state.keys.masked_fill(absent, 0), values=state.values.masked_fill(absent, 0),
            features=None if features is None else features.masked_fill(absent, 0),
        )  # fmt: skip


Maps = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """What the kernels of one call need; k, v, valid and segments lie on the axis X of history and call.

    Attributes:
        phi_q, phi_k: features; where there are maps, the queries and keys that kernels map themselves.
        maps: weights [H, D, C] and [M, D, C] of Hedgehog maps, in the type of products.
        phi_shift: how many tokens of the axis X lie before the first of phi_k.
        weights: of the branches, [B, H, T] with any strides.
        first_segment: segment of the sums that the call starts with [B].
    """

    tracked: Tracked
    config: Config
    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    maps: Maps | None
    phi_shift: int
    weights: Weights
    valid: Tensor | None
    segments: Tensor | None
    first_segment: Tensor | None

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.tracked.length, self.config.chunk)

    @property
    def columns(self) -> int:
        """C of the maps."""
        return 1 if self.maps is None else self.maps[1].shape[-1]

    @property
    def features(self) -> int:
        if self.maps is not None:
            return 2 * self.columns
        return 1 if self.phi_k is None else self.phi_k.shape[-1]

    @property
    def memories(self) -> int:
        if self.maps is not None:
            return self.maps[1].shape[0]
        return self.tracked.kv_heads if self.phi_k is None else self.phi_k.shape[1]

    def blocks(self) -> dict[str, int]:
        """Sizes of the dimensions and the powers of two that hold them."""
        sizes = self.tracked.size, self.tracked.value_size
        block = min(self.config.features, padded(self.features))
        if self.maps is not None:  # half of the features, since each is a softmax
            block = padded(self.columns)
        return {
            "D": sizes[0], "E": sizes[1], "F": self.features, "C": self.columns, "BLOCK_D": padded(sizes[0]),
            "BLOCK_E": padded(sizes[1]), "BLOCK_F": block,
            "STEP": min(self.config.features, padded(sizes[0])),
            "BLOCK_Q": self.config.queries, "BLOCK_K": self.config.keys, "CHUNK": self.config.chunk,
        }  # fmt: skip

    @property
    def feature_blocks(self) -> int:
        """Programs that share the rows of S."""
        return 2 if self.maps is not None else triton.cdiv(self.features, self.blocks()["BLOCK_F"])

    def flags(self) -> dict[str, Any]:
        """Which parts of a kernel are compiled in, and the types it computes in."""
        call = self.tracked.call
        return {
            "MAPPED": self.maps is not None, "HAS_VALID": self.valid is not None,
            "HAS_SEGMENTS": self.segments is not None, "HAS_CAP": call.softcap is not None,
            "LAGGING": call.lagging, "SHARED": self.tracked.shared, "CALIBRATED": self.tracked.calibrated,
            "HAS_WINDOW": call.window is not None and self.weights.window is not None,
            "HAS_LINEAR": self.phi_k is not None and (self.tracked.joint or self.weights.linear is not None),
            "OPERAND": operand_of(call.q.dtype), "SUM": TYPES[self.tracked.dtype],
        }  # fmt: skip

    def only(self, *names: str) -> dict[str, Any]:
        """The constants a kernel asks for."""
        known = {**self.blocks(), **self.flags()}
        return {name: known[name] for name in names}

    def launch(self) -> dict[str, int]:
        return {"num_warps": self.config.warps, "num_stages": self.config.stages}

    def map_weights(self) -> Maps:
        """Weights of the maps; any tensor where there are none: it is never read."""
        return self.maps or (self.q, self.q)

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """valid, segments and first segment; any tensor where there are none: it is never read."""
        absent = self.q
        found = (self.valid, self.segments, self.first_segment)
        return cast("tuple[Tensor, Tensor, Tensor]", tuple(absent if x is None else x for x in found))


def padded(size: int) -> int:
    """The power of two a dimension is held in; products need 16."""
    return max(16, triton.next_power_of_2(size))


def operand_of(dtype: torch.dtype) -> Any:
    """What products of features are computed in for inputs of a type; float16 could not hold them."""
    return tl.float32 if dtype == torch.float16 else TYPES[dtype]


def plan(call: Call, weights: Weights | None = None, maps: Maps | None = None) -> Plan:
    """Make a call ready; weights of the branches are computed, and those of maps looked up, unless given."""
    tracked = Tracked(call)
    weights = weights or mixing_weights(tracked)
    state, tokens = call.state, tracked.tokens
    k, v = call.k, call.v
    if state is not None:
        k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
    segments = tokens.segments
    first_segment = None
    if segments is not None:
        first_segment = torch.full_like(segments[:, 0], -1, dtype=torch.int32)
        if state is not None and state.folded_segment is not None:
            first_segment = state.folded_segment.to(torch.int32).contiguous()
        segments = segments.to(torch.int32).contiguous()
    q, k, maps = plain(call.q), plain(k), maps or map_weights(call)
    phi_q, (phi_k, shift) = q, (k, 0)
    if maps is None:
        phi_q, (phi_k, shift) = _query_features(call), _key_features(call, k, tracked.past)
    return Plan(
        tracked=tracked, config=config_for(call.q.dtype), q=q, k=k, v=plain(v), phi_q=phi_q, phi_k=phi_k,
        maps=None if maps is None else _cast(maps, call), phi_shift=shift, weights=_rows(weights, tracked),
        valid=None if tokens.valid is None else tokens.valid.to(torch.int8).contiguous(), segments=segments,
        first_segment=first_segment,
    )  # fmt: skip


def map_weights(call: Call) -> Maps | None:
    """Weights of the maps that the kernels compute themselves; None where features come from elsewhere.

    They know Hedgehog's formula alone, take it from a class that declares it, and hold all C columns.
    """
    if not config_for(call.q.dtype).maps:
        return None
    if any(vars(type(phi)).get("kernel") != "hedgehog" for phi in (call.phi_q, call.phi_k)):
        return None
    weights = tuple(cast(Any, phi).weight for phi in (call.phi_q, call.phi_k))
    return cast(Maps, weights) if weights[0].shape[-1] <= COLUMNS else None


def _cast(maps: Maps, call: Call) -> Maps:
    """Weights as operands of products."""
    dtype = torch.float32 if call.q.dtype == torch.float16 else call.q.dtype
    return maps[0].to(dtype).contiguous(), maps[1].to(dtype).contiguous()


def plain(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous; the others may have any strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(weights: Weights, tracked: Tracked) -> Weights:
    """[B, H, T or 1, 1] -> [B, H, T], without a copy."""
    shape = (tracked.batch, tracked.heads, tracked.length)
    found = (
        None if w is None else w[..., 0].to(tracked.dtype).expand(shape)
        for w in (weights.window, weights.linear)
    )
    return Weights(*found)


def mapped(phi: FeatureMapLike, tokens: Tensor, call: Call) -> Tensor:
    """Features of all tokens, computed as `equipoise.ops.walk` does and rounded to what products use."""
    features = phi(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
    return features.to(torch.bfloat16) if call.q.dtype == torch.bfloat16 else features


def _query_features(call: Call) -> Tensor | None:
    if call.phi_q is None or isinstance(call.phi_q, Tensor):
        return None if call.phi_q is None else plain(call.phi_q)
    return plain(mapped(call.phi_q, call.q, call))


def _key_features(call: Call, keys: Tensor, past: int) -> tuple[Tensor | None, int]:
    """phi(k), and how many tokens of the axis X come before its first; overlap never looks back at one."""
    phi, state = call.phi_k, call.state
    if phi is None:
        return None, 0
    if not isinstance(phi, Tensor):
        return plain(mapped(phi, keys if call.lagging else call.k, call)), 0 if call.lagging else past
    if state is None or not call.lagging:
        return plain(phi), past
    assert state.features is not None
    return torch.cat([state.features.to(phi.dtype), phi], 2), 0
