"""One linear state of the past against a state per block and a router: docs/research/04-memory-blocks.md.

    python tools/memory_blocks.py docs/results/memory-blocks.json

Shapes: n texts, A heads of all layers, T tokens, Q queries, D head_dim, b blocks, F features.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from equipoise import HybridConfig, capture, hybridize
from equipoise.evaluate.recall_text import Ids
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.recall_donor import CONTEXT, RecallDonorSettings, pair_text, recall_donor

WINDOW, FIRST = 64, 128
TEXTS, HELD_OUT = 24, 24
STEPS, TEXTS_A_STEP, QUERIES_A_STEP, LEARNING_RATE = 200, 2, 128, 1e-2
SEEDS = (0, 1, 2)
SIZES = (64, 128)
"""Features of the one state; its bytes are the budget."""
BLOCKS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Memory:
    """A way to keep the past.

    Attributes:
        blocks: how many states.
        features: of each; 0 for the mean of a block's values in place of a state.
    """

    blocks: int
    features: int

    def numbers(self, dim: int) -> int:
        """float32 numbers a head: S and z or a mean value, and a mean key if there are several blocks."""
        state = self.features * (dim + 1) if self.features else dim
        return self.blocks * (state + (dim if self.blocks > 1 else 0))

    @property
    def name(self) -> str:
        """What the table calls it."""
        if not self.features:
            return f"{self.blocks} block means" if self.blocks > 1 else "mean of the values"
        return f"{self.blocks} blocks of F' = {self.features}" if self.blocks > 1 else f"F = {self.features}"


def memories(size: int, dim: int) -> list[Memory]:
    """All that fit the bytes of one state of ``size`` features."""
    budget = size * (dim + 1)
    found = [Memory(1, size)]
    for blocks in BLOCKS:
        features = (budget // blocks - dim) // (dim + 1) // 2 * 2
        if features >= 6:
            found.append(Memory(blocks, features))
    return [*found, Memory(2 ** ((budget // (2 * dim)).bit_length() - 1), 0), Memory(1, 0)]


class Reader(nn.Module):
    """Feature maps of all heads and the router's temperature, for one memory."""

    def __init__(self, memory: Memory, heads: int, dim: int, seed: int) -> None:
        super().__init__()
        self.memory = memory
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        if memory.features:
            generator = torch.Generator().manual_seed(seed)
            self.phi_q = FEATURE_MAPS["hedgehog"](heads, dim, memory.features)
            self.phi_k = FEATURE_MAPS["hedgehog"](heads, dim, memory.features).for_keys()
            for phi in (self.phi_q, self.phi_k):
                phi.reset_parameters(generator)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, shares: Tensor | None = None) -> Tensor:
        """What queries [n, A, Q, D] read of keys and values [n, A, T, D] that they see [Q, T].

        ``shares`` [n, A, Q, b] take the router's place.
        """
        memory, blocked = self.memory, seen.unflatten(-1, (self.memory.blocks, -1)).to(q.dtype)
        within = self.phi_q(q) @ self.phi_k(k).mT if memory.features else torch.ones_like(q @ k.mT)
        within = within.unflatten(-1, (memory.blocks, -1)) * blocked
        within = within / within.sum(-1, keepdim=True).clamp_min(1e-12)
        if shares is None and memory.blocks > 1:
            counts = blocked.sum(-1)
            sums = torch.einsum("qbl,nabld->naqbd", blocked, k.unflatten(2, (memory.blocks, -1)))
            means = sums / counts.clamp_min(1)[..., None]
            scores = torch.einsum("naqd,naqbd->naqb", q, means) * q.shape[-1] ** -0.5
            shares = (scores * self.temperature + counts.log()).softmax(-1)
        weights = within if shares is None else within * shares[..., None]
        return weights.flatten(-2) @ v


def softmax_of_the_past(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """The donor's weights on what is seen, made to sum to one [n, A, Q, T]."""
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)


