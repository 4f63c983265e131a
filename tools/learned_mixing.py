"""Does a learned or computed mixing weight bring component collapse back? docs/research/03-learned-mixing.md.

    python tools/learned_mixing.py docs/results/learned-mixing.json
    python tools/learned_mixing.py docs/results/learned-mixing.json --tables

The first converts the demo's donor once for each arm and seed, audits it, and adds one row to the file; what
is there already is not run again. The second prints the page's tables.

Shapes: B texts, H heads, T tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from equipoise.audit.evaluate import DocumentScores, RunNote, audit_model
from equipoise.audit.report import RunAudit
from equipoise.config import RunConfig
from equipoise.data.packing import EvaluationWindow, evaluation_windows
from equipoise.data.sources import load_documents
from equipoise.demo_donor import CONTEXT, DonorSettings, cached_donor
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.models.branches import branches, observe
from equipoise.models.load import load_model, load_tokenizer
from equipoise.ops.types import Branches
from equipoise.train.convert import convert
from equipoise.train.recipes import load_recipe
from tables import heading, line, over_seeds, write

WINDOW, SEEDS = 64, (0, 1, 2)
TRANSFER_STEPS, FINETUNE_STEPS, BATCH_SIZE = 70, 50, 4
MAP_RATE = 3e-2
"""Learning rate of maps and gates, in both stages."""
WINDOWS_PER_DOCUMENT = 2
"""Contexts of each held-out file that are scored."""
GATE_WINDOWS = 12
"""Contexts on which the window's weight is taken."""
TRAININGS: dict[str, dict[str, Any]] = {
    "window's": {"objectives": {"hybrid-output": 1000.0}, "dropout": None},
    "both branches'": {
        "objectives": {"hybrid-output": 1000.0, "output": 1000.0},
        "dropout": {"probabilities": [0.5], "per": "sample", "reading": "renormalised"},
    },
}
"""Objectives of stage 1 and window dropout of stage 2."""

Floats = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to mix and to train.

    Attributes:
        training: of `TRAININGS`.
        overlap: whether linear attention covers the window's keys too.
        gate, mixing, gate_value: as in `HybridConfig`.
    """

    training: str
    overlap: bool
    gate: str
    mixing: str = "convex"
    gate_value: float = 0.5

    @property
    def name(self) -> str:
        """What the file calls it."""
        keys = "overlapping" if self.overlap else "disjoint"
        gate = self.gate if self.gate_value == 0.5 else f"{self.gate} {self.gate_value:g}"
        return ", ".join([f"{self.training} training", keys, self.mixing, gate])

    @property
    def label(self) -> str:
        """What tables call it: the same, shorter."""
        return self.name.replace(" training", "").replace(" convex,", "")

    @property
    def recipe(self) -> RunConfig:
        """Its recipe, at the demo's scale."""
        training = TRAININGS[self.training]
        return load_recipe(
            "lolcats",
            {
                "name": self.name,
                "hybrid": {
                    "window": WINDOW, "mixing": self.mixing, "gate": self.gate,
                    "gate_value": self.gate_value, "overlap": self.overlap, "feature_multiple": 2,
                },
                "transfer": {
                    "objectives": training["objectives"], "learning_rate": MAP_RATE,
                    "batch_size": BATCH_SIZE, "max_steps": TRANSFER_STEPS,
                },
                "finetune": {
                    "learning_rate": 5e-4, "train_maps": True, "map_learning_rate": MAP_RATE,
                    "window_dropout": training["dropout"], "batch_size": BATCH_SIZE,
                    "max_steps": FINETUNE_STEPS,
                },
                "data": {"source": "stdlib", "context_length": CONTEXT},
                "watch": None,
            },
        )  # fmt: skip


GATES = ("fixed", "per_head", "per_token")
CORE = (
    *(Arm("window's", False, gate) for gate in GATES),
    *(Arm(training, True, gate) for training in TRAININGS for gate in GATES),
)
FURTHER = (
    Arm("both branches'", True, "per_token", mixing="competing"),
    Arm("window's", True, "per_token", mixing="competing"),
    Arm("window's", True, "fixed", gate_value=0.9),
)
"""Run last: linear attention as a key of the window's softmax, and g as high as it is learned, but fixed."""


# ---- measuring


