"""Decoding through ``generate``, end to end, beside what one layer's attention alone predicts for it.

The prediction takes the donor's own time per token after a context so short that attention hardly counts,
and exchanges its attention for ours at the context in question:

    predicted(n) = donor(SHORT) - layers * its attention(SHORT) + layers * our attention(n).

So whatever the hybrid adds beside its operator (copies, masks, hooks, synchronisation) shows as a ratio of
measured to predicted above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equipoise.bench import decode
from equipoise.bench.peers import OURS
from equipoise.bench.results import EndToEnd, Row
from equipoise.bench.setting import BenchSetting, Call
from equipoise.bench.timing import Contestant, race

SHORT = 64
"""Tokens of context after which attention is a small part of a token."""
TOKENS = 16
"""Tokens generated in one timed call."""
GENERATE, ATTENTION = "generate", "attention"
"""Names of the two measures."""


def layer_setting(setting: BenchSetting, model: Any) -> BenchSetting:
    """A benchmark of one layer of a model, its feature maps applied as in the model."""
    config = model.config
    return replace(
        setting, batch=1, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim, feature_dim=2 * config.head_dim, features="maps",
    )  # fmt: skip


def attention_rows(
    setting: BenchSetting, lengths: Sequence[int], models: Mapping[str, Any], *, rounds: int, budget: float,
    told: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """One layer's attention for one token: ours, and the donor's as its cache runs it, by concatenation."""
    names = {OURS: OURS, "concat": "sdpa"}
    found = decode.measure(
        layer_setting(setting, models[OURS]), with_short(lengths), list(names), rounds=rounds, budget=budget,
        told=told,
    )  # fmt: skip
    return [replace(row, measure=ATTENTION, name=names[row.name]) for row in found]


def generate_rows(
    setting: BenchSetting, lengths: Sequence[int], models: Mapping[str, Any],
    new_cache: Callable[[Any, str], Any], tokens: Callable[[Any, int], Tensor], *, rounds: int, budget: float,
    told: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Greedy ``generate`` of `TOKENS` tokens after a context that was read before."""
    rows: list[Row] = []
    for length in with_short(lengths):
        told(f"model {GENERATE}, {length:,} tokens")
        with torch.no_grad():
            contestants = [
                Contestant(
                    name=name,
                    prepare=_given(_continued(model, new_cache(model, name), tokens(model, length))),
                )
                for name, model in models.items()
            ]
            times = race(contestants, rounds=rounds, budget=budget, device=setting.device)
        rows += [
            Row(measure=GENERATE, length=length, name=one.name, times=times[one.name], tokens=TOKENS)
            for one in contestants
        ]
    return rows


def with_short(lengths: Sequence[int]) -> list[int]:
    """The lengths, and the one that predictions start from."""
    return sorted({SHORT, *lengths})


def _given(call: Call) -> Callable[[], Call]:
    return lambda: call


def _continued(model: Any, cache: Any, prompt: Tensor) -> Call:
    """A call that goes on from the cache; text and cache grow by `TOKENS` each time, the donor's and ours."""
    model(prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    text = prompt

    def call() -> object:
        nonlocal text
        text = model.generate(
            text, attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=TOKENS,
            min_new_tokens=TOKENS, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return text

    return call


def predict(rows: Sequence[Row], layers: int) -> list[EndToEnd]:
    """What was measured through ``generate`` beside what it should have been; empty where it was not."""
    known = {(row.measure, row.name, row.length): row for row in rows if row.times is not None}

    def seconds(measure: str, name: str, length: int, *, process: bool) -> float:
        row = known[measure, name, length]
        assert row.times is not None
        return (row.times.process_median if process else row.times.median) / row.tokens

    def both(length: int, *, process: bool) -> tuple[float, float]:
        beside = seconds(GENERATE, "sdpa", SHORT, process=process)
        beside -= layers * seconds(ATTENTION, "sdpa", SHORT, process=process)
        attention = layers * seconds(ATTENTION, OURS, length, process=process)
        return seconds(GENERATE, OURS, length, process=process), beside + attention

    found: list[EndToEnd] = []
    lengths = sorted(length for measure, name, length in known if (measure, name) == (GENERATE, OURS))
    for length in lengths:
        measured, predicted = both(length, process=False)
        busy, idle = both(length, process=True)
        found.append(EndToEnd(length=length, measured=measured, predicted=predicted, process=busy / idle))
    return [one for one in found if one.length != SHORT]
