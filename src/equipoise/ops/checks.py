"""Refuse arguments of `hybrid_attention` that do not fit together, saying what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.ops.mix import MIXING_RULES
from equipoise.ops.types import AttentionState, Call, history_length


def check_arguments(call: Call) -> None:
    """Raise ValueError with expected, got and fix; see `hybrid_attention` for the contract."""
    _check_shapes(call)
    _check_window(call)
    _check_sink_logits(call)
    _check_features(call)
    _check_masks(call)
    _check_mixing(call)
    if call.chunk_size < 1:
        raise ValueError(f"expected chunk_size >= 1, got {call.chunk_size}.")
    if call.state is not None:
        _check_state(call, call.state)


def _check_shapes(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(
            f"expected q, k, v of 4 dimensions [B, heads, T, D], got {q.ndim}, {k.ndim}, {v.ndim}."
        )
    # Unpacked once, here and below: a look at `shape` costs, and decoding does this for every token.
    (batch, heads, length, size), (rows, kv_heads, tokens, width), values = q.shape, k.shape, v.shape
    same_values = values[0] == rows and values[1] == kv_heads and values[2] == tokens
    if not (same_values and rows == batch and tokens == length and width == size):
        raise ValueError(
            "expected q [B, H, T, D], k [B, N, T, D], v [B, N, T, E] of one B and T, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
        )
    if heads % kv_heads:
        raise ValueError(
            "expected the number of query heads to be a multiple of the key/value heads, got "
            f"{heads} and {kv_heads}."
        )
    if length == 0:
        raise ValueError("expected at least one token, got T = 0.")


def _check_window(call: Call) -> None:
    if call.layout not in ("sliding", "terraced"):
        raise ValueError(f"expected layout 'sliding' or 'terraced', got {call.layout!r}.")
    if call.sinks < 0:
        raise ValueError(f"expected sinks >= 0, got {call.sinks}.")
    if call.window is None:
        if call.phi_k is None:
            raise ValueError("expected a window, feature maps or both; got window=None and no feature maps.")
        if call.sinks:
            raise ValueError(
                f"sinks join the window's softmax: with window=None expected sinks=0, got {call.sinks}."
            )
        if call.sink_logits is not None:
            raise ValueError("sink_logits join the window's softmax: with window=None expected None.")
    elif call.window < 0 or (call.window == 0 and not call.sinks):
        raise ValueError(
            f"expected a window of at least 1 token (or None for no window branch), got {call.window}."
        )
    elif call.window == 0 and call.layout == "terraced":
        raise ValueError("a terraced layout needs a window of at least 1 token, got 0.")


def _check_sink_logits(call: Call) -> None:
    logits = call.sink_logits
    if logits is not None and list(logits.shape) != [call.q.shape[1]]:
        raise ValueError(
            f"expected sink_logits of one number a query head, [{call.q.shape[1]}], got {list(logits.shape)}."
        )


def _check_features(call: Call) -> None:
    if (call.phi_q is None) != (call.phi_k is None):
        raise ValueError("expected phi_q and phi_k both given or both None.")
    batch, heads, length, _ = call.q.shape
    sizes: list[int] = []
    for name, phi in (("phi_q", call.phi_q), ("phi_k", call.phi_k)):
        if not isinstance(phi, Tensor):
            continue
        shape = phi.shape
        if len(shape) != 4 or shape[0] != batch or shape[2] != length:
            raise ValueError(f"expected {name} [B, heads, T, F] with B and T of q, got {list(shape)}.")
        if shape[1] != heads and (name == "phi_q" or shape[1] != call.k.shape[1]):
            allowed = {heads} if name == "phi_q" else {heads, call.k.shape[1]}
            raise ValueError(
                f"expected {name} with {' or '.join(map(str, sorted(allowed)))} heads, got {shape[1]}."
            )
        sizes.append(shape[3])
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        raise ValueError(
            f"expected phi_q and phi_k of one feature dimension F, got {sizes[0]} and {sizes[1]}."
        )


def _check_masks(call: Call) -> None:
    flags = call.branches.window, call.branches.linear
    if call.key_mask is None and call.segment_ids is None and not any(isinstance(x, Tensor) for x in flags):
        return
    expected = [call.q.shape[0], call.q.shape[2]]
    for name, mask in (("key_mask", call.key_mask), ("segment_ids", call.segment_ids)):
        if mask is not None and list(mask.shape) != expected:
            raise ValueError(f"expected {name} [B, T] = {expected}, got {list(mask.shape)}.")
    if call.key_mask is not None and call.key_mask.dtype != torch.bool:
        raise ValueError(f"expected key_mask of bools (True = real token), got {call.key_mask.dtype}.")
    rows = list(call.q.shape[:2])
    for name in ("window", "linear"):
        flag = getattr(call.branches, name)
        if isinstance(flag, Tensor) and list(flag.shape) not in (rows[:1], rows):
            raise ValueError(
                f"expected Branches.{name} of shape [B] = {rows[:1]} or [B, H] = {rows}, "
                f"got {list(flag.shape)}."
            )


def check_delta(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, segment_ids: Tensor | None,
    state: AttentionState | None,
) -> None:  # fmt: skip
    """Raise a ValueError where the arguments of `delta_attention` do not fit together."""
    alike = q[:, :1].shape == k[:, :1].shape and k.shape[:3] == v.shape[:3]
    if not alike or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "expected q, k and v of the same tokens, and k and v of the same heads, which divide those of q; "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    for name, tensor in (("key_mask", key_mask), ("segment_ids", segment_ids)):
        if tensor is not None and tensor.shape != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"expected {name} of shape {[q.shape[0], q.shape[2]]}, got {list(tensor.shape)}."
            )
    if state is None:
        return
    if state.linear_state is None or state.linear_normalizer is not None:
        raise ValueError(
            "expected initial_state of the delta rule: one with a linear state and no normaliser."
        )
    if state.linear_state.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"expected initial_state of {list(k.shape[:2])} rows and heads, got "
            f"{list(state.linear_state.shape[:2])}."
        )
    if state.linear_state.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"expected initial_state of values of {v.shape[-1]} numbers, got {state.linear_state.shape[-1]}."
        )
    if (state.folded_segment is None) != (segment_ids is None):
        raise ValueError("expected segment_ids in every part of a split sequence or in none.")


def _check_mixing(call: Call) -> None:
    MIXING_RULES[call.mixing]  # raises with a suggestion
    if not isinstance(call.gate, Tensor):
        return
    try:
        call.gate.expand(*call.q.shape[:3])
    except RuntimeError:
        raise ValueError(
            f"expected gate to broadcast to [B, H, T] = {list(call.q.shape[:3])}, got "
            f"{list(call.gate.shape)}; a per-head gate has shape [H, 1]."
        ) from None


def _check_state(call: Call, state: AttentionState) -> None:
    """A state of a call with other settings would resume, and be wrong."""
    if state.others:
        raise ValueError("expected initial_state of one window for all heads, got one of windows by head.")
    rows, tokens = state.valid.shape
    if rows != call.q.shape[0]:
        raise ValueError(f"expected initial_state of batch size {call.q.shape[0]}, got {rows}.")
    for name, new, old in (("k", call.k.shape, state.keys.shape), ("v", call.v.shape, state.values.shape)):
        if new[1] != old[1] or new[3] != old[3]:
            raise ValueError(
                f"expected initial_state with the heads and size of {name}, {new[1]} and "
                f"{new[3]}, got {old[1]} and {old[3]}."
            )
    history = history_length(call.window, call.layout)
    if tokens != history or (state.offsets is None) != (call.layout == "sliding"):
        raise ValueError(
            f"expected initial_state of a call with the same window and layout, holding {history} tokens, "
            f"got one of {tokens}."
        )
    sinks = 0 if state.sink_keys is None else state.sink_keys.shape[2]
    if sinks != call.sinks:
        raise ValueError(f"expected initial_state of a call with {call.sinks} sinks, got one of {sinks}.")
    if (state.segments is None) != (call.segment_ids is None):
        raise ValueError("expected segment_ids in every part of a split sequence or in none.")
    if (state.linear_state is None) != (call.phi_k is None):
        raise ValueError(
            "expected initial_state of a call with the same branches: one has a linear state, one not."
        )
    if call.lagging and isinstance(call.phi_k, Tensor) and state.features is None:
        raise ValueError(
            "resuming disjoint attention with phi_k as a tensor needs a state made with phi_k as a tensor; "
            "pass the feature map itself, or make the state with features."
        )
    if not call.lagging and state.features is not None:
        raise ValueError(
            "expected initial_state of a call with the same overlap, got one of a disjoint call."
        )
