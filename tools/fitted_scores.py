"""What means of the past are worth before anything trains, by where their scores start: docs/adr/0038.

    python tools/fitted_scores.py docs/results/fitted-scores.json            # run what the file lacks
    python tools/fitted_scores.py docs/results/fitted-scores.json --tables   # print the table

Windows and means of the recipe `equipoise` at 20 tokens a head, its large heads with their window alone:
nats per token of text, of the donors of tools/research_donors.py. A seed draws the rows that are fitted on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from equipoise import HybridConfig, hybridize
from equipoise.layers.interface import mixers_of
from equipoise.models.branches import mode_of
from equipoise.train.scores import ROWS, fit_scores
from frontier_ablations import ABLATIONS
from frontier_shapes import loaded, settings_of, shared_out
from frontier_texts import Setting, rows_of, scored
from tables import heading, line, measure_or_print, over_seeds, write

DONORS, SEEDS, TEXTS = ("source", "docstrings"), (0, 1, 2), 12
WAYS = ("windows alone", "start at gate_value", "fitted")


def hybrid(at: Setting) -> Any:
    """As a conversion has it before it trains, the large heads' linear branches off."""
    _, settings = settings_of("equipoise", at)
    found = shared_out(at, settings["hybrid"], ABLATIONS["equipoise"].get("allocation", {}), evenly=False)
    model = hybridize(loaded(at), HybridConfig(**found), check=False)
    for mixer in mixers_of(model):
        if not mixer.summarises:
            mixer.mode = mode_of("window", "renormalised")
    return model


def nll(model: Any, at: Setting) -> float:
    """Nats per token of text."""
    found = scored(model, at.draw("search"), TEXTS)["nll"]
    return sum(found) / len(found)


def measure(path: Path, console: Console) -> None:
    """Run what the file lacks."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for name in DONORS:
        at = Setting(name, 1024, 20)
        done = {row["seed"] for row in found if row["donor"] == at.digest}
        for seed in (seed for seed in SEEDS if seed not in done):
            model = hybrid(at)
            row: dict[str, Any] = {"name": name, "donor": at.digest, "seed": seed}
            row["start at gate_value"] = nll(model, at)
            errors = fit_scores(
                model, {"input_ids": torch.from_numpy(rows_of(at.draw("train", seed=5000 + seed), ROWS))}
            )
            row["off by"] = float(torch.cat(list(errors.values())).mean())
            row["fitted"] = nll(model, at)
            for mixer in mixers_of(model):
                mixer.mode = mode_of("window", "renormalised")
            row["windows alone"] = nll(model, at)
            found.append(row)
            write(found, path)
            console.print(row, highlight=False)


def tables(found: list[dict[str, Any]]) -> Iterator[str]:
    """One table."""
    yield from heading("donor", *WAYS, "share of the fitted means off by")
    for name in DONORS:
        rows = [row for row in found if row["name"] == name]
        if rows:
            values = [over_seeds(np.array([row[way] for row in rows])) for way in (*WAYS, "off by")]
            yield line(name, *values)


if __name__ == "__main__":
    measure_or_print(measure, tables)
