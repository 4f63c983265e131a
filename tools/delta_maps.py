"""Feature maps of the delta rule by how well its state answers: docs/research/02-equal-bytes.md.

    python tools/delta_maps.py docs/results/delta-maps.json            # run what the file lacks
    python tools/delta_maps.py docs/results/delta-maps.json --tables   # print the tables

One head at a time of the recall demo's donor, its q, k and v untouched. A map, write strengths and a scale
learn what attention beyond the window reads there, weighted by how far windows lead the donor astray at each
token. Asked is how often, at an answer from beyond the window, the read is nearest to the right one of the
values shown.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from equipoise import branches, hybridize
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.layers.write_gates import WriteStrength
from equipoise.models.branches import capture
from equipoise.models.divergence import divergence, log_probabilities
from equipoise.ops.delta import delta_attention
from frontier_shapes import SINKS, even
from frontier_texts import Setting, asked, rows_of
from tables import heading, line, measure_or_print, over_seeds, write

LAYER, HEADS = 3, (2, 3)
"""Where the donor looks pairs up (LOG.md of 2026-11-21)."""
HEAD_DIM, WINDOW = 32, 124
"""Its head_dim; what windows of 36 tokens a head and layer reach: nothing nearer is asked of the state."""
LEARNED, JUDGED, BATCH, STEPS, RATE = 320, 48, 8, 150, 1e-2
FLOOR = 0.02
"""Nats that every token counts at least."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """A feature map of F features, with write strengths from k, or from k and its squares."""

    feature_map: str
    features: int
    squares: bool

    @property
    def name(self) -> str:
        """As tables say it."""
        return f"{self.feature_map}, F = {self.features}, writes {'quadratic' if self.squares else 'linear'}"


ARMS = (
    *(Arm("unit", 32, squares) for squares in (False, True)), Arm("unit", 64, squares=False),
    *(Arm("dpfp", 32, squares) for squares in (False, True)), Arm("dpfp", 48, squares=True),
    *(Arm("dpfp", 64, squares) for squares in (False, True)),
)  # fmt: skip


@dataclass(frozen=True)
class Head:
    """What one head saw, and what it should answer.

    Attributes:
        q, k, v: [B, 1, T, D].
        wanted: what softmax attention reads from beyond the window [B, 1, T, D].
        mass: the share of its weights that lies there [B, 1, T, 1].
        weight: of each query, in nats [B, 1, T, 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    wanted: Tensor
    mass: Tensor
    weight: Tensor

    def part(self, rows: slice) -> Head:
        """Some of the texts."""
        return Head(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@torch.no_grad()
def taken(model: Any, rows: np.ndarray[Any, Any], head: int) -> Head:
    """A head's inputs and aims on texts."""
    seen: list[LayerInputs] = []
    lost: list[Tensor] = []

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if mixer.layer_idx == LAYER:
            seen.append(inputs)

    for batch in torch.from_numpy(rows).split(8):
        with capture(model, observer):
            donor = log_probabilities(model(input_ids=batch, use_cache=False).logits)
        with branches(model, "window", reading="renormalised"):
            lost.append(divergence(donor, log_probabilities(model(input_ids=batch, use_cache=False).logits)))
    q, k, v = (torch.cat([getattr(of, name)[:, head : head + 1] for of in seen]) for name in "qkv")
    places = torch.arange(q.shape[2])
    back = places[:, None] - places
    far = (back >= WINDOW) & (places >= SINKS)
    weights = ((q @ k.mT) * seen[0].scale).masked_fill(back < 0, -torch.inf).softmax(-1) * far
    return Head(
        q, k, v, weights @ v, weights.sum(-1, keepdim=True), torch.cat(lost)[:, None, :, None] + FLOOR
    )


class State(nn.Module):
    """Maps and write strengths of one head."""

    def __init__(self, arm: Arm, head_dim: int, seed: int) -> None:
        super().__init__()
        make = FEATURE_MAPS[arm.feature_map]
        self.phi_q = make(1, head_dim, arm.features)
        self.phi_k = WriteStrength(make(1, head_dim, arm.features).for_keys(), squares=arm.squares)
        generator = torch.Generator().manual_seed(seed)
        self.phi_q.reset_parameters(generator)
        self.phi_k.reset_parameters(generator)

    def forward(self, head: Head) -> Tensor:
        """What the state answers [B, 1, T, D]."""
        return delta_attention(head.q, head.k, head.v, self.phi_q, self.phi_k)[0]


def error(state: State, head: Head) -> Tensor:
    """Squared error over the square of what was wanted, both weighted."""
    apart = (state(head) * head.mass - head.wanted).square()
    return (head.weight * apart).sum() / (head.weight * head.wanted.square()).sum()


def train(state: State, head: Head, steps: int = STEPS) -> None:
    """By Adam, with a cosine decay."""
    optimizer = torch.optim.AdamW(state.parameters(), lr=RATE, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        start = step * BATCH % len(head.q)
        loss = error(state, head.part(slice(start, start + BATCH)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()


@torch.no_grad()
def answered(state: State, head: Head, rows: np.ndarray[Any, Any], words: tuple[int, ...]) -> float:
    """Share of answers from beyond the window that the read points at."""
    reads, right = state(head), list[bool]()
    for row, read, values in zip(rows, reads[:, 0], head.v[:, 0], strict=True):
        for at, far in asked(row, words):
            if far > WINDOW:
                shown = np.flatnonzero(np.isin(row[: at - 1], words))
                alike = torch.cosine_similarity(read[at - 1][None], values[torch.from_numpy(shown)], dim=-1)
                right.append(bool(row[shown[int(alike.argmax())]] == row[at]))
    return float(np.mean(right))


def measure(path: Path, console: Console) -> None:
    """Run what the file lacks."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    at = Setting()
    done = {(row["donor"], row["head"], row["arm"], row["seed"]) for row in found}
    model: Any = AutoModelForCausalLM.from_pretrained(at.donor).eval()
    model = hybridize(model, even(at.tokens).model_copy(update={"feature_map": "hedgehog"}), check=False)
    search = at.draw("search")
    judged = rows_of(search, JUDGED)
    for head, seed in ((head, seed) for head in HEADS for seed in SEEDS):
        missing = [arm for arm in ARMS if (at.digest, head, arm.name, seed) not in done]
        if not missing:
            continue
        learned = taken(model, rows_of(at.draw("train", seed=3000 + seed), LEARNED), head)
        aims = taken(model, judged, head)
        for arm in missing:
            start = time.perf_counter()
            state = State(arm, at.head_dim, seed)
            train(state, learned)
            with torch.no_grad():
                apart = float(error(state, aims))
            right = answered(state, aims, judged, search.words)
            found.append(
                {
                    "donor": at.digest,
                    "head": head,
                    "arm": arm.name,
                    "seed": seed,
                    "error": apart,
                    "asked": right,
                }
            )
            write(found, path)
            console.print(
                f"head {head}, seed {seed}, {arm.name}: error {apart:.3f}, asked {right:.3f} "
                f"({time.perf_counter() - start:.0f} s)",
                highlight=False,
            )


def tables(found: list[dict[str, Any]]) -> Iterator[str]:
    """A table for each head."""
    for head in HEADS:
        yield f"\nHead {head}:\n"
        yield from heading("state", "bytes", "error", "asked")
        for arm in ARMS:
            rows = [row for row in found if row["head"] == head and row["arm"] == arm.name]
            if rows:
                bytes_ = arm.features * HEAD_DIM * 4
                values = [over_seeds(np.array([row[name] for row in rows])) for name in ("error", "asked")]
                yield line(arm.name, f"{bytes_:,}", *values)


if __name__ == "__main__":
    measure_or_print(measure, tables)
