"""Decoding one token: a state in, a state out, in as few calls as it takes.

S and z are updated in place where the caller hands its state over (`hybrid_attention(...,
reuse_state=True)`). Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from equipoise.ops.mix import EPSILON
from equipoise.ops.types import AttentionState, Call, FeatureMapLike, accumulation_dtype


def supports(call: Call) -> bool:
    """Whether a call that `equipoise.ops.stream` supports is one plain step of decoding."""
    return (
        call.q.shape[2] == 1
        and call.state is not None
        and call.key_mask is None
        and call.segment_ids is None
        and call.window is not None
        and call.window > 1
        and call.branches.window is True
        and (call.branches.linear is True or call.phi_k is None)
    )


def run(call: Call) -> tuple[Tensor, AttentionState]:
    """The output [B, H, 1, E] in q's dtype, and the state after the token."""
    state, dtype = cast(AttentionState, call.state), accumulation_dtype(call.q.dtype)
    batch = call.q.shape[0]
    keys, values = torch.cat([state.keys, call.k], 2), torch.cat([state.values, call.v], 2)
    valid = torch.cat([state.valid, state.valid.new_ones(batch, 1)], 1)
    kept: dict[str, Tensor] = {"keys": keys[:, :, 1:], "values": values[:, :, 1:], "valid": valid[:, 1:]}
    if call.sinks:
        kept |= _sinks(call, state)
        seen_keys, seen_values = cast(Tensor, state.sink_keys), cast(Tensor, state.sink_values)
        seen_keys, seen_values = torch.cat([seen_keys, keys], 2), torch.cat([seen_values, values], 2)
        real = torch.cat([cast(Tensor, state.sink_valid), valid], 1)
        window, mass = _window(call, seen_keys, seen_values, real, dtype)
    else:
        window, mass = _window(call, keys, values, valid, dtype)
    if call.phi_k is None:
        return window.to(call.q.dtype), replace(state, **kept)
    if call.lagging:  # the key that leaves the window is for the next token to see
        linear = _linear(call, state.linear_state, state.linear_normalizer, dtype)
        seen = state.folded
        total, normalizer, folded, features = _fold(call, state, keys, values, dtype)
    else:
        total, normalizer, folded, features = _fold(call, state, keys, values, dtype)
        linear, seen = _linear(call, total, normalizer, dtype), None
    out = _mix(call, window, mass, linear, seen, dtype)
    after = replace(
        state, linear_state=total, linear_normalizer=normalizer, folded=folded, features=features, **kept
    )
    return out.to(call.q.dtype), after


def _sinks(call: Call, state: AttentionState) -> dict[str, Tensor]:
    """The sinks with the key among them that leaves the window now, and the ranks of the tokens kept."""
    sink_keys, sink_values, sink_valid, ranks = (
        state.sink_keys, state.sink_values, state.sink_valid, state.ranks
    )  # fmt: skip
    assert sink_keys is not None
    assert sink_values is not None
    assert sink_valid is not None
    assert ranks is not None
    slots = torch.arange(call.sinks, device=ranks.device)
    chosen = (ranks[:, :1] == slots) & state.valid[:, :1]
    mask = chosen[:, None, :, None]
    return {
        "sink_keys": torch.where(mask, state.keys[:, :, :1], sink_keys),
        "sink_values": torch.where(mask, state.values[:, :, :1], sink_values),
        "sink_valid": sink_valid | chosen,
        "ranks": torch.cat([ranks[:, 1:], ranks[:, -1:] + state.valid[:, -1:].long()], 1),
    }


