"""Attention operators: hybrid, window, linear; and the transfer loss. The reference defines what is right."""

from equipoise.ops.hybrid import hybrid_attention, linear_attention, window_attention
from equipoise.ops.mix import MIXING_RULES
from equipoise.ops.tokens import segment_ids_from_cu_seqlens
from equipoise.ops.types import AttentionState, Branches

__all__ = [
    "MIXING_RULES",
    "AttentionState",
    "Branches",
    "hybrid_attention",
    "linear_attention",
    "segment_ids_from_cu_seqlens",
    "window_attention",
]
