"""What decay, write gates and the delta rule change of a linear state: docs/research/06-gated-states.md.

    python tools/gated_states.py docs/results/gated-states.json
    python tools/gated_states.py docs/results/gated-states.json --tables

The first adds one row for each seed, size and arm that the file lacks, the second prints the page's tables.

Shapes: n texts, A heads of all layers, T tokens, t = T - 64 that some query sees, Q queries, D head_dim, F
features.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.layers.write_gates import WriteGate, WriteStrength
from equipoise.ops.delta import delta_attention
from equipoise.recall_donor import CONTEXT
from memory_blocks import (
    FIRST,
    HELD_OUT,
    SEEDS,
    TEXTS,
    TEXTS_A_STEP,
    WINDOW,
    drawn,
    relative_error,
    softmax_of_the_past,
    taken,
)
from tables import heading, line, over_seeds, write

VALIDATION = 4
"""Of the training texts, the last so many choose the learning rate and the step; nothing trains on them."""
STEPS, EVERY, QUERIES_A_STEP, RATES = 300, 50, 128, (1e-2, 3e-2)
SIZES = (1, 32, 64)
"""Features of the additive states; their bytes are the budget of all."""
OPEN = 7.0
"""Where decays start: sigmoid(7) = 0.9991 a token, half after 760 tokens, more than a text has."""
FLOOR = -1.5
"""Least logarithm of a token's decay: exp(448 * 1.5) is within float64, and 0.22 a token forgets at once."""
NEAR, FAR = 128, 256
RECALL_HEADS = (14, 15)
"""Heads 2 and 3 of layer 3, which the donor looks pairs up with (LOG.md, 2026-11-21)."""
QUERIES = torch.arange(FIRST, CONTEXT)
SEEN = torch.arange(CONTEXT) <= QUERIES[:, None] - WINDOW

