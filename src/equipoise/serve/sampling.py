"""Choosing the next token of every row: each by its own parameters and its own random numbers.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY_BELOW = 1e-4
"""Temperatures below this take the likeliest token: dividing by them would overflow."""


@dataclass(frozen=True)
class Sampling:
    """How one row's tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: share of probability to draw from, above 0 and up to 1.
        top_k: number of tokens to draw from; 0 for all.
        seed: of the draws; None for any.
        logprobs: how many alternatives to report with each token; None for no report.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None

    def generator(self, index: int) -> torch.Generator | None:
        """Random numbers of the choice with this index; None where nothing is drawn."""
        if self.temperature < GREEDY_BELOW:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed * 1_000_003 + index) % (1 << 63))
        return generator


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely it was, before temperature and truncation.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the likeliest ids with theirs.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def choose(
    logits: Float[Tensor, "B V"],
    rows: Sequence[tuple[Sampling, torch.Generator | None]],
) -> list[int]:
    """The next token of every row.

    Rows with the same parameters go through transformers' processors together; each is drawn with its own
    generator, so what it gets does not depend on its neighbours.
    """
    chosen = logits.argmax(-1).tolist()
    groups: dict[tuple[float, float, int], list[int]] = defaultdict(list)
    for index, (sampling, generator) in enumerate(rows):
        if generator is not None:
            groups[sampling.temperature, sampling.top_p, sampling.top_k].append(index)
    for parameters, members in groups.items():
        scores: Any = logits[members].float()
        probabilities = _warpers(*parameters)(torch.empty(0, dtype=torch.long), scores).softmax(-1).cpu()
        drawn = torch.stack(
            [torch.rand(1, generator=rows[index][1], dtype=torch.double) for index in members]
        )
        for index, token in zip(members, _inverse(probabilities.double(), drawn), strict=True):
            chosen[index] = token
    return chosen


def _inverse(probabilities: Float[Tensor, "B V"], drawn: Float[Tensor, "B 1"]) -> list[int]:
    """Tokens at which the summed probabilities pass the numbers drawn: one call for all rows, where
    `torch.multinomial` takes one a generator."""
    sums = probabilities.cumsum(-1)
    found = torch.searchsorted(sums, drawn * sums[:, -1:], right=True)
    return found[:, 0].clamp_max(sums.shape[1] - 1).tolist()


def _warpers(temperature: float, top_p: float, top_k: int) -> Any:
    found: Any = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    return found


def logprob_of(logits: Float[Tensor, " V"], token: int, count: int) -> TokenLogprob:
    """What the report says of a token that was chosen from these logits."""
    scores: Float[Tensor, " V"] = logits.double().log_softmax(-1)
    best: tuple[Tensor, Int[Tensor, " K"]] = scores.topk(min(count, scores.shape[0]))
    top = tuple(zip(best[1].tolist(), best[0].tolist(), strict=True))
    return TokenLogprob(token, float(scores[token]), top)