@torch.no_grad()
def window_weights(model: nn.Module, windows: Sequence[EvaluationWindow]) -> Tensor:
    """The window's share of every output, whatever the mixing rule [layers, H, tokens].

    Attention is linear in the values: with ones for values and the linear term zeroed, what is left is the
    window's weight. Tokens whose window holds all there is are left out.
    """
    decoder: Any = model
    found: dict[int, list[Tensor]] = {}
    alone = AttentionMode("hybrid", Branches(linear=False, reading="literal"))

    def note(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        ones, _ = mixer.attend(replace(inputs, v=torch.ones_like(inputs.v)), mode=alone)
        found.setdefault(mixer.layer_idx, []).append(ones[0, :, WINDOW:, 0])

    with branches(model, "both"), observe(model, note):
        for window in windows:
            decoder.get_decoder()(input_ids=window.input_ids[None], use_cache=False)
    return torch.stack([torch.cat(parts, 1) for _, parts in sorted(found.items())])


def row_of(arm: Arm, seed: int, audit: RunAudit, weights: Tensor) -> Row:
    """What the file keeps of a run; shares are of what attention is worth to the donor."""
    recovered = {name: value.value for name, value in audit.recovered.items()}
    shapley = audit.attribution["renormalised"]
    return {
        "arm": arm.name, "seed": seed, "nll": audit.states["both"].value, "hybrid": recovered["both"],
        "window_alone": recovered["window_renormalised"], "linear_alone": recovered["linear_renormalised"],
        "linear_untrained": recovered["linear_untrained"],
        "linear_adds": recovered["both"] - recovered["window_renormalised"],
        "linear_removed": recovered["both"] - recovered["window"],
        "linear_share": shapley.linear_share.value, "linear_share_ci95": list(shapley.linear_share.ci95),
        "weight": weights.mean().item(), "weight_by_head": weights.mean(2).tolist(),
        "weight_spread_of_tokens": weights.std(2).mean().item(),
        "closed": (weights > 0.9).double().mean().item(),
        "use": audit.verdict.use, "reason": audit.verdict.reason,
    }  # fmt: skip


def measure(path: Path, console: Console) -> None:
    """Run what the file lacks, every arm with one seed before the next seed."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    donor = cached_donor(DonorSettings(), console)
    windows = evaluation_windows(
        load_documents("stdlib", split="validation"), load_tokenizer(str(donor)), context_length=CONTEXT,
        max_windows_per_document=WINDOWS_PER_DOCUMENT,
    )  # fmt: skip
    full = [window for window in windows if len(window.input_ids) == CONTEXT][:GATE_WINDOWS]
    tokens = sum(len(window.input_ids) for window in windows)
    documents = len({window.document for window in windows})
    console.print(f"{documents} held-out files, {len(windows)} windows, {tokens} tokens")
    scores: DocumentScores | None = None
    for seed, arm in [(seed, arm) for arms in (CORE, FURTHER) for seed in SEEDS for arm in arms]:
        if (arm.name, seed) in done:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model"
            convert(str(donor), arm.recipe, place, seed=seed, console=Console(quiet=True))
            model = load_model(str(place))
            audit, _, scores = audit_model(model, windows, RunNote.read(place), donor=scores)
        row = row_of(arm, seed, audit, window_weights(model, full))
        rows.append(row | {"seconds": round(time.monotonic() - started, 1)})
        write(rows, path)
        words = {key: round(row[key], 3) for key in ("nll", "window_alone", "linear_alone", "weight")}
        console.print(f"seed {seed}, {arm.name}: {words}, {row['use']}", soft_wrap=True)


# ---- tables


COLUMNS = {
    "nll": "hybrid's NLL", "window_alone": "window alone", "linear_alone": "linear alone",
    "linear_share": "linear share", "linear_adds": "linear adds", "linear_removed": "linear removed",
    "weight": "window's weight",
}  # fmt: skip
PLAIN = ("nll", "weight")
"""Columns that are no percentages."""


class Results:
    """All rows, by arm."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {(row["arm"], row["seed"]): row for row in rows}

    def has(self, arm: Arm) -> bool:
        """Whether the arm was run with every seed."""
        return all((arm.name, seed) in self.rows for seed in SEEDS)

    def of(self, arm: Arm, quantity: str) -> Floats:
        """By seed."""
        return np.array([self.rows[arm.name, seed][quantity] for seed in SEEDS])

    def verdicts(self, arm: Arm) -> str:
        """Each with the number of its seeds."""
        uses = [self.rows[arm.name, seed]["use"] for seed in SEEDS]
        return ", ".join(f"{use} {uses.count(use)}/{len(SEEDS)}" for use in dict.fromkeys(uses))

    def cells(self, arm: Arm, less: Arm | None = None) -> list[str]:
        """Every column of an arm, or of its difference to another of the same seed."""
        found: list[str] = []
        for quantity in COLUMNS:
            values = self.of(arm, quantity) - (0 if less is None else self.of(less, quantity))
            digits = {"nll": 3, "weight": 2}.get(quantity, 1)
            found.append(over_seeds(values if quantity in PLAIN else 100 * values, digits))
        return found


def tables(path: Path) -> str:
    """Every arm as it is, then each less the fixed weight of 0.5, then the rest."""
    results = Results(json.loads(path.read_text(encoding="utf-8")))
    arms = [arm for arm in (*CORE, *FURTHER) if results.has(arm)]
    lines = heading("arm", *COLUMNS.values(), "use")
    lines += [line(arm.label, *results.cells(arm), results.verdicts(arm)) for arm in arms]
    lines += ["", *heading("less fixed 0.5", *COLUMNS.values())]
    for arm in arms:
        fixed = Arm(arm.training, arm.overlap, "fixed")
        if arm != fixed and results.has(fixed):
            lines.append(line(arm.label, *results.cells(arm, fixed)))
    lines += ["", *heading("arm", "weight's deviation over tokens", "tokens above 0.9")]
    for arm in arms:
        if arm.gate == "per_token":
            spread = over_seeds(results.of(arm, "weight_spread_of_tokens"), 2)
            lines.append(line(arm.label, spread, over_seeds(100 * results.of(arm, "closed"), 1)))
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--tables", action="store_true", help="print the page's tables, and run nothing")
    given = parser.parse_args()
    if given.tables:
        print(tables(given.output))
    else:
        measure(given.output, Console(stderr=True))


if __name__ == "__main__":
    main()
