"""What a few features in every head are worth at equal bytes: docs/research/02-equal-bytes.md, decision 30.

    python tools/small_states.py docs/results/small-states.json
    python tools/small_states.py docs/results/small-states.json --tables

The recall demo's donor, its windows shared between heads by search. Windows are cut back until a linear state
of F features in every head is paid for, and nothing but those states learns, by the donor's predictions. The
first adds one row for each arm and seed that the file lacks, the second prints the page's table.

Attention is written out, T x T: what is asked is what such a state is worth, not how it is computed.
Shapes: B texts, H heads, T tokens, D head_dim, F features, L layers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from equipoise.models.divergence import divergence
from equipoise.recall_donor import CONTEXT, PairText
from frontier_shapes import SINKS, moved
from frontier_texts import SETTLED, TEXTS, Setting, rows_of
from tables import heading, line, over_seeds, write

LAYERS, HEADS, HEAD_DIM = 4, 4, 32
"""Of the recall demo's donor."""
STEPS, ROWS, LEARNING_RATE, WARMUP = 150, 4, 2e-2, 10
SEEDS = (0, 1, 2)
NEVER = -1e30
"""A score that no softmax notices."""
TOKEN_BYTES, NUMBER_BYTES = 2 * HEAD_DIM * 2, 4
Windows = list[list[int]]


@dataclass(frozen=True)
class Arm:
    """A state of F features in every head; none for F = 0.

    Attributes:
        features: F.
        overlap: whether it covers the keys of the window too.
        decay: whether older keys count less, by a learned factor per token and head.
    """

    features: int
    overlap: bool = False
    decay: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        if not self.features:
            return "none"
        keys = "all keys" if self.overlap else "keys beyond the window"
        return f"F = {self.features}, {keys}" + ", decay learned" * self.decay


ARMS = (Arm(0), Arm(1), Arm(1, overlap=True), Arm(1, decay=True), Arm(2), Arm(4), Arm(8))


def cut_back(windows: Windows, features: int) -> Windows:
    """Windows in proportion, never below 2 tokens, that leave room for F (D + 1) numbers a head."""
    flat = [window for of in windows for window in of]
    state = len(flat) * features * (HEAD_DIM + 1) * NUMBER_BYTES
    tokens = (sum(flat) * TOKEN_BYTES - state) // TOKEN_BYTES
    exact = [window * tokens / sum(flat) for window in flat]
    found = [max(2, int(size)) for size in exact]
    order = sorted(range(len(flat)), key=lambda place: found[place] - exact[place])
    for place in order[: max(0, tokens - sum(found))]:  # those that rounding took most from
        found[place] += 1
    return [found[start : start + HEADS] for start in range(0, len(found), HEADS)]


