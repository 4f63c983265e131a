"""What decay, write gates and the delta rule change of a linear state: docs/research/06-gated-states.md.

    python tools/gated_states.py docs/results/gated-states.json
    python tools/gated_states.py docs/results/gated-states-asked.json --asked

Each adds one row for each seed, size and arm that the file lacks, and with --tables prints the page's tables
instead. The second has only the queries that ask for a key learn and count, in the heads that look keys up.

Shapes: n texts, A heads of all layers, T tokens, t = T - 64 that some query sees, Q queries, D head_dim, F
features.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
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

STEPS, EVERY, QUERIES_A_STEP, RATES = 300, 50, 128, (1e-2, 3e-2)
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
    Arm("write gate, dpfp", gated=True, feature_map="dpfp"),
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
    1: (
        "write gate, dpfp",
        "decay per token and feature",
        *(arm.name for arm in ARMS if arm.start is not None),
    ),
    64: ("decay per head", "write gate, decay per token", "delta, β from 0.5", "gated delta, β from 0.5"),
}
"""By size: with one feature there is no second to decay apart, and no delta rule; 64 had to be cheaper."""


@dataclass(frozen=True)
class Plan:
    """What learns from what.

    Attributes:
        sizes: features of the additive states; their bytes are the budget of all.
        asked: whether only queries that ask for a key count, in the training and in errors.
        texts: to train on; the last sixth of them chooses the learning rate and the step instead.
        texts_a_step: of these.
        heads: which are measured; None: all.
        left_out: names of arms.
    """

    sizes: tuple[int, ...] = (1, 32, 64)
    asked: bool = False
    texts: int = TEXTS
    texts_a_step: int = TEXTS_A_STEP
    heads: tuple[int, ...] | None = None
    left_out: tuple[str, ...] = ()

    @property
    def training(self) -> int:
        """Texts that are trained on."""
        return self.texts - self.texts // 6

    def arms(self, size: int) -> list[Arm]:
        """Those that are measured at a size."""
        without = (*LEFT_OUT.get(size, ()), *self.left_out)
        return [arm for arm in ARMS if arm.name not in without]


EVERY_QUERY = Plan()
ASKED = Plan(
    (32,), asked=True, texts=216, texts_a_step=8, heads=RECALL_HEADS,
    left_out=("decay per head", "decay per token and feature", "gated delta, β from 0.5"),
)  # fmt: skip
"""A text has some 10 questions: without more texts there is little to learn from."""


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
        back: how many tokens before it the value was last shown.
        shown: positions of all values that far back [s].
        right: which of them are the key's [s].
    """

    at: int
    back: int
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
            right = torch.from_numpy(row[shown] == row[place])
            found.append(Question(at, at - int(same[-1]), torch.from_numpy(shown), right))
    return found