def _window(
    call: Call, keys: Tensor, values: Tensor, valid: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Softmax over the window [B, H, 1, E]; and, where both branches have one denominator, the sum of its
    exponentials: ``shared`` of scores less the largest, ``calibrated`` its logarithm [B, H, 1, 1]."""
    batch, heads, _, size = call.q.shape
    groups = keys.shape[1]
    queries = call.q.to(dtype).reshape(batch * groups, heads // groups, size)
    scores = torch.bmm(queries * call.scale, keys.to(dtype).flatten(0, 1).mT)
    if call.softcap is not None:
        scores = scores.div_(call.softcap).tanh_().mul_(call.softcap)
    if torch.compiler.is_compiling() or not bool(valid.all()):  # a graph cannot look
        scores.view(batch, heads, -1).masked_fill_(~valid[:, None], -torch.inf)
    if call.sink_logits is not None:
        column = call.sink_logits.to(dtype).view(1, groups, -1, 1).expand(batch, -1, -1, 1)
        scores = torch.cat([scores, column.reshape(batch * groups, -1, 1)], -1)
    probabilities = scores.softmax(-1)
    seen = probabilities[..., : keys.shape[2]]  # all but the sink's: its value is 0
    out = torch.bmm(seen, values.to(dtype).flatten(0, 1)).view(batch, heads, 1, -1)
    if call.mixing == "convex":
        return out, None
    mass = 1 / probabilities.amax(-1)  # the largest has weight 1 in it
    if call.mixing == "calibrated":
        mass = mass.log_().add_(scores.amax(-1))
    return out, mass.view(batch, heads, 1, 1)


def _linear(
    call: Call, total: Tensor | None, normalizer: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Numerator [B, H, 1, E] and denominator [B, H, 1, 1]."""
    assert total is not None
    assert normalizer is not None
    batch, heads, memories = *call.q.shape[:2], total.shape[1]
    phi_q = _map(call.phi_q, call.q, dtype).reshape(batch * memories, heads // memories, -1)
    numerator = torch.bmm(phi_q, total.flatten(0, 1)).view(batch, heads, 1, -1)
    return numerator, torch.bmm(phi_q, normalizer.flatten(0, 1)[..., None]).view(batch, heads, 1, 1)


def _mix(
    call: Call, window: Tensor, mass: Tensor | None, linear: tuple[Tensor, Tensor], seen: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The hybrid's output [B, H, 1, E]; window and linear are scratch and change."""
    numerator, denominator = linear
    gate = torch.as_tensor(call.gate, dtype=dtype, device=window.device).expand(*window.shape[:2], 1)[
        ..., None
    ]
    if mass is not None and call.mixing == "calibrated":
        total = denominator.clamp_min(EPSILON)
        return torch.lerp(numerator.div_(total), window, torch.sigmoid(mass - gate - total.log()))
    if mass is not None:
        factor = gate * mass
        return window.mul_(factor).add_(numerator).div_(_safe(denominator.add_(factor)))
    if seen is not None:  # until the window is full, linear attention has no key to see
        gate = torch.where((seen > 0)[:, None, None, None], gate, 1.0)
    return torch.lerp(numerator.div_(_safe(denominator)), window, gate)


def _fold(
    call: Call, state: AttentionState, keys: Tensor, values: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(S, z, number of folded keys, features of the history) with the next key folded.

    That is the new one, or, disjoint, the one that leaves the window.
    """
    total, normalizer, folded = state.linear_state, state.linear_normalizer, state.folded
    assert total is not None
    assert normalizer is not None
    assert folded is not None
    history = state.features
    if not call.lagging:
        features, value, count = _map(call.phi_k, call.k, dtype), values[:, :, -1:], 1
    else:
        value, count = values[:, :, :1], state.valid[:, 0].long()
        if isinstance(call.phi_k, Tensor):
            assert history is not None
            features = history[:, :, :1].to(dtype)
            history = torch.cat([history[:, :, 1:], call.phi_k.to(history.dtype)], 2)
        else:
            features = _map(call.phi_k, keys[:, :, :1], dtype)
        features = features * state.valid[:, None, :1, None]
    memories = total.shape[1]
    value = value.to(dtype)
    if value.shape[1] != memories:
        value = value.repeat_interleave(memories // value.shape[1], 1)
    column = features.mT
    # a tensor made in inference mode cannot be changed outside of it
    if call.reuse_state and (torch.is_inference_mode_enabled() or not total.is_inference()):
        total.addcmul_(column, value)
        normalizer.add_(features[:, :, 0])
    else:
        total, normalizer = torch.addcmul(total, column, value), normalizer + features[:, :, 0]
    return total, normalizer, folded + count, history


def _map(phi: Tensor | FeatureMapLike | None, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(phi, Tensor):
        return phi.to(dtype)
    return cast(FeatureMapLike, phi)(tokens.to(dtype))


def _safe(denominator: Tensor) -> Tensor:
    """The denominator with its magnitude kept above EPSILON, as in `equipoise.ops.mix.divide`."""
    floor = torch.where(denominator < 0, -EPSILON, EPSILON).to(denominator.dtype)
    return torch.where(denominator.abs() < EPSILON, floor, denominator)