class States(nn.Module):
    """Of every layer and head: phi(q) phi(k) = sum_f exp(q . a_f + c_f + k . b_f), on the scale of scores.

    With one feature that is `constant` with a write gate, mixed by `calibrated`; a and b start near 0, so
    that a key of the mean counts exp(-1) of a key of score 0 in the window.
    """

    def __init__(self, arm: Arm, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count, noise = arm.features, 0.0 if arm.features == 1 else 0.1

        def drawn(spread: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(LAYERS, HEADS, HEAD_DIM, count, generator=generator) * spread)

        self.query, self.key = drawn(noise or 0.02), drawn(noise)
        self.offset = nn.Parameter(torch.full((LAYERS, HEADS, 1, count), -1.0 - math.log(count)))
        self.decay = nn.Parameter(torch.full((LAYERS, HEADS, 1, 1), -5.0)) if arm.decay else None

    def scores(self, layer: int, q: Tensor, k: Tensor) -> Tensor:
        """log phi(q) phi(k) of every query and key [B, H, T, T]."""
        queries, keys = q @ self.query[layer] + self.offset[layer], k @ self.key[layer]
        tops = queries.amax(-1, keepdim=True), keys.amax(-1, keepdim=True)
        products = (queries - tops[0]).exp() @ (keys - tops[1]).exp().mT
        scores = products.clamp_min(1e-20).log() + tops[0] + tops[1].mT
        if self.decay is None:
            return scores
        age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        return scores - functional.softplus(self.decay[layer]) * age.clamp(min=0)


@dataclass
class Attention:
    """What the donor attends by: its own softmax, or windows and states.

    Attributes:
        windows: by layer and head; None for the donor's own.
        states: of every head; None for windows alone.
        overlap: whether states cover all keys.
    """

    windows: Windows | None = None
    states: States | None = None
    overlap: bool = False

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, _: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """As transformers calls it: the output [B, T, H, D], no weights."""
        layer, length = module.layer_idx, q.shape[2]
        i, j = torch.arange(length)[:, None], torch.arange(length)
        causal, scores = j <= i, q @ k.mT * scaling
        if self.windows is None:
            return (scores.masked_fill(~causal, NEVER).softmax(-1) @ v).transpose(1, 2), None
        sizes = torch.tensor(self.windows[layer])[:, None, None]
        near = causal & ((j > i - sizes) | (j < SINKS))
        window = scores.masked_fill(~near, NEVER)
        if self.states is None:
            return (window.softmax(-1) @ v).transpose(1, 2), None
        seen = causal.expand_as(near) if self.overlap else causal & ~near
        linear = self.states.scores(layer, q, k).masked_fill(~seen, NEVER)
        weights = torch.cat([window, linear], -1).softmax(-1)
        return (weights @ torch.cat([v, v], 2)).transpose(1, 2), None


class Bench:
    """The donor, and what it is measured and trained on."""

    def __init__(self, at: Setting) -> None:
        self.attention = Attention()
        ALL_ATTENTION_FUNCTIONS["small-states"] = self._attend
        model: Any = AutoModelForCausalLM.from_pretrained(at.donor, attn_implementation="small-states")
        self.model = model.eval().requires_grad_(False)
        self.at, searched = at, at.draw("search")
        self.judged = torch.from_numpy(rows_of(searched, TEXTS))
        self.words = torch.tensor(searched.words)
        config = moved(at, by_head=True)
        layers = [config.for_layer(layer) for layer in range(LAYERS)]
        self.windows = [list(of.head_windows or [of.window or 0] * HEADS) for of in layers]

    def _attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.attention(*args[:5], **kwargs)

    def log_probabilities(self, rows: Tensor, attention: Attention) -> Tensor:
        """Of the tokens that follow [B, T - 1, V]."""
        self.attention = attention
        return self.model(input_ids=rows, use_cache=False).logits[:, :-1].log_softmax(-1)

    def train(self, arm: Arm, seed: int) -> Attention:
        """States of an arm after training, in windows that pay for them."""
        windows = cut_back(self.windows, arm.features)
        if not arm.features:
            return Attention(windows)
        trained = Attention(windows, States(arm, seed), arm.overlap)
        texts: PairText = self.at.draw("train", seed=2000 + seed)
        assert trained.states is not None
        parameters = list(trained.states.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / STEPS)) / 2,
        )
        for step in range(STEPS):
            rows = torch.from_numpy(rows_of(texts, ROWS, step * ROWS))
            with torch.no_grad():
                aim = self.log_probabilities(rows, Attention())
            loss = divergence(aim, self.log_probabilities(rows, trained)).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
        return trained

    @torch.no_grad()
    def judge(self, attention: Attention) -> dict[str, float]:
        """KL to the donor and likelihood, nats per token of text: no keys, no values, no start of a row."""
        kl, nll = list[float](), list[float]()
        for rows in self.judged.split(8):
            aim, got = (self.log_probabilities(rows, of) for of in (Attention(), attention))
            targets = rows[:, 1:]
            values = torch.isin(targets, self.words)
            text = (
                ~values & ~functional.pad(values[:, 1:], (0, 1)) & (torch.arange(CONTEXT - 1) >= SETTLED - 1)
            )
            lost, own = divergence(aim, got), -got.gather(-1, targets[..., None])[..., 0]
            kl += [float(row[mask].mean()) for row, mask in zip(lost, text, strict=True)]
            nll += [float(row[mask].mean()) for row, mask in zip(own, text, strict=True)]
        return {"kl": float(np.mean(kl)), "nll": float(np.mean(nll))}


def measure(path: Path, console: Console) -> None:
    """Run what the file lacks, every arm with one seed before the next seed."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    at = Setting()  # windows and sinks of 36 tokens a head and layer
    bench, weights = Bench(at), at.digest
    done = {(row["donor"], row["arm"], row["seed"]) for row in rows}
    for seed in SEEDS:
        for arm in ARMS:
            if (weights, arm.name, seed) in done:
                continue
            windows = cut_back(bench.windows, arm.features)
            alone, found = (bench.judge(of) for of in (Attention(windows), bench.train(arm, seed)))
            row = {"donor": weights, "arm": arm.name, "seed": seed, "windows": windows, **found}
            rows.append(row | {f"{name}_of_windows": value for name, value in alone.items()})
            write(rows, path)
            console.print(f"seed {seed}, {arm.name}: {found}, windows alone {alone}", soft_wrap=True)


def tables(path: Path) -> str:
    """Every arm of the last donor in the file, seeds together."""
    rows: Sequence[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in rows if row["donor"] == rows[-1]["donor"]]
    lines = heading("state in every head", "windows alone, KL", "with the states, KL", "NLL")
    for name in dict.fromkeys(row["arm"] for row in rows):
        of = [row for row in rows if row["arm"] == name]
        if len(of) == len(SEEDS):
            kl, nll = (np.array([row[key] for row in of]) for key in ("kl", "nll"))
            plain = name == Arm(0).name  # nothing is drawn, so seeds are alike
            shown = [f"{kl[0]:.3f}", f"{nll[0]:.3f}"] if plain else [over_seeds(kl), over_seeds(nll)]
            lines.append(line(name, f"{of[0]['kl_of_windows']:.3f}", *shown))
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--tables", action="store_true", help="print the page's table, and run nothing")
    given = parser.parse_args()
    if given.tables:
        print(tables(given.output))
    else:
        measure(given.output, Console(stderr=True))


if __name__ == "__main__":
    main()
