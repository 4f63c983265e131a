"""The embedded default: train a small donor on the spot, convert it by five recipes, audit them side by side.

Needs no network and no data of its own: the text is the source code of Python's standard library. Everything
runs through the same functions as a person's own run; only the donor is made here.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from equipoise import __version__
from equipoise.audit.documents import text_fingerprint
from equipoise.audit.evaluate import STATES, DocumentScores, RunNote, audit_model
from equipoise.audit.report import AuditReport, Donor, Metric, RunAudit, console_table, write_audit
from equipoise.bars import counted
from equipoise.config import RunConfig
from equipoise.data.packing import EvaluationWindow, evaluation_windows
from equipoise.data.sources import load_documents
from equipoise.demo_donor import CONTEXT, DonorSettings, cached_donor
from equipoise.models.load import load_model, load_tokenizer
from equipoise.train.convert import convert
from equipoise.train.outputs import prepare_output
from equipoise.train.recipes import load_recipe

RECIPES = ("lolcats", "zero-shot", "hedgecats", "ssd", "swa-sinks")
BUDGET = 200
"""Optimiser steps each trained recipe gets, both stages together."""
TRANSFER_SHARE = 0.75
WINDOWS_PER_DOCUMENT = 4

OVERRIDES: dict[str, Any] = {
    "data": {"source": "stdlib", "context_length": CONTEXT},
    "hybrid": {"window": 64},
    "transfer": {"learning_rate": 3e-2, "batch_size": 8},
    "finetune": {"learning_rate": 5e-4, "batch_size": 8, "early_stopping": {"every": 10}},
}
"""What small scale asks for, the same for every recipe: no recipe is tuned on its own. Early stopping stays
with the recipes that have it."""


def run_demo(
    output: Path,
    *,
    seeds: Sequence[int] = (0,),
    console: Console | None = None,
    settings: DonorSettings | None = None,
    budget: int = BUDGET,
) -> AuditReport:
    """Run the whole demo into a new directory.

    Args:
        output: where donor, conversions and the report go; an earlier demo there is replaced.
        seeds: one conversion per recipe and seed (the donor stays the same).
        console: where progress and the table go.
        settings: of the donor.
        budget: optimiser steps per trained recipe.

    Raises:
        OutputError: the directory holds something that is not a demo's, or cannot be written.
    """
    console, settings = console or Console(), settings or DonorSettings()
    started = time.monotonic()
    _clear_earlier(output)
    prepare_output(output)
    (output / MARK).write_text(json.dumps({"equipoise_version": __version__}), encoding="utf-8")
    donor = output / "donor"
    shutil.copytree(cached_donor(settings, console), donor)
    console.print(
        "\nOverrides for small scale, the same for every recipe "
        f"(one without stage 2 takes all {budget} steps in stage 1):"
    )
    console.print_json(json.dumps(_overrides(budget, None)), indent=None)
    windows = _held_out(donor)
    runs: list[RunAudit] = []
    known: DocumentScores | None = None
    table = None
    for seed in seeds:
        for recipe in RECIPES:
            place = output / (recipe if len(seeds) == 1 else f"{recipe}-{seed}")
            convert(str(donor), demo_recipe(recipe, budget), place, seed=seed, console=console)
            audit, table, known = _audit(place, windows, known, console)
            runs.append(audit)
    assert table is not None
    report = AuditReport(
        donor=replace(
            Donor.of(table, name="Llama, 0.9M parameters, trained by this demo"), extra=asdict(settings)
        ),
        metric=Metric.of(
            table,
            context_length=CONTEXT,
            data="Python's standard library, held-out files",
            text_sha256=text_fingerprint(windows),
        ),
        runs=tuple(runs),
    )
    paths = write_audit(report, output)
    console.print(console_table(report))
    for run in runs:
        words = f"{run.verdict.use}, {run.verdict.benefit}. {run.verdict.advice}"
        console.print(f"[bold]{run.recipe}[/] (seed {run.seed}): {words}", highlight=False)
    console.print(f"\nReport: {paths['html']}  (data: {paths['json']})", soft_wrap=True)
    console.print(f"{time.monotonic() - started:.0f}s on {torch.get_num_threads()} threads", highlight=False)
    return report


MARK = "demo.json"


def _clear_earlier(output: Path) -> None:
    """Remove an earlier demo, unless there is anything else beside it: then `prepare_output` refuses both."""
    if not (output / MARK).is_file():
        return
    found = list(output.iterdir())
    if not all(_is_ours(path) for path in found):
        return
    for path in sorted(found, key=lambda path: path.name == MARK):  # the mark last: a killed clearing goes on
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_ours(path: Path) -> bool:
    """Whether the demo writes a file or folder of this name: donor, conversions (by seed, too), report."""
    if path.name in (MARK, *(f"audit.{suffix}" for suffix in ("json", "md", "html"))):
        return path.is_file()
    recipe, _, seed = path.name.rpartition("-")
    is_conversion = path.name in RECIPES or (recipe in RECIPES and seed.isdecimal())
    return path.is_dir() and (is_conversion or path.name == "donor")


def demo_recipe(name: str, budget: int = BUDGET) -> RunConfig:
    """A shipped recipe at the demo's scale: the common overrides, and the common budget of steps."""
    return load_recipe(name, _overrides(budget, load_recipe(name)))


def _overrides(budget: int, recipe: RunConfig | None) -> dict[str, Any]:
    """The overrides, limited to the stages a recipe has; all of them for None.

    A recipe without stage 2 gets the whole budget in stage 1, so that every recipe sees the same tokens.
    """
    transfer = round(budget * TRANSFER_SHARE)
    if recipe is not None and recipe.finetune is None:
        transfer = budget
    changed = {name: dict(values) for name, values in OVERRIDES.items()}
    changed["transfer"]["max_steps"] = transfer
    changed["finetune"]["max_steps"] = budget - round(budget * TRANSFER_SHARE)
    if recipe is not None and recipe.finetune is not None and recipe.finetune.early_stopping is None:
        del changed["finetune"]["early_stopping"]
    if recipe is not None:
        changed = {
            n: v for n, v in changed.items() if n not in ("transfer", "finetune") or getattr(recipe, n)
        }
    return changed


def _held_out(donor: Path) -> list[EvaluationWindow]:
    return evaluation_windows(
        load_documents("stdlib", split="validation"), load_tokenizer(str(donor)), context_length=CONTEXT,
        max_windows_per_document=WINDOWS_PER_DOCUMENT,
    )  # fmt: skip


def _audit(
    place: Path, windows: list[EvaluationWindow], donor: DocumentScores | None, console: Console
) -> tuple[RunAudit, Any, DocumentScores]:
    batch_size = 16
    batches = -(-len(windows) // batch_size) * (len(STATES) + 1)
    with counted(console) as bar:
        task = bar.add_task(f"{place.name} audit", total=batches)
        return audit_model(
            load_model(str(place)), windows, RunNote.read(place), batch_size=batch_size, donor=donor,
            tick=lambda: bar.advance(task),
        )  # fmt: skip
