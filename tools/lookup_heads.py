"""Which heads look things up: by what full attention restores everywhere, or where windows lose much.

    python tools/lookup_heads.py docs/results/lookup-heads.json            # run what the file lacks
    python tools/lookup_heads.py docs/results/lookup-heads.json --tables   # print the tables

For docs/adr/0040. Donors of tools/research_donors.py, even windows. States (heads that share keys) in the
order of either importance; then the donor with full attention in the first few of them and windows in all
other heads: what it recalls beyond the windows' reach is what states in those heads can have, untrained.
A seed draws the rows that importance is measured on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from equipoise import hybridize, reach
from equipoise.layers.interface import mixers_of
from equipoise.models.allocation.measuring import DonorDivergence, windowed_mode
from frontier_report import recall
from frontier_shapes import SINKS, even, loaded
from frontier_texts import Setting, rows_of, scored
from tables import heading, line, measure_or_print, over_seeds, write

PLACES = (("source", 2048, 68), ("docstrings", 2048, 68))
SEEDS, ROWS, STEPS, STATES = (0, 1, 2), 8, 2, 4
WAYS = {"everywhere": False, "where windows lose much": True}


def by_state(importance: torch.Tensor, at: Setting) -> NDArray[np.float64]:
    """[L, H, 1] of query heads as [L, N] of those that share keys."""
    return importance.squeeze(-1).unflatten(1, (at.kv_heads, -1)).sum(2).numpy()


def ordered(values: NDArray[np.float64]) -> list[tuple[int, int]]:
    """(layer, key/value head), the most important first."""
    return [divmod(int(place), values.shape[1]) for place in np.argsort(-values, axis=None)]


def restored(model: Any, at: Setting, states: list[tuple[int, int]]) -> dict[str, Any]:
    """Recall and likelihood with full attention in some states' heads, even windows in the others."""
    shared = at.heads // at.kv_heads
    for layer, mixer in enumerate(mixers_of(model)):
        kept = [unit * shared + i for of, unit in states if of == layer for i in range(shared)]
        mixer.mode = windowed_mode(mixer, at.tokens - SINKS, SINKS, kept, 1.0, model.device)
    return scored(model, at.draw("search"), at.texts)


def measured(name: str, length: int, tokens: int, seed: int) -> dict[str, Any]:
    """One row of the results."""
    at = Setting(name, length, tokens)
    model: Any = hybridize(loaded(at), even(tokens), check=False)
    beyond = (reach(model) or 0, length)
    rows = {"input_ids": torch.from_numpy(rows_of(at.draw("train", seed=5000 + seed), ROWS))}
    measure = DonorDivergence(model, rows, batch_size=2 * at.rows)
    row: dict[str, Any] = {
        "name": name, "donor": at.digest, "length": length, "tokens": tokens, "seed": seed,
    }  # fmt: skip
    for way, weigh in WAYS.items():
        found = measure.worth([tokens - SINKS], sinks=SINKS, steps=STEPS, weigh_lookups=weigh)
        values = by_state(found, at)
        order = ordered(values)[:STATES]
        kept = [restored(model, at, order[:count]) for count in range(1, STATES + 1)]
        row[way] = {
            "states": [f"{layer}.{head}" for layer, head in order],
            "share": [float(values[place] / values.max()) for place in order],
            "recall": [recall([{"both": own}], "both", beyond)[0] for own in kept],
            "nll": [float(np.mean(own["nll"])) for own in kept],
        }
    return row


def measure(path: Path, console: Console) -> None:
    """Run what the file lacks."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for place in PLACES:
        digest = Setting(*place).digest
        done = {
            row["seed"]
            for row in found
            if (row["donor"], row["length"], row["tokens"]) == (digest, *place[1:])
        }
        for seed in (seed for seed in SEEDS if seed not in done):
            found.append(measured(*place, seed))
            write(found, path)
            console.print(found[-1], highlight=False)


def tables(found: list[dict[str, Any]]) -> Iterator[str]:
    """One table: the first states of the first draw, and what they are worth over all draws."""
    titles = [f"beyond, full attention in {count}" for count in range(1, STATES + 1)]
    yield from heading("donor", "length", "tokens", "importance", "states (share of the first)", *titles)
    kinds = {(row["name"], row["donor"], row["length"], row["tokens"]): None for row in found}
    for name, donor, length, tokens in kinds:
        same = (name, donor, length, tokens)
        rows = [row for row in found if (row["name"], row["donor"], row["length"], row["tokens"]) == same]
        for way in WAYS if rows else ():
            first = rows[0][way]
            states = ", ".join(
                f"{state} ({share:.2f})" for state, share in zip(first["states"], first["share"], strict=True)
            )
            recalls = np.array([row[way]["recall"] for row in rows])
            shown = map(over_seeds, recalls.T) if len(rows) > 2 else (f"{of.mean():.3f}" for of in recalls.T)
            yield line(f"{name} ({donor})", str(length), str(tokens), way, states, *shown)


if __name__ == "__main__":
    measure_or_print(measure, tables)
