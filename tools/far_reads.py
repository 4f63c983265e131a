"""What one head's state learns to read from whole texts, by map and by weight of tokens: docs/research/02.

    python tools/far_reads.py docs/results/far-reads.json            # run what the file lacks
    python tools/far_reads.py docs/results/far-reads.json --tables   # print the table

The head of donor `source` that looks pairs up, its q, k and v untouched, in texts of 1,024 tokens. Maps and
writing strengths learn the donor's output of that head, each token weighted by a power of what windows of 20
tokens a head lose there. A read from beyond their reach is right where it is nearest to a value of the right
word among all shown before.
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
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from equipoise import hybridize, reach
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.layers.value_maps import NarrowValues
from equipoise.layers.write_gates import WriteStrength
from equipoise.models.branches import capture
from equipoise.ops.delta import delta_attention
from equipoise.recall_donor import PairText
from equipoise.train.losses import astray
from frontier_shapes import loaded, moved
from frontier_texts import MORE_PAIRS, Setting, asked, rows_of, with_more_pairs
from tables import heading, line, measure_or_print, over_seeds, write

LAYER, HEAD = 3, 2
LEARNED, JUDGED, STEPS, ROWS, RATE = 320, 24, 300, 2, 1e-2
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """A map of F features, the power that weights of tokens are raised to, and what is kept of a value."""

    feature_map: str
    features: int
    power: int = 2
    values: int = 32

    @property
    def name(self) -> str:
        """As the table says it."""
        kept = "" if self.values == 32 else f", {self.values} of 32 numbers of each value"
        return f"{self.feature_map}, F = {self.features}, power {self.power}{kept}"


ARMS = (
    Arm("dpfp", 64, 1), Arm("dpfp", 64), Arm("dpfp", 64, 3), Arm("dpfp", 128), Arm("unit", 32),
    Arm("trilinear", 32), Arm("trilinear", 64), Arm("trilinear", 128),
    Arm("trilinear", 64, values=16), Arm("trilinear", 128, values=16),
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the head sees of whole texts.

    Attributes:
        rows: tokens [B, T].
        q, k, v: of the head [B, T, D].
        output: the donor's, of the head [B, T, D].
        lost: what windows lose at each token, in nats [B, T].
    """

    rows: NDArray[np.int64]
    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    lost: Tensor


@torch.no_grad()
def taken(model: Any, texts: PairText, count: int) -> Seen:
    """Of a converted donor whose windows lose something."""
    rows, parts = rows_of(texts, count), list[tuple[Tensor, ...]]()
    seen: list[tuple[Tensor, ...]] = []

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if mixer.layer_idx == LAYER:
            seen.append(tuple(x[:, HEAD].clone() for x in (inputs.q, inputs.k, inputs.v, output)))

    for batch in torch.from_numpy(rows).split(4):
        seen.clear()
        with capture(model, observer):
            model.get_decoder()(input_ids=batch, use_cache=False)
        parts.append((*seen[0], astray(model, {"input_ids": batch})))
    return Seen(rows, *(torch.cat(of) for of in zip(*parts, strict=True)))


