"""What makes a donor's heads hard for linear attention: docs/research/05-hard-donors.md.

    python tools/hard_donors.py docs/results/hard-donors.json [DONOR TEXTS]
    python tools/hard_donors.py docs/results/hard-donors.json --tables

The first measures; DONOR, a directory with a Llama, and TEXTS, a file of documents for it, add an outside
check. The second prints the page's tables from what was measured.

Shapes: n texts, A heads of all layers, T tokens, Q queries, D head_dim, r resamples.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise import HybridConfig, capture, hybridize
from equipoise.data.sources import load_documents
from equipoise.demo_donor import DonorSettings, cached_donor
from equipoise.evaluate.recall_text import encode, opening
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.load import load_tokenizer
from equipoise.recall_donor import RecallDonorSettings, pair_text, recall_donor
from memory_blocks import (
    FIRST,
    HELD_OUT,
    LEARNING_RATE,
    SEEDS,
    TEXTS,
    TEXTS_A_STEP,
    WINDOW,
    Memory,
    Reader,
    relative_error,
    softmax_of_the_past,
)
from tables import heading, line, over_seeds, signed, write

LENGTH, FEATURES, STEPS = 256, 64, 200
MAPS = ("hedgehog", "hedgehog-joint")
TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Factors of q: above 1 sharpens."""
RANK_TEXTS = 6
"""Held-out texts of which singular values are taken."""
QUERIES = torch.arange(FIRST, LENGTH)
"""The later half: their weights on the earlier half are a full matrix, which the causal mask does not cut."""
SEEN = torch.arange(LENGTH) <= QUERIES[:, None]
PREDICTORS = {
    "entropy": "entropy",
    "score_std": "standard deviation of scores",
    "far_mass": f"mass {WINDOW} or more back",
    "effective_rank": "effective rank",
    "tail": f"energy beyond rank {FEATURES}",
    "far_tail": "the same, later half on earlier half",
    "mean_error": "error of the mean of the values",
}
RESAMPLES = 10_000

Floats = NDArray[np.float64]
Row = dict[str, Any]


# ---- donors and their q, k, v


@dataclass(frozen=True)
class Case:
    """A donor on a kind of text.

    Attributes:
        name: of both.
        place: the donor's directory.
        rows: of a seed, the token ids of the training texts and after them those that judge, [n, T].
    """

    name: str
    place: Path
    rows: Callable[[int], NDArray[np.int64]]


def cases(console: Console, outside: tuple[Path, Path] | None) -> list[Case]:
    """The demo's donors, on code and on pairs, and one from outside if there is one."""
    demo, recall = (
        cached_donor(DonorSettings(), console),
        recall_donor(RecallDonorSettings(), console),
    )

    def drawn(*, pairs: bool) -> Callable[[int], NDArray[np.int64]]:
        def rows(seed: int) -> NDArray[np.int64]:
            found: list[NDArray[np.int64]] = []
            for split, count in (("train", TEXTS), ("validation", HELD_OUT)):
                texts, rng = (
                    pair_text(recall, split=split, seed=1000 + seed),
                    random.Random(f"{split} {seed}"),
                )
                for index in range(count):
                    document = rng.randrange(len(texts.haystack.documents))
                    plain = texts.haystack.stretch(document, LENGTH, rng)
                    found.append(texts.pairs(index, LENGTH) if pairs else plain)
            return np.stack(found)

        return rows

    chosen = [
        Case("demo, code", demo, drawn(pairs=False)),
        Case("recall, code", recall, drawn(pairs=False)),
        Case("recall, pairs", recall, drawn(pairs=True)),
    ]
    return chosen if outside is None else [*chosen, from_outside(*outside)]


def from_outside(place: Path, file: Path) -> Case:
    """A donor given on the command line, each text the start of a document that is long enough."""
    tokenizer = load_tokenizer(str(place))
    start = opening(tokenizer)
    texts = [(*start, *encode(tokenizer, text)) for text in load_documents(str(file))["text"]]
    long = [text[:LENGTH] for text in texts if len(text) >= LENGTH]

    def rows(seed: int) -> NDArray[np.int64]:
        return np.array(random.Random(seed).sample(long, TEXTS + HELD_OUT), dtype=np.int64)

    return Case(place.name, place, rows)