def drawn(seed: int, console: Console, training: int = TEXTS) -> tuple[NDArray[np.int64], Ids]:
    """Training texts and after them held-out ones [n, T], and the tokens that are values."""
    place = recall_donor(RecallDonorSettings(), console)
    rows: list[NDArray[np.int64]] = []
    words: Ids = ()
    for split, count in (("train", training), ("validation", HELD_OUT)):
        texts = pair_text(place, split=split, seed=1000 + seed)
        rows += [texts.pairs(index, CONTEXT) for index in range(count)]
        words = texts.words
    return np.stack(rows), words


def taken(seed: int, console: Console, training: int = TEXTS) -> Tensor:
    """q, k and v of training and held-out texts [3, n, A, T, D]."""
    place = recall_donor(RecallDonorSettings(), console)
    model = hybridize(AutoModelForCausalLM.from_pretrained(place).eval(), HybridConfig(window=WINDOW))
    rows, _ = drawn(seed, console, training)
    layers: list[Tensor] = []

    def note(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        layers.append(torch.stack([inputs.q, inputs.k, inputs.v]))

    with torch.no_grad(), capture(model, note):
        model(torch.from_numpy(rows), use_cache=False)
    return torch.cat(layers, 2)


def learned(memory: Memory, qkv: Tensor, seed: int) -> Reader:
    """Trained on the first texts by the squared error of what is read."""
    reader = Reader(memory, qkv.shape[2], qkv.shape[-1], seed)
    optimiser = torch.optim.Adam(reader.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS if memory.features or memory.blocks > 1 else 0):
        chosen = torch.randperm(TEXTS, generator=generator)[:TEXTS_A_STEP]
        queries = FIRST + torch.randperm(CONTEXT - FIRST, generator=generator)[:QUERIES_A_STEP]
        q, k, v = qkv[:, chosen]
        seen = torch.arange(CONTEXT) <= queries[:, None] - WINDOW
        target = softmax_of_the_past(q[:, :, queries], k, seen) @ v
        loss = relative_error(reader(q[:, :, queries], k, v, seen), target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return reader


def relative_error(read: Tensor, target: Tensor) -> Tensor:
    """Squared error over the square of the target, per head [A]."""
    return (read - target).square().sum((0, 2, 3)) / target.square().sum((0, 2, 3))


@torch.no_grad()
def judged(reader: Reader, qkv: Tensor, *, oracle: bool) -> list[float]:
    """Relative error of each head on the held-out texts."""
    queries = torch.arange(FIRST, CONTEXT)
    seen = torch.arange(CONTEXT) <= queries[:, None] - WINDOW
    reads: list[Tensor] = []
    targets: list[Tensor] = []
    for text in range(TEXTS, TEXTS + HELD_OUT):
        q, k, v = qkv[:, text : text + 1]
        weights = softmax_of_the_past(q[:, :, queries], k, seen)
        shares = weights.unflatten(-1, (reader.memory.blocks, -1)).sum(-1) if oracle else None
        reads.append(reader(q[:, :, queries], k, v, seen, shares))
        targets.append(weights @ v)
    return relative_error(torch.cat(reads), torch.cat(targets)).tolist()


def main(output: Path) -> None:
    """Measure all memories over all seeds, and write every head's error."""
    console = Console(stderr=True)
    results: list[dict[str, object]] = []
    for seed in SEEDS:
        qkv = taken(seed, console)
        dim = qkv.shape[-1]
        for size in SIZES:
            for memory in memories(size, dim):
                reader = learned(memory, qkv, seed)
                errors = {"error": judged(reader, qkv, oracle=False)}
                if memory.blocks > 1:
                    errors["error_with_oracle_router"] = judged(reader, qkv, oracle=True)
                numbers = memory.numbers(dim)
                results.append(
                    {"seed": seed, "size": size, "memory": memory.name, "numbers": numbers, **errors}
                )
                words = {name: round(float(np.mean(heads)), 3) for name, heads in errors.items()}
                console.print(f"seed {seed}, {size}: {memory.name} ({numbers} numbers): {words}")
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