class Data:
    """Texts of a seed, what softmax reads there, and how far back it looks.

    Args:
        qkv: [3, n, A, T, D].
        asked: the questions of each text.
        plan: whether only questions count, and which texts judge: those after its training texts.
    """

    def __init__(self, qkv: Tensor, asked: Sequence[Sequence[Question]], plan: Plan = EVERY_QUERY) -> None:
        self.qkv, self.asked, self.plan = qkv, asked, plan
        self.held_out = slice(plan.texts, plan.texts + HELD_OUT)
        self.counted = torch.full((qkv.shape[1], len(QUERIES)), not plan.asked)
        for text, found in enumerate(asked):
            self.counted[text, [question.at - FIRST for question in found]] = True
        q, k, v = qkv
        ages = QUERIES[:, None] - torch.arange(CONTEXT)
        targets, near, far = list[Tensor](), list[Tensor](), list[Tensor]()
        for text in range(qkv.shape[1]):
            weights = softmax_of_the_past(q[text, :, QUERIES], k[text], SEEN)
            targets.append(weights @ v[text])
            near.append((weights * (ages <= NEAR)).sum(-1) > 0.5)
            far.append((weights * (ages > FAR)).sum(-1) > 0.5)
        self.targets, self.near, self.far = (torch.stack(parts) for parts in (targets, near, far))

    def error(self, reads: Tensor, texts: Tensor, places: Tensor) -> Tensor:
        """Relative error per head [A] of reads [n, A, Q, D], by some texts at some places of `QUERIES`."""
        counted = self.counted[texts][:, None, places, None]
        return relative_error(reads * counted, self.targets[texts][:, :, places] * counted)

    def judged(self, reads: Tensor) -> Row:
        """Per head: relative errors, and the share of questions whose nearest value is right.

        Args:
            reads: of the held-out texts and all queries [n, A, Q, D].

        Returns:
            ``error`` of all queries; ``near`` and ``far`` of those that have more than half of softmax's
            weight on tokens up to 128, or more than 256, back; ``right``, with nearest the largest cosine
            after the mean of the values shown is taken off; ``right_far``, of values last shown more than
            256 back.
        """
        targets, of = self.targets[self.held_out], self.held_out
        counted = self.counted[of][:, None]
        lost, size = (part.square().sum(-1) * counted for part in (reads - targets, targets))
        right, back = list[Tensor](), list[int]()
        for text, asked in enumerate(self.asked[of]):
            for question in asked:
                values = self.qkv[2, self.plan.texts + text][:, question.shown]
                centre = values.mean(1, keepdim=True)
                read = reads[text, :, question.at - FIRST, None] - centre
                best = functional.cosine_similarity(read, values - centre, dim=-1).argmax(-1)
                right.append(question.right[best])
                back.append(question.back)
        answers = torch.stack(right).float()
        found = {
            "error": lost.sum((0, 2)) / size.sum((0, 2)),
            "near": (lost * self.near[of]).sum((0, 2)) / (size * self.near[of]).sum((0, 2)),
            "far": (lost * self.far[of]).sum((0, 2)) / (size * self.far[of]).sum((0, 2)),
            "right": answers.mean(0),
            "right_far": answers[torch.tensor(back) > FAR].mean(0),
        }
        return {name: heads.tolist() for name, heads in found.items()} | {"questions": len(right)}


def data_of(seed: int, plan: Plan, console: Console) -> Data:
    """q, k, v and questions of the recall demo's donor, on page 04's texts, and more to train on if asked."""
    rows, words = drawn(seed, console, plan.texts)
    qkv = taken(seed, console, plan.texts)
    chosen = qkv if plan.heads is None else qkv[:, :, list(plan.heads)]
    return Data(chosen, [questions(row, words) for row in rows], plan)


# ---- learning


@torch.no_grad()
def reads(state: State, data: Data, texts: Tensor) -> Tensor:
    """What all queries of some texts read [n, A, Q, D]."""
    return torch.cat([state(*data.qkv[:, few], QUERIES) for few in texts.split(1)])