def taken(case: Case, seed: int) -> Tensor:
    """q, k and v of all heads [3, n, A, T, D]; k and v of grouped queries are repeated."""
    donor: Any = AutoModelForCausalLM.from_pretrained(case.place, dtype=torch.float32).eval()
    layers: list[Tensor] = []

    def note(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        groups = inputs.q.shape[1] // inputs.k.shape[1]
        k, v = (part.repeat_interleave(groups, 1) for part in (inputs.k, inputs.v))
        if abs(inputs.scale * k.shape[-1] ** 0.5 - 1) > 1e-6 or inputs.softcap is not None:
            raise ValueError(f"expected scores q·k/√D without a cap, got a scale of {inputs.scale}.")
        layers.append(torch.stack([inputs.q, k, v]))

    model = hybridize(donor, HybridConfig(window=WINDOW))
    with torch.no_grad(), capture(model, note):
        model(torch.from_numpy(case.rows(seed)), use_cache=False)
    return torch.cat(layers, 2)


def sharpened(qkv: Tensor, temperature: float) -> Tensor:
    """q times a factor, k and v as they are."""
    return qkv * torch.tensor([temperature, 1.0, 1.0]).view(3, 1, 1, 1, 1)


# ---- before learning


@torch.no_grad()
def measured(qkv: Tensor) -> dict[str, list[float]]:
    """What each head's attention is like, on the held-out texts: `PREDICTORS`."""
    q, k, v = qkv[:, TEXTS:]
    queries, every = q[:, :, QUERIES], torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    weights = softmax_of_the_past(queries, k, SEEN)
    scores, count = queries @ k.mT * q.shape[-1] ** -0.5, SEEN.sum(-1, keepdim=True)
    centred = (scores - (scores * SEEN).sum(-1, keepdim=True) / count) * SEEN
    spread = (centred.square().sum(-1) / count[:, 0]).sqrt()
    far = torch.arange(LENGTH) <= QUERIES[:, None] - WINDOW
    few = slice(0, RANK_TEXTS)
    square = softmax_of_the_past(q[few], k[few], every)
    values = torch.linalg.svdvals(square)
    shares = values / values.sum(-1, keepdim=True)
    found = {
        "entropy": -torch.special.xlogy(weights, weights).sum(-1).mean((0, 2)),
        "score_std": spread.mean((0, 2)),
        "far_mass": (weights * far).sum(-1).mean((0, 2)),
        "effective_rank": (-torch.special.xlogy(shares, shares).sum(-1)).exp().mean(0),
        "tail": beyond(values).mean(0),
        "far_tail": beyond(torch.linalg.svdvals(weights[few, ..., :FIRST])).mean(0),
        "mean_error": relative_error((SEEN / count) @ v, weights @ v),
    }
    return {name: heads.tolist() for name, heads in found.items()}


def beyond(singular: Tensor) -> Tensor:
    """The share of a matrix's squares that its best approximation of rank F leaves out [n, A]."""
    squares = singular.square()
    return squares[..., FEATURES:].sum(-1) / squares.sum(-1)


# ---- learning


def learned(feature_map: str, qkv: Tensor, seed: int) -> Reader:
    """Maps of all heads, trained on the first texts by the squared error of the output."""
    heads, dim = qkv.shape[2], qkv.shape[-1]
    reader = Reader(Memory(1, FEATURES), heads, dim, seed)
    generator = torch.Generator().manual_seed(seed)
    reader.phi_q = FEATURE_MAPS[feature_map](heads, dim, FEATURES)
    reader.phi_k = FEATURE_MAPS[feature_map](heads, dim, FEATURES).for_keys()
    for phi in (reader.phi_q, reader.phi_k):
        phi.reset_parameters(generator)
    optimiser = torch.optim.Adam([*reader.phi_q.parameters(), *reader.phi_k.parameters()], lr=LEARNING_RATE)
    with torch.no_grad():
        targets = softmax_of_the_past(qkv[0, :TEXTS][:, :, QUERIES], qkv[1, :TEXTS], SEEN) @ qkv[2, :TEXTS]
    for _ in range(STEPS):
        chosen = torch.randperm(TEXTS, generator=generator)[:TEXTS_A_STEP]
        q, k, v = qkv[:, chosen]
        loss = relative_error(reader(q[:, :, QUERIES], k, v, SEEN), targets[chosen]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return reader


@torch.no_grad()
def judged(reader: Reader, qkv: Tensor) -> list[float]:
    """Relative error of each head."""
    q, k, v = qkv
    target = softmax_of_the_past(q[:, :, QUERIES], k, SEEN) @ v
    return relative_error(reader(q[:, :, QUERIES], k, v, SEEN), target).tolist()


def runs(chosen: Sequence[Case], console: Console) -> list[Row]:
    """A row per case, seed and factor: what was measured, and each map's errors by head."""
    rows: list[Row] = []
    for seed in SEEDS:
        for case in chosen:
            qkv, layer = taken(case, seed), AutoConfig.from_pretrained(case.place).num_attention_heads
            for temperature in TEMPERATURES:
                scaled = sharpened(qkv, temperature)
                row: Row = {"case": case.name, "seed": seed, "factor": temperature, "heads_a_layer": layer}
                row |= measured(scaled)
                for feature_map in MAPS if temperature == 1 else MAPS[:1]:
                    reader = learned(feature_map, scaled, seed)
                    row[feature_map] = judged(reader, scaled[:, TEXTS:])
                    row[f"{feature_map}, trained on"] = judged(reader, scaled[:, :TEXTS])
                rows.append(row)
                words = {
                    key: round(float(np.mean(heads)), 3) for key, heads in row.items() if key not in KEYS
                }
                console.print(f"{case.name}, seed {seed}, x {temperature}: {words}", soft_wrap=True)
    return rows


KEYS = ("case", "seed", "factor", "heads_a_layer")


# ---- tables


@dataclass(frozen=True)
class Results:
    """All rows, by case, factor and quantity."""

    rows: Sequence[Row]

    @property
    def names(self) -> list[str]:
        """The cases, in order."""
        return list(dict.fromkeys(row["case"] for row in self.rows))

    def of(self, case: str, factor: float, quantity: str) -> Floats:
        """By seed and head [seeds, A]; a map's name with ``, left`` is its error over that of the mean."""
        plain = quantity.removesuffix(", left")
        found = [row for row in self.rows if (row["case"], row["factor"]) == (case, factor)]
        values = np.array([row[plain] for row in found])
        return values if plain == quantity else values / np.array([row["mean_error"] for row in found])

    def mean(self, case: str, factor: float, quantity: str) -> Floats:
        """Over heads [seeds]; what is left is the quotient of the two means."""
        plain = quantity.removesuffix(", left")
        values = self.of(case, factor, plain).mean(1)
        return values if plain == quantity else values / self.of(case, factor, "mean_error").mean(1)


def ranks(values: Floats) -> Floats:
    """Average ranks within rows [r, A]."""
    below = (values[:, None, :] < values[:, :, None]).sum(-1)
    return below + (values[:, None, :] == values[:, :, None]).sum(-1) / 2


def spearman(x: Floats, y: Floats) -> Floats:
    """Rank correlation of heads: of the sample, then of each resample [1 + r].

    Cases with as many heads get the same resamples: the demo's donors have heads in common.
    """
    count = len(x)
    drawn = np.random.default_rng(count).integers(count, size=(RESAMPLES, count))
    drawn = np.concatenate([np.arange(count)[None], drawn])
    found: list[Floats] = []
    for part in np.array_split(drawn, 20):
        a, b = ranks(x[part]), ranks(y[part])
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        found.append((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)))
    return np.concatenate(found)


def interval(draws: Floats) -> str:
    """The sample's value and the resamples' 95%."""
    low, high = np.nanquantile(draws[1:], [0.025, 0.975])
    return signed(f"{draws[0]:.2f} [{low:.2f}, {high:.2f}]")


def correlations(results: Results, quantity: str, *, first_layer: bool = True) -> list[str]:
    """Spearman's correlation of each predictor with an error, over heads, of seeds' means."""
    skipped = {row["case"]: 0 if first_layer else row["heads_a_layer"] for row in results.rows}
    lines = heading("predictor", *results.names, "mean")
    for predictor, words in PREDICTORS.items():
        draws = [
            spearman(*(results.of(name, 1.0, key).mean(0)[skipped[name] :] for key in (predictor, quantity)))
            for name in results.names
        ]
        lines.append(line(words, *map(interval, draws), interval(np.mean(draws, 0))))
    return lines


def donors(results: Results) -> list[str]:
    """The cases as they are."""
    lines = heading("", *results.names)
    for quantity, words in {
        **{name: f"error, `{name}`" for name in MAPS},
        **{f"{name}, trained on": f"`{name}`, on its training texts" for name in MAPS},
        **{f"{name}, left": f"left of the mean's error, `{name}`" for name in MAPS},
        **PREDICTORS,
    }.items():
        digits = 2 if quantity in ("entropy", "score_std", "effective_rank") else 3
        cells = [over_seeds(results.mean(name, 1.0, quantity), digits) for name in results.names]
        lines.append(line(words, *cells))
    return lines


def intervention(results: Results) -> list[str]:
    """Error, entropy and what is left by the factor of q, and how many heads are worse at the largest."""
    last, first = TEMPERATURES[-1], TEMPERATURES[0]
    lines = heading("donor, text", "", *(f"τ = {t:g}" for t in TEMPERATURES), "heads that rise")
    for name in results.names:
        for quantity, words in (
            ("entropy", "entropy"), (MAPS[0], "error"), ("mean_error", "mean's error"),
            (f"{MAPS[0]}, left", "left"), ("tail", "beyond rank F"),
        ):  # fmt: skip
            cells = [over_seeds(results.mean(name, t, quantity)) for t in TEMPERATURES]
            rises = np.all(results.of(name, last, quantity) > results.of(name, first, quantity), 0)
            lines.append(line(name, words, *cells, f"{int(rises.sum())} of {rises.size}"))
    return lines


def slopes(results: Results) -> list[str]:
    """What a nat of entropy costs: across heads, and within a head whose q is scaled."""
    lines = heading("error per nat of entropy", *results.names)
    across: list[str] = []
    within: list[str] = []
    for name in results.names:
        entropy, error = (results.of(name, 1.0, key) for key in ("entropy", MAPS[0]))
        across.append(
            over_seeds(np.array([np.polyfit(x, y, 1)[0] for x, y in zip(entropy, error, strict=True)]))
        )
        change = [results.mean(name, 1.4, key) - results.mean(name, 0.7, key) for key in (MAPS[0], "entropy")]
        within.append(over_seeds(change[0] / change[1]))
    return [
        *lines,
        line("across heads, as they are", *across),
        line("within heads, τ from 0.7 to 1.4", *within),
    ]


def matched(results: Results) -> list[str]:
    """Differences to the first case, as they are and once its q is scaled to the other's measure."""
    first, rules = results.names[0], ("entropy", "mean_error")
    lines = heading(
        f"error, more than {first}", "as they are", *(f"at equal {PREDICTORS[rule]}" for rule in rules)
    )
    for name in results.names[1:]:
        error = results.mean(name, 1.0, MAPS[0])
        cells = [over_seeds(error - results.mean(first, 1.0, MAPS[0]))]
        for rule in rules:
            x, y = (
                np.array([results.mean(first, t, key) for t in TEMPERATURES]).T for key in (rule, MAPS[0])
            )
            wanted = results.mean(name, 1.0, rule)
            rest = np.array([e - along(w, a, b) for e, w, a, b in zip(error, wanted, x, y, strict=True)])
            cells.append(over_seeds(rest) if np.isfinite(rest).all() else "out of range")
        lines.append(line(name, *cells))
    return lines


def along(wanted: float, x: Floats, y: Floats) -> float:
    """y where x is as wanted, between points; NaN outside of them."""
    order = np.argsort(x)
    return float(np.interp(wanted, x[order], y[order], left=np.nan, right=np.nan))


def tables(rows: Sequence[Row]) -> str:
    """All tables, in Markdown."""
    results = Results(rows)
    parts: Mapping[str, list[str]] = {
        "Donors": donors(results),
        **{f"Correlation with the error, {name}": correlations(results, name) for name in MAPS},
        f"Correlation with the error, {MAPS[0]}, without the first layer": correlations(
            results, MAPS[0], first_layer=False
        ),
        f"Correlation with what is left, {MAPS[0]}": correlations(results, f"{MAPS[0]}, left"),
        "Intervention": intervention(results),
        "Slopes": slopes(results),
        "Matched": matched(results),
    }
    return "\n\n".join("\n".join([f"### {title}", "", *lines]) for title, lines in parts.items())


def main() -> None:
    """Measure and write, or print the tables."""
    parser = argparse.ArgumentParser(description="What makes a donor's heads hard for linear attention.")
    parser.add_argument("results", type=Path)
    parser.add_argument("outside", type=Path, nargs="*", metavar="DONOR TEXTS")
    parser.add_argument("--tables", action="store_true", help="print what was measured before")
    given = parser.parse_args()
    if len(given.outside) not in (0, 2):
        parser.error("expected a donor and a file of texts, or neither")
    if not given.tables:
        console = Console(stderr=True)
        outside = tuple(given.outside) if given.outside else None
        write(runs(cases(console, outside), console), given.results)
    print(tables(json.loads(given.results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
