"""Softmax attention over an exact cache of keys and values that evicts: what a budget of tokens is worth.

A control for linear branches of the same bytes, for scoring whole texts: the cache is simulated by masks over
the text, so time grows with T^2 and memory with T. Shapes follow the legend in `equipoise.ops.types`; G = H /
N query heads share a key/value head. A new rule is one function under `EVICTION_RULES.register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from equipoise.ops.types import accumulation_dtype
from equipoise.registry import Registry

ROWS = 128
"""Queries whose scores are held at once."""
NEIGHBOURS = 2
"""Keys on either side whose importance a key shares under `observed`."""


@dataclass(frozen=True)
class Evidence:
    """What a rule judges keys by; 0 for those not held.

    Attributes:
        total: attention weight that each key has received since it came, summed over the group's queries
            [B, N, T].
        latest: the same from the last `Eviction.every` queries alone [B, N, T].
    """

    total: Float[Tensor, "B N T"]
    latest: Float[Tensor, "B N T"]


EvictionRule = Callable[[Evidence], Tensor]
"""Importance of each key [B, N, T]; the least important are evicted."""
EVICTION_RULES: Registry[EvictionRule] = Registry("eviction rule")


@EVICTION_RULES.register("heavy-hitters")
def heavy_hitters(evidence: Evidence) -> Tensor:
    """All attention received so far (H2O, arXiv 2306.14048)."""
    return evidence.total


@EVICTION_RULES.register("observed")
def observed(evidence: Evidence) -> Tensor:
    """Attention received from the last queries, plus the largest among a key's neighbours in the text.

    After SnapKV (arXiv 2404.14469), which pools over neighbours and judges a prompt once, by its last
    queries. The key's own attention is added so that the one looked at outlives the neighbours that it lifts.
    """
    latest = evidence.latest
    return latest + functional.max_pool1d(latest, 2 * NEIGHBOURS + 1, 1, NEIGHBOURS)


@dataclass(frozen=True)
class Eviction:
    """How a cache is kept within its budget.

    Attributes:
        budget: tokens that a query attends to at most, itself included, per key/value head.
        recent: the last so many, the query's own included, are never evicted.
        rule: name of an eviction rule.
        every: tokens evicted at once, whenever the cache is full.

    Raises:
        UnknownNameError: no such rule.
        ValueError: numbers that leave nothing to evict.
    """

    budget: int
    recent: int
    rule: str = "heavy-hitters"
    every: int = 1

    def __post_init__(self) -> None:
        EVICTION_RULES[self.rule]
        if self.every < 1 or self.recent < 1 or self.recent + self.every > self.budget + 1:
            raise ValueError(
                f"expected recent >= 1, every >= 1 and recent + every <= budget + 1, got {self.recent}, "
                f"{self.every} and a budget of {self.budget}."
            )

    def state_bytes(self, kv_heads: int, head_dim: int, value_dim: int | None = None) -> int:
        """Bytes of a layer's cache when full: K and V at 2 bytes an element, one float32 score a token."""
        elements = head_dim + (head_dim if value_dim is None else value_dim)
        return self.budget * kv_heads * (2 * elements + 4)


def evicting_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B N T D"],
    v: Float[Tensor, "B N T E"],
    eviction: Eviction,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_mask: Bool[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
    sink_logits: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H T E"]:
    """Causal softmax attention of each query over the tokens that its cache still holds. Without gradients.

    Token by token: the new token joins the cache of each key/value head, its queries attend to what is there,
    their weights are added to the keys' evidence, and where the cache is full the rule evicts. All tokens are
    treated alike: unlike in the papers there is no prompt that is read with full attention first.

    Args:
        q, k, v: as in `hybrid_attention`.
        eviction: budget and rule.
        scale: factor on the scores; D ** -0.5 where None.
        softcap: as in `hybrid_attention`.
        key_mask: True for real tokens; others are never held, and their output is 0.
        segment_ids: packed sequences; each starts with an empty cache.
        sink_logits: a learned score per head of attending to nothing, as in `hybrid_attention`.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        cache = _Cache(k, eviction, key_mask, segment_ids)
        dtype, (batch, heads, length, size) = accumulation_dtype(q.dtype), q.shape
        keys, values = k.to(dtype), v.to(dtype)
        groups = heads // k.shape[1]
        queries = q.to(dtype).view(batch, -1, groups, length, size) * (size**-0.5 if scale is None else scale)
        sinks = None if sink_logits is None else sink_logits.to(dtype).view(1, -1, groups, 1)
        blocks: list[Tensor] = []
        for start in range(0, length, ROWS):
            stop = min(start + ROWS, length)
            scores = queries[:, :, :, start:stop] @ keys[:, :, None, :stop].mT
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            for row in range(stop - start):
                scores[..., row, :] = cache.read(start + row, scores[..., row, :], sinks)
            blocks.append((scores @ values[:, :, None, :stop]).flatten(1, 2))
        return torch.cat(blocks, 2).to(q.dtype)


class _Cache:
    """Which tokens of the text are held, and what is known of them: [B, N, T] each."""

    def __init__(
        self, k: Tensor, eviction: Eviction, key_mask: Tensor | None, segment_ids: Tensor | None
    ) -> None:
        self.eviction, self.rule = eviction, EVICTION_RULES[eviction.rule]
        self.key_mask, self.segment_ids = key_mask, segment_ids
        self.held = torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device)
        self.total = torch.zeros(k.shape[:3], dtype=accumulation_dtype(k.dtype), device=k.device)
        self.latest = torch.zeros_like(self.total)

    def read(self, token: int, scores: Tensor, sinks: Tensor | None) -> Tensor:
        """Weights of a token's queries [B, N, G, s] from their scores on the first s tokens of the text."""
        seen = scores.shape[-1]
        held = self.held[..., :seen]
        if self.segment_ids is not None:
            others = (self.segment_ids[:, :seen] != self.segment_ids[:, token, None])[:, None]
            for kept in (held, self.total[..., :seen], self.latest[..., :seen]):
                kept.masked_fill_(others, 0)
        real = None if self.key_mask is None else self.key_mask[:, token, None]
        held[..., token] = True if real is None else real
        masked = scores.masked_fill(~held[:, :, None], -torch.inf)
        if sinks is not None:
            masked = torch.cat([masked, sinks.expand(*masked.shape[:3], 1)], -1)
        weights = masked.softmax(-1)[..., :seen]
        if real is not None:  # a query of padding may have no key at all
            weights = weights.masked_fill(~real[..., None, None], 0)
        received = weights.sum(2)
        self.total[..., :seen] += received
        self.latest[..., :seen] += received
        self._evict(token)
        return weights

    def _evict(self, token: int) -> None:
        budget, every = self.eviction.budget, self.eviction.every
        if token + 1 < budget - every:
            return
        count = self.held.sum(-1)
        full = count == budget
        if full.any():
            kept = ~self.held
            kept[..., token + 2 - self.eviction.recent :] = True
            importance = self.rule(Evidence(self.total, self.latest)).masked_fill(kept, torch.inf)
            least = importance.sort(dim=-1, stable=True).indices[..., :every]  # among equals the oldest
            gone = torch.zeros_like(self.held).scatter_(-1, least, True) & full[..., None]
            self.held &= ~gone
            self.total.masked_fill_(gone, 0)
            count = torch.where(full, budget - every, count)
        self.latest.masked_fill_((count == budget - every)[..., None], 0)