def learned(arm: Arm, size: int, data: Data, seed: int) -> tuple[State, Row]:
    """Trained by the squared error of what is read; the rate and the step chosen for each head.

    Heads share no parameter and Adam treats each number alone: one run trains all heads, each for itself.
    """
    heads, dim = data.qkv.shape[2], data.qkv.shape[-1]
    best = State(arm, size, heads, dim, seed)
    if not list(best.parameters()):
        return best, {}
    lowest, chosen = torch.full((heads,), math.inf), torch.zeros(heads, 2)
    training, validation = data.plan.training, torch.arange(data.plan.training, data.plan.texts)
    every = torch.arange(len(QUERIES))
    for rate in RATES:
        state, generator = State(arm, size, heads, dim, seed), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(state.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for step in range(1, STEPS + 1):
            texts = torch.randperm(training, generator=generator)[: data.plan.texts_a_step]
            places = torch.randperm(len(QUERIES), generator=generator)[:QUERIES_A_STEP]
            if data.plan.asked:
                places = data.counted[texts].any(0).nonzero()[:, 0]
            read = state(*data.qkv[:, texts], QUERIES[places])
            loss = data.error(read, texts, places).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % EVERY == 0:
                errors = data.error(reads(state, data, validation), validation, every)
                better = errors < lowest
                lowest[better], chosen[better] = errors[better], torch.tensor([rate, step])
                with torch.no_grad():
                    for kept, new in zip(best.parameters(), state.parameters(), strict=True):
                        kept[better] = new[better]
    return best, {"rate": chosen[:, 0].tolist(), "step": chosen[:, 1].tolist(), "validation": lowest.tolist()}


@torch.no_grad()
def described(state: State, data: Data) -> Row:
    """Per head, means over tokens of one held-out text: log decay, and the strength of the delta rule."""
    k, found = data.qkv[1, data.plan.texts : data.plan.texts + 1], Row()
    if state.arm.decay != "none":
        found["log_decay"] = state.log_decay(k).mean((0, 2, 3)).tolist()
    if state.arm.start is not None:
        found["strength"] = state.phi_k(k).norm(dim=-1).mean((0, 2)).tolist()
    return found


def measure(path: Path, plan: Plan, console: Console) -> None:
    """Run what the file lacks, every arm with one seed before the next seed."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    done = {(row["seed"], row["size"], row["arm"]) for row in rows}
    for seed in SEEDS:
        left = [
            (size, arm)
            for size in plan.sizes
            for arm in plan.arms(size)
            if (seed, size, arm.name) not in done
        ]
        if not left:
            continue
        data = data_of(seed, plan, console)
        if (seed, 0, SOFTMAX) not in done:
            shares = {
                f"{name}_share": part[data.held_out].float().mean((0, 2)).tolist()
                for name, part in (("near", data.near), ("far", data.far))
            }
            ceiling = data.judged(data.targets[data.held_out]) | shares
            rows.append({"seed": seed, "size": 0, "arm": SOFTMAX, "numbers": 0, **ceiling})
        for size, arm in left:
            rows.append({"seed": seed, "size": size, "arm": arm.name} | measured(arm, size, data, seed))
            write(rows, path)
            words = {key: np.round(np.nanmean(rows[-1][key]), 3) for key in ("error", "near", "far", "right")}
            console.print(f"seed {seed}, {size}: {arm.name}: {words}", soft_wrap=True)


def measured(arm: Arm, size: int, data: Data, seed: int) -> Row:
    """One arm, trained and judged."""
    state, row = learned(arm, size, data, seed)
    row |= {"numbers": arm.numbers(size, data.qkv.shape[-1])} | described(state, data)
    training = torch.arange(data.plan.training)
    trained_on = data.error(reads(state, data, training), training, torch.arange(len(QUERIES)))
    held_out = torch.arange(data.held_out.start, data.held_out.stop)
    return row | data.judged(reads(state, data, held_out)) | {"trained_on": trained_on.tolist()}


SOFTMAX = "softmax of the same tokens"
"""The row that says what the target itself gives."""


# ---- tables


@dataclass(frozen=True)
class Results:
    """All rows, by size and arm."""

    rows: Sequence[Row]

    def of(
        self, size: int, arm: str, quantity: str, heads: Sequence[int] | None = None
    ) -> NDArray[np.float64]:
        """Means over heads, all or those given [seeds]; a head without such queries does not count."""
        found = self.heads(size, arm, quantity)
        return np.array([np.nanmean(values if heads is None else np.take(values, heads)) for values in found])

    def heads(self, size: int, arm: str, quantity: str) -> NDArray[np.float64]:
        """By seed and head [seeds, A]; nothing where the arm has no such quantity."""
        rows = [row for row in self.rows if (row["size"], row["arm"]) == (size, arm)]
        return np.array([row[quantity] for row in rows if quantity in row], dtype=np.float64)

    def complete(self, size: int, plan: Plan) -> list[Arm]:
        """Arms of which every seed was run."""
        return [arm for arm in plan.arms(size) if len(self.of(size, arm.name, "error")) == len(SEEDS)]


TITLES = {
    "numbers": "numbers",
    "error": "error",
    "more": "more than additive",
    "near": "near",
    "far": "far",
    "trained_on": "trained on",
    "right": "nearest is right",
    "right_far": "beyond 256",
}


def tables(results: Results, plan: Plan) -> str:
    """For each size a table of all heads, if all ran, and one of the two that recall."""
    recall, lines = "heads 2 and 3 of layer 3", list[str]()
    errors = ["numbers", "error", "more", "near", "far"]
    for size in plan.sizes:
        if plan.heads is None:
            kinds = [("16 heads", None, [*errors, "trained_on"]), (recall, RECALL_HEADS, [*errors, "right"])]
        else:
            kinds = [(recall, None, ["numbers", "error", "more", "trained_on", "right", "right_far"])]
        for title, heads, shown in kinds:
            lines += heading(f"F = {size}, {title}", *(TITLES[name] for name in shown))
            for arm in results.complete(size, plan):
                cells = _cells(results, arm, size, heads)
                lines.append(line(arm.name, *(cells[name] for name in shown)))
            lines.append("")
    lines += [*_pairs(results, plan), ""]
    lines += heading("what was learned", "heads better", "half after", "recall heads", "β", "recall heads")
    for size in plan.sizes:
        for arm in results.complete(size, plan)[1:]:
            lines.append(line(f"F = {size}, {arm.name}", *_habits(results, arm, size, plan)))
    return "\n".join([*lines, "", _ceiling(results, plan)])


PAIRS = (
    ("delta, β from 0.02", "write gate"),
    ("write gate, dpfp", "write gate"),
    ("delta, β from 0.02, dpfp", "write gate"),
    ("delta, β from 0.02, dpfp", "write gate, dpfp"),
)
"""Additive states with a gate against the delta rule, whose strength is a gate too; and rule against map."""


def _pairs(results: Results, plan: Plan) -> list[str]:
    """What the first of two arms has on the second of the same seed, in the heads that recall."""
    lines = heading("heads 2 and 3 of layer 3", "error", "nearest is right")
    heads = RECALL_HEADS if plan.heads is None else None
    for size in plan.sizes:
        names = [arm.name for arm in results.complete(size, plan)]
        for first, second in PAIRS:
            if first in names and second in names:
                more = [
                    results.of(size, first, name, heads) - results.of(size, second, name, heads)
                    for name in ("error", "right")
                ]
                lines.append(line(f"F = {size}, {first} − {second}", *map(over_seeds, more)))
    return lines


def _habits(results: Results, arm: Arm, size: int, plan: Plan) -> list[str]:
    """Heads whose error is below the additive state's, seeds averaged; tokens until half is forgotten; β."""
    found = {
        name: results.heads(size, of, quantity)
        for name, of, quantity in (
            ("error", arm.name, "error"),
            ("additive", ADDITIVE.name, "error"),
            ("decay", arm.name, "log_decay"),
            ("strength", arm.name, "strength"),
        )
    }
    recall = list(RECALL_HEADS if plan.heads is None else range(len(plan.heads)))
    better = int((found["error"].mean(0) < found["additive"].mean(0)).sum())
    cells = [f"{better} of {found['error'].shape[1]}"]
    for name, digits in (("decay", 0), ("strength", 2)):
        values = np.log(0.5) / found[name] if name == "decay" else found[name]
        parts = [values, values[:, recall]] if len(values) else []
        cells += [f"{np.median(part):.{digits}f}" for part in parts] or ["", ""]
    return cells


def _ceiling(results: Results, plan: Plan) -> str:
    """What the target itself answers."""
    recall = RECALL_HEADS if plan.heads is None else None
    right, count = (
        results.of(0, SOFTMAX, "right", recall).mean(),
        results.heads(0, SOFTMAX, "questions").sum(),
    )
    return f"{SOFTMAX}: nearest is right {right:.3f}, of {count:.0f} questions"


def _cells(results: Results, arm: Arm, size: int, heads: Sequence[int] | None) -> dict[str, str]:
    """What a table says of an arm; ``more`` is its error less the additive state's, of the same seed."""
    means = {
        name: f"{found.mean():.3f}"
        for name in TITLES
        if name != "numbers" and len(found := results.of(size, arm.name, name, heads))
    }
    error, plain = (results.of(size, name, "error", heads) for name in (arm.name, ADDITIVE.name))
    return means | {
        "numbers": f"{arm.numbers(size, 32):,}",
        "error": over_seeds(error),
        "more": "" if arm == ADDITIVE else over_seeds(error - plain),
    }


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--asked", action="store_true", help="only queries that ask, in the heads that recall"
    )
    parser.add_argument("--tables", action="store_true", help="print the page's tables, and run nothing")
    given = parser.parse_args()
    plan = ASKED if given.asked else EVERY_QUERY
    if given.tables:
        print(tables(Results(json.loads(given.output.read_text(encoding="utf-8"))), plan))
    else:
        measure(given.output, plan, Console(stderr=True))


if __name__ == "__main__":
    main()
