"""Tokens that wait beside S: folded in the state's account, but not yet added to its sum.

Decoding reads all of S for every token. A backend that also writes it back moves twice the bytes, so the
Triton step keeps up to `SLOTS` tokens beside it and writes S once for all of them; z, of one column, is
always complete. Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from equipoise.ops.types import AttentionState

SLOTS = 16
"""Tokens that are folded at once."""


def settled(state: AttentionState) -> AttentionState:
    """The same state with every waiting token added to S, in new memory; itself where none can wait."""
    waiting, features, values = state.pending, state.pending_features, state.pending_values
    if waiting is None or features is None or values is None or state.linear_state is None:
        return state
    there = torch.arange(features.shape[2], device=waiting.device) < waiting[:, None]
    features, values = (_present(x, there, state.linear_state.dtype) for x in (features, values))
    values = values.repeat_interleave(features.shape[1] // values.shape[1], 1)
    sums = torch.matmul(features.mT, values) + state.linear_state
    return replace(state, linear_state=sums, pending=None, pending_features=None, pending_values=None)


def _present(tensor: Tensor, there: Tensor, dtype: torch.dtype) -> Tensor:
    """Waiting tokens [B, heads, W, X]; what lies in the other slots may be anything."""
    return tensor.to(dtype).masked_fill(~there[:, None, :, None], 0)