Decay = Literal["none", "head", "token", "channel"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A rule by which a state takes in tokens.

    Attributes:
        name: what the table calls it.
        gated: whether keys are scaled by exp(k . w).
        decay: what the state is multiplied by before a token: nothing, a learned number per head, one
            computed from the token's k, or one of these per feature.
        start: for the delta rule, b of the writing strength sigmoid(k . w + b) at the start; None: additive.
        feature_map: of states with more than one feature.
    """

    name: str
    gated: bool = False
    decay: Decay = "none"
    start: float | None = None
    feature_map: str = "hedgehog"

    def features(self, size: int, dim: int) -> int:
        """As many as fit the bytes of an additive state of ``size``: the delta rule has no normaliser."""
        return size if self.start is None else size * (dim + 1) // dim // self._even * self._even

    @property
    def _even(self) -> int:
        return 2 if FEATURE_MAPS[self.feature_map].two_sided else 1

    def numbers(self, size: int, dim: int) -> int:
        """float32 numbers a head: S, and z of an additive state."""
        return self.features(size, dim) * (dim + (self.start is None))


ADDITIVE = Arm("additive")
ARMS = (
    ADDITIVE,
    Arm("write gate", gated=True),
    Arm("decay per head", decay="head"),
    Arm("decay per token", decay="token"),
    Arm("decay per token and feature", decay="channel"),
    Arm("write gate, decay per token", gated=True, decay="token"),
    Arm("delta, β from 0.02", start=-4.0, feature_map="unit"),
    Arm("delta, β from 0.5", start=0.0, feature_map="unit"),
    Arm("delta, β from 0.02, dpfp", start=-4.0, feature_map="dpfp"),
    Arm("gated delta, β from 0.02", decay="token", start=-4.0, feature_map="unit"),
    Arm("gated delta, β from 0.5", decay="token", start=0.0, feature_map="unit"),
)


LEFT_OUT: dict[int, tuple[str, ...]] = {
    1: ("decay per token and feature", *(arm.name for arm in ARMS if arm.start is not None)),
    64: ("decay per head", "write gate, decay per token", "delta, β from 0.5", "gated delta, β from 0.5"),
}
"""By size: with one feature there is no second to decay apart, and no delta rule; 64 had to be cheaper."""


def arms(size: int) -> list[Arm]:
    """Those that are measured at a size."""
    return [arm for arm in ARMS if arm.name not in LEFT_OUT.get(size, ())]


class State(nn.Module):
    """Maps, gates and decays of all heads, for one arm. The first dimension of every parameter is A."""

    def __init__(self, arm: Arm, size: int, heads: int, dim: int, seed: int) -> None:
        super().__init__()
        self.arm, count = arm, arm.features(size, dim)
        chosen = FEATURE_MAPS["constant" if size == 1 else arm.feature_map]
        self.phi_q, phi_k = chosen(heads, dim, count), chosen(heads, dim, count).for_keys()
        self.phi_k = phi_k
        if arm.start is not None:
            self.phi_k = WriteStrength(phi_k)
        elif arm.gated:
            self.phi_k = WriteGate(phi_k)
        generator = torch.Generator().manual_seed(seed)
        for phi in (self.phi_q, self.phi_k):
            phi.reset_parameters(generator)
        if isinstance(self.phi_k, WriteStrength) and arm.start is not None:
            self.phi_k.write_bias.data.fill_(arm.start)
        if arm.decay != "none":
            parts = count if arm.decay == "channel" else 1
            self.decay_bias = nn.Parameter(torch.full((heads, 1, parts), OPEN))
        if arm.decay in ("token", "channel"):
            self.decay_weight = nn.Parameter(torch.zeros(heads, dim, self.decay_bias.shape[-1]))

    def log_decay(self, k: Tensor) -> Tensor:
        """Logarithm of what a token multiplies the state by before it is written [n, A, t, 1 or F]."""
        logits = self.decay_bias.expand(*k.shape[:3], -1)
        if self.arm.decay != "head":
            logits = logits + k @ self.decay_weight
        return functional.logsigmoid(logits).clamp_min(FLOOR)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor) -> Tensor:
        """What queries at the given positions [Q] read of the tokens 64 or more before them [n, A, Q, D].

        With c the running sum of log decays, a state that decays is one that does not, of keys (delta rule:
        values) times exp(-c), read by queries (delta rule: outputs) times exp(c). float64 has the range.
        """
        k, v, newest = k[:, :, :-WINDOW], v[:, :, :-WINDOW], queries - WINDOW
        keys, dtype = self.phi_k(k), q.dtype
        rises = falls = None
        if self.arm.decay != "none":
            sums = self.log_decay(k).double().cumsum(2)
            falls, rises, keys = sums.exp(), (-sums).exp(), keys.double()
        if self.arm.start is not None:
            values = v if rises is None else v * rises
            read, _ = delta_attention(
                q[:, :, WINDOW:].to(values.dtype), k.to(values.dtype), values,
                self.phi_q(q[:, :, WINDOW:]).to(values.dtype), keys,
            )  # fmt: skip
            return (read if falls is None else read * falls)[:, :, newest].to(dtype)
        read = self.phi_q(q[:, :, queries])
        if rises is not None and falls is not None:
            read, keys = read * falls[:, :, newest], keys * rises
        weights = read @ keys.mT * (torch.arange(k.shape[2]) <= newest[:, None])
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        return weights.to(dtype) @ v


# ---- what is aimed at


@dataclass(frozen=True)
class Question:
    """A key that is asked for, its value last shown 64 or more tokens before.

    Attributes:
        at: position of the key.
        shown: positions of all values that far back [s].
        right: which of them are the key's [s].
    """

    at: int
    shown: Tensor
    right: Tensor


def questions(row: NDArray[np.int64], words: Sequence[int]) -> list[Question]:
    """Those of a text, from token 128 on."""
    values = np.flatnonzero(np.isin(row, list(words)))
    found: list[Question] = []
    for place in values:
        at = int(place) - 1
        shown = values[values <= at - WINDOW]
        same = values[(values < at) & (row[values - 1] == row[at])]
        if at >= FIRST and len(same) and same[-1] <= at - WINDOW:
            found.append(Question(at, torch.from_numpy(shown), torch.from_numpy(row[shown] == row[place])))
    return found


class Data:
    """Texts of a seed, what softmax reads there, and how far back it looks.

    Args:
        qkv: [3, n, A, T, D].
        asked: the questions of each text.
    """

    def __init__(self, qkv: Tensor, asked: Sequence[Sequence[Question]]) -> None:
        self.qkv, self.asked = qkv, asked
        q, k, v = qkv
        ages = QUERIES[:, None] - torch.arange(CONTEXT)
        targets, near, far = list[Tensor](), list[Tensor](), list[Tensor]()
        for text in range(qkv.shape[1]):
            weights = softmax_of_the_past(q[text, :, QUERIES], k[text], SEEN)
            targets.append(weights @ v[text])
            near.append((weights * (ages <= NEAR)).sum(-1) > 0.5)
            far.append((weights * (ages > FAR)).sum(-1) > 0.5)
        self.targets, self.near, self.far = (torch.stack(parts) for parts in (targets, near, far))

    @cached_property
    def held_out(self) -> slice:
        """The texts that judge."""
        return slice(TEXTS, TEXTS + HELD_OUT)

    def judged(self, reads: Tensor) -> Row:
        """Per head: relative errors, and the share of questions whose nearest value is right.

        Args:
            reads: of the held-out texts and all queries [n, A, Q, D].

        Returns:
            ``error`` of all queries; ``near`` and ``far`` of those that have more than half of softmax's
            weight on tokens up to 128, or more than 256, back; ``right``, with nearest the largest cosine
            after the mean of the values shown is taken off.
        """
        targets, of = self.targets[self.held_out], self.held_out
        lost, size = (reads - targets).square().sum(-1), targets.square().sum(-1)
        right = list[Tensor]()
        for text, asked in enumerate(self.asked[of]):
            for question in asked:
                values = self.qkv[2, TEXTS + text][:, question.shown]
                centre = values.mean(1, keepdim=True)
                read = reads[text, :, question.at - FIRST, None] - centre
                best = functional.cosine_similarity(read, values - centre, dim=-1).argmax(-1)
                right.append(question.right[best])
        found = {
            "error": lost.sum((0, 2)) / size.sum((0, 2)),
            "near": (lost * self.near[of]).sum((0, 2)) / (size * self.near[of]).sum((0, 2)),
            "far": (lost * self.far[of]).sum((0, 2)) / (size * self.far[of]).sum((0, 2)),
            "right": torch.stack(right).float().mean(0),
        }
        return {name: heads.tolist() for name, heads in found.items()} | {"questions": len(right)}


def data_of(seed: int, console: Console) -> Data:
    """q, k, v and questions of the recall demo's donor, on page 04's texts."""
    rows, words = drawn(seed, console)
    return Data(taken(seed, console), [questions(row, words) for row in rows])


# ---- learning


@torch.no_grad()
def reads(state: State, data: Data, texts: Sequence[int]) -> Tensor:
    """What all queries of some texts read [n, A, Q, D]."""
    return torch.cat([state(*data.qkv[:, text : text + 1], QUERIES) for text in texts])


def learned(arm: Arm, size: int, data: Data, seed: int) -> tuple[State, Row]:
    """Trained by the squared error of what is read; the rate and the step chosen for each head.

    Heads share no parameter and Adam treats each number alone: one run trains all heads, each for itself.
    """
    heads, dim = data.qkv.shape[2], data.qkv.shape[-1]
    best = State(arm, size, heads, dim, seed)
    if not list(best.parameters()):
        return best, {}
    lowest, chosen = torch.full((heads,), math.inf), torch.zeros(heads, 2)
    training, validation = TEXTS - VALIDATION, list(range(TEXTS - VALIDATION, TEXTS))
    for rate in RATES:
        state, generator = State(arm, size, heads, dim, seed), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(state.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for step in range(1, STEPS + 1):
            texts = torch.randperm(training, generator=generator)[:TEXTS_A_STEP]
            places = torch.randperm(len(QUERIES), generator=generator)[:QUERIES_A_STEP]
            read = state(*data.qkv[:, texts], QUERIES[places])
            loss = relative_error(read, data.targets[texts][:, :, places]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % EVERY == 0:
                errors = relative_error(reads(state, data, validation), data.targets[validation])
                better = errors < lowest
                lowest[better], chosen[better] = errors[better], torch.tensor([rate, step])
                with torch.no_grad():
                    for kept, new in zip(best.parameters(), state.parameters(), strict=True):
                        kept[better] = new[better]
    return best, {"rate": chosen[:, 0].tolist(), "step": chosen[:, 1].tolist(), "validation": lowest.tolist()}


@torch.no_grad()
def described(state: State, data: Data) -> Row:
    """Per head, means over tokens of one held-out text: log decay, and the strength of the delta rule."""
    k, found = data.qkv[1, TEXTS : TEXTS + 1], Row()
    if state.arm.decay != "none":
        found["log_decay"] = state.log_decay(k).mean((0, 2, 3)).tolist()
    if state.arm.start is not None:
        found["strength"] = state.phi_k(k).norm(dim=-1).mean((0, 2)).tolist()
    return found


def measure(path: Path, console: Console) -> None:
    """Run what the file lacks, every arm with one seed before the next seed."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    done = {(row["seed"], row["size"], row["arm"]) for row in rows}
    for seed in SEEDS:
        wanted = [(size, arm) for size in SIZES for arm in arms(size) if (seed, size, arm.name) not in done]
        if not wanted:
            continue
        data, texts = data_of(seed, console), range(TEXTS, TEXTS + HELD_OUT)
        if (seed, 0, SOFTMAX) not in done:
            shares = {
                f"{name}_share": part[data.held_out].float().mean((0, 2)).tolist()
                for name, part in (("near", data.near), ("far", data.far))
            }
            ceiling = data.judged(data.targets[data.held_out]) | shares
            rows.append({"seed": seed, "size": 0, "arm": SOFTMAX, "numbers": 0, **ceiling})
        for size, arm in wanted:
            state, choice = learned(arm, size, data, seed)
            row: Row = {"seed": seed, "size": size, "arm": arm.name}
            row |= {"numbers": arm.numbers(size, data.qkv.shape[-1])} | choice | described(state, data)
            row |= data.judged(reads(state, data, texts))
            trained_on = range(TEXTS - VALIDATION)
            row["trained_on"] = relative_error(
                reads(state, data, trained_on), data.targets[: TEXTS - VALIDATION]
            ).tolist()
            rows.append(row)
            write(rows, path)
            words = {key: f"{np.nanmean(row[key]):.3f}" for key in ("error", "near", "far")}
            pairs = {key: np.round(np.array(row[key])[[*RECALL_HEADS]], 3) for key in ("error", "right")}
            console.print(f"seed {seed}, {size}: {arm.name}: {words}, recall heads {pairs}", soft_wrap=True)


SOFTMAX = "softmax of the same tokens"


# ---- tables


@dataclass(frozen=True)
class Results:
    """All rows, by size and arm."""

    rows: Sequence[Row]

    def of(
        self, size: int, arm: str, quantity: str, heads: Sequence[int] | None = None
    ) -> NDArray[np.float64]:
        """Means over heads, all or those given [seeds]; a head without such queries does not count."""
        found = [row for row in self.rows if (row["size"], row["arm"]) == (size, arm)]
        values = np.array([row[quantity] for row in found], dtype=np.float64).reshape(len(found), -1)
        return np.nanmean(values if heads is None else values[:, list(heads)], 1)

    def complete(self, size: int) -> list[Arm]:
        """Arms of which every seed was run."""
        return [arm for arm in arms(size) if len(self.of(size, arm.name, "error")) == len(SEEDS)]


def tables(results: Results) -> str:
    """A table of all heads and one of the two that recall, for each size."""
    lines: list[str] = []
    for size in SIZES:
        lines += [*_table(results, size, None), "", *_table(results, size, RECALL_HEADS), ""]
    return "\n".join(lines[:-1])


def _table(results: Results, size: int, heads: Sequence[int] | None) -> list[str]:
    """Errors of each arm, and what is added to the additive one's of the same seed."""
    where = f"F = {size}, " + ("16 heads" if heads is None else "heads 2 and 3 of layer 3")
    cells = ["numbers", "error", "more than additive", "near", "far"]
    cells += ["trained on"] if heads is None else ["nearest is right"]
    lines = heading(where, *cells)
    plain = results.of(size, ADDITIVE.name, "error", heads)
    shown = ("error", "near", "far", "trained_on" if heads is None else "right")
    for arm in results.complete(size):
        error, near, far, last = (results.of(size, arm.name, quantity, heads) for quantity in shown)
        means = [f"{values.mean():.3f}" for values in (near, far, last)]
        more = "" if arm == ADDITIVE else over_seeds(error - plain)
        lines.append(line(arm.name, f"{arm.numbers(size, 32):,}", over_seeds(error), more, *means))
    return lines


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--tables", action="store_true", help="print the page's tables, and run nothing")
    given = parser.parse_args()
    if given.tables:
        print(tables(Results(json.loads(given.output.read_text(encoding="utf-8")))))
    else:
        measure(given.output, Console(stderr=True))


if __name__ == "__main__":
    main()