class State(nn.Module):
    """Maps and writing strengths, as a hybrid of the recipe `equipoise` has them."""

    def __init__(self, arm: Arm, head_dim: int, seed: int) -> None:
        super().__init__()
        make = FEATURE_MAPS[arm.feature_map]
        self.phi_q = make(1, head_dim, arm.features)
        self.phi_k = WriteStrength(make(1, head_dim, arm.features).for_keys(), squares=True)
        self.phi_v = NarrowValues(1, 1, head_dim, arm.values) if arm.values < head_dim else None
        generator = torch.Generator().manual_seed(seed)
        for phi in (self.phi_q, self.phi_k, self.phi_v):
            if phi is not None:
                phi.reset_parameters(generator)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is read at each token [B, T, D]."""
        q, k, v = (x[:, None] for x in (q, k, v))
        phi_q, phi_k = self.phi_q(q), self.phi_k(k)
        if self.phi_v is None:
            return delta_attention(q, k, v, phi_q, phi_k)[0][:, 0]
        down, up = self.phi_v.maps
        return (delta_attention(q, k, v @ down, phi_q, phi_k)[0] @ up)[:, 0]


def train(arm: Arm, seen: Seen, seed: int) -> State:
    """By AdamW with a cosine decay, towards the donor's output of the head."""
    state = State(arm, seen.q.shape[-1], seed)
    optimizer = torch.optim.AdamW(state.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        part = torch.randint(len(seen.q), (ROWS,), generator=generator)
        q, k, v, output, lost = (x[part] for x in (seen.q, seen.k, seen.v, seen.output, seen.lost))
        weights = lost**arm.power
        error = (state(q, k, v) - output).square().sum(-1) / v.square().sum(-1).mean()
        loss = (weights * error).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(state.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return state


@torch.no_grad()
def right(state: State, seen: Seen, words: tuple[int, ...], limit: int) -> float:
    """Share of answers beyond ``limit`` tokens whose read is nearest to the right value."""
    reads = torch.cat(
        [state(*part) for part in zip(seen.q.split(8), seen.k.split(8), seen.v.split(8), strict=True)]
    )
    found: list[bool] = []
    for row, read, values in zip(seen.rows, reads, seen.v, strict=True):
        shown = np.flatnonzero(np.isin(row, words))
        for place, far in asked(row, words):
            if far > limit:
                earlier = shown[shown < place]
                alike = torch.cosine_similarity(
                    read[place - 1][None], values[torch.from_numpy(earlier)], dim=-1
                )
                found.append(bool(row[earlier[int(alike.argmax())]] == row[place]))
    return float(np.mean(found)) if found else float("nan")


def share_of_lookups(seen: Seen, words: tuple[int, ...], limit: int, power: int) -> float:
    """Of all weight, that of answers beyond ``limit`` tokens."""
    weights = seen.lost.numpy() ** power
    asking = sum(
        float(weights[index, place - 1])
        for index, row in enumerate(seen.rows)
        for place, far in asked(row, words)
        if far > limit
    )
    return asking / float(weights.sum())


def measure(path: Path, console: Console) -> None:
    """Run what the file lacks."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    at = Setting("source", 1024, 20)
    done = {(row["donor"], row["arm"], row["seed"]) for row in found}
    model: Any = hybridize(loaded(at).cpu(), moved(at, by_head=True, fewer_sinks=False), check=False)
    limit = reach(model)
    assert limit is not None
    search = at.draw("search")
    judged = {10: taken(model, search, JUDGED), MORE_PAIRS: taken(model, with_more_pairs(search), JUDGED)}
    for seed in SEEDS:
        texts = at.draw("train", seed=4000 + seed)
        learned = taken(model, texts, LEARNED)
        for arm in (arm for arm in ARMS if (at.digest, arm.name, seed) not in done):
            start = time.perf_counter()
            state = train(arm, learned, seed)
            shares = {f"right {n}": right(state, seen, texts.words, limit) for n, seen in judged.items()}
            lookups = share_of_lookups(learned, texts.words, limit, arm.power)
            found.append(
                {
                    "donor": at.digest,
                    "arm": arm.name,
                    "seed": seed,
                    "limit": limit,
                    "weight": lookups,
                    **shares,
                }
            )
            write(found, path)
            console.print(f"{found[-1]} ({time.perf_counter() - start:.0f} s)", highlight=False)


def tables(found: list[dict[str, Any]]) -> Iterator[str]:
    """One table."""
    columns = ("weight", "right 10", f"right {MORE_PAIRS}")
    yield from heading(
        "map, power of weights", "bytes", "weight of lookups", "right of 10", f"right of {MORE_PAIRS}"
    )
    for arm in ARMS:
        rows = [row for row in found if row["arm"] == arm.name]
        if rows:
            values = [over_seeds(np.array([row[name] for row in rows])) for name in columns]
            yield line(arm.name, f"{arm.features * arm.values * 4:,}", *values)


if __name__ == "__main__":
    measure_or_print(measure, tables)
