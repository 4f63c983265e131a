"""Recall beyond reach in miniature: a donor that recalls, converted by several recipes, asked in every state.

Windows of 16 relay 60 tokens; the donor recalls pairs of key and value from anywhere in 512. The default
recipe measures where its bytes go, and gets those of windows of 32: less than half of what the others take.
Everything goes the way of a person's own run: the pairs reach the conversions as a JSONL file. No text and no
pair that is asked for was trained on.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Grid

from equipoise import __version__
from equipoise.audit.attribution import attribute
from equipoise.config import HybridConfig, RunConfig
from equipoise.evaluate.recall_examples import Example, build_examples
from equipoise.evaluate.recall_report import Described, reach_table, summary, write_recall
from equipoise.evaluate.recall_results import Group, RecallRun, beyond_all, grouped, score_table
from equipoise.evaluate.recall_running import CONTROL, Answers, run_state, sight
from equipoise.models.layout import equal_window
from equipoise.models.load import load_model
from equipoise.pages import Cell, Table, number
from equipoise.recall_donor import (
    CONTEXT,
    PAIRS,
    RecallDonorSettings,
    held_out,
    pair_text,
    recall_donor,
    write_documents,
)
from equipoise.statistics import bootstrap
from equipoise.train.convert import convert
from equipoise.train.outputs import prepare_output
from equipoise.train.recipes import load_recipe

RECIPES = ("lolcats", "zero-shot", "equipoise", "ssd")
REFERENCE = "swa-sinks"
BUDGET = 300
"""Optimiser steps each trained recipe gets, both stages together."""
TRANSFER_SHARE = 0.75
TEXTS = 48
"""Texts asked, with ten questions each."""
OWN_STATES = ("both", "window", "window_renormalised", "linear", "linear_renormalised", "none")
SHARED_STATES = ("softmax", CONTROL)
"""States in which nothing that was trained runs: one answer for all seeds."""
BATCH = 4
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "hybrid": {"window": 16, "feature_multiple": 2},
    "transfer": {"learning_rate": 3e-2, "batch_size": BATCH},
    "finetune": {"learning_rate": 5e-4, "batch_size": BATCH},
}
"""What small scale asks for: no recipe is tuned on its own. One that measures its windows takes the rates.

LoLCATs' own feature_multiple is 1; the others keep theirs. What else was tried is in LOG.md.
"""
BUDGET_WINDOW = 32
"""The window whose bytes, with its sinks, a recipe shares out that measures its windows itself."""
DOCUMENTS, MARK, TEXT_SEED = "pairs.jsonl", "recall-demo.json", 1


def run_recall_demo(
    output: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    console: Console | None = None,
    settings: RecallDonorSettings | None = None,
    budget: int = BUDGET,
    texts: int = TEXTS,
) -> list[Group]:
    """Run the whole demo into a new directory.

    Args:
        output: where training text, conversions and the report go; an earlier demo there is replaced.
        seeds: one conversion per recipe and seed (the donor stays the same).
        console: where progress and the table go.
        settings: of the donor.
        budget: optimiser steps per trained recipe.
        texts: asked, with ten questions each.

    Raises:
        OutputError: the directory holds something that is not this demo's, or cannot be written.
    """
    console, settings = console or Console(), settings or RecallDonorSettings()
    started = time.monotonic()
    _clear_earlier(output)
    prepare_output(output)
    (output / MARK).write_text(json.dumps({"equipoise_version": __version__}), encoding="utf-8")
    donor = output / "donor"
    shutil.copytree(recall_donor(settings, console), donor)
    write_documents(pair_text(donor, split="train", seed=TEXT_SEED), output / DOCUMENTS, _rows(budget))
    console.print("\nOverrides for small scale, the same for every recipe:")
    console.print_json(json.dumps(_overrides(output, budget, None)), indent=None)
    for name, own in _own_overrides(output, budget).items():
        console.print(f"but for {name}, which measures its windows and has its own maps:", highlight=False)
        console.print_json(json.dumps(own), indent=None)
    examples = questions(donor, texts)
    runs = _runs(donor, output, seeds, budget, examples, console)
    groups = grouped(runs, examples)
    described = Described(
        {"donor": asdict(settings), "budget": budget, "seeds": list(seeds), "texts": texts,
         "pairs": asdict(PAIRS), "overrides": _overrides(output, budget, None),
         "own_overrides": _own_overrides(output, budget)},
        "Python's standard library (held-out files)",
    )  # fmt: skip
    paths = write_recall(groups, described, output, extra=[attribution_table(groups)])
    _show(groups, console)
    console.print(f"\nReport: {paths['html']}  (data: {paths['json']})", soft_wrap=True)
    console.print(f"{time.monotonic() - started:.0f}s on {torch.get_num_threads()} threads", highlight=False)
    return groups


def questions(donor: Path, texts: int = TEXTS) -> list[Example]:
    """What is asked: held-out pairs in held-out files."""
    made = pair_text(donor, split="validation", seed=0)
    return build_examples(
        "mqar", length=CONTEXT, count=texts, seed=0, tokenizer=made.tokenizer, haystack=made.haystack,
        words=made.words, keys=made.keys, settings=PAIRS, accept=held_out,
    )  # fmt: skip


# ---- conversions


def recall_recipe(name: str, output: Path, budget: int = BUDGET) -> RunConfig:
    """A shipped recipe at this scale: the common overrides, and the common budget of steps."""
    return load_recipe(name, _overrides(output, budget, load_recipe(name)))


def _overrides(output: Path, budget: int, recipe: RunConfig | None) -> dict[str, Any]:
    """The overrides, limited to the stages a recipe has; all of them for None.

    A recipe without stage 2 gets the whole budget in stage 1, so that every recipe sees the same tokens. One
    that measures its windows itself has its own maps, and shares the budget between the stages as it does.
    """
    transfer = round(budget * TRANSFER_SHARE)
    changed: dict[str, Any] = {name: dict(values) for name, values in OVERRIDES.items()}
    if recipe is not None and recipe.allocation is not None:
        changed["hybrid"] = {"window": BUDGET_WINDOW}
        assert recipe.transfer is not None
        assert recipe.finetune is not None
        epochs = recipe.transfer.epochs, recipe.finetune.epochs
        transfer = max(1, round(budget * epochs[0] / sum(epochs)))
    changed["data"] = {"source": str(output.resolve() / DOCUMENTS), "context_length": CONTEXT}
    changed["finetune"]["max_steps"] = budget - transfer
    whole = recipe is not None and recipe.finetune is None
    changed["transfer"]["max_steps"] = budget if whole else transfer
    stages = ("transfer", "finetune") if recipe is not None else ()
    return {name: v for name, v in changed.items() if name not in stages or getattr(recipe, name) is not None}


def _own_overrides(output: Path, budget: int) -> dict[str, dict[str, Any]]:
    """What differs from the overrides of every recipe, of recipes that measure their windows."""
    common, found = _overrides(output, budget, None), dict[str, dict[str, Any]]()
    for name in RECIPES:
        recipe = load_recipe(name)
        if recipe.allocation is not None:
            own = _overrides(output, budget, recipe)
            found[name] = {part: values for part, values in own.items() if values != common[part]}
    return found


def _rows(budget: int) -> int:
    """Texts for every step, the held-out ones (about 5%) and a margin."""
    return max(80, round(budget * BATCH * 1.15))


def _runs(
    donor: Path,
    output: Path,
    seeds: Sequence[int],
    budget: int,
    examples: Sequence[Example],
    console: Console,
) -> list[RecallRun]:
    """Convert and ask every recipe with every seed; last, window and sinks at the bytes of `ssd`."""
    known: dict[tuple[str, int | None], Answers] = {}
    runs: list[RecallRun] = []
    window = OVERRIDES["hybrid"]["window"]
    for recipe in RECIPES:
        config = recall_recipe(recipe, output, budget)
        for seed in seeds:
            place = output / f"{recipe}-{seed}"
            convert(str(donor), config, place, seed=seed, console=console)
            config = _as_measured(config, place)
            run, window = _ask(place, recipe, seed, (*OWN_STATES, *SHARED_STATES), examples, known)
            runs.append(run)
            share = run.answers["both"].right.mean()
            console.print(f"{recipe} (seed {seed}): {share:.1%} of answers right", highlight=False)
    config = recall_recipe(REFERENCE, output, budget)
    assert config.hybrid is not None
    wider = config.model_copy(update={"hybrid": config.hybrid.model_copy(update={"window": window})})
    convert(str(donor), wider, output / REFERENCE, console=console)
    runs.append(_ask(output / REFERENCE, REFERENCE, 0, ("both", "softmax"), examples, known)[0])
    return runs


def _as_measured(run: RunConfig, place: Path) -> RunConfig:
    """The recipe with the windows that a seed has measured, for the others: they see equally far then."""
    if run.allocation is None:
        return run
    described = json.loads((place / "config.json").read_text(encoding="utf-8"))["equipoise"]
    return run.model_copy(update={"allocation": None, "hybrid": HybridConfig(**described["hybrid"])})


def _ask(
    place: Path,
    name: str,
    seed: int,
    states: Sequence[str],
    examples: Sequence[Example],
    known: dict[tuple[str, int | None], Answers],
) -> tuple[RecallRun, int]:
    """A conversion's answers, and the window that takes its bytes."""
    model = load_model(str(place))
    sights = {state: sight(model, state) for state in states}
    answers: dict[str, Answers] = {}
    for state in states:
        key = (state, sights[state].window)
        if state not in SHARED_STATES or key not in known:
            known[key] = run_state(model, examples, state, batch_size=16)
        answers[state] = known[key]
    window = equal_window(model)
    del model
    gc.collect()
    return RecallRun(name, seed, answers, sights), window


# ---- results


def attribution_table(groups: Sequence[Group]) -> Table:
    """Which branch answers beyond every reach: Shapley values of recall there, and what they average."""
    rows: list[list[Cell | str]] = []
    for group in groups:
        keep = beyond_all(group)
        if "none" not in group.states or not keep.any():
            continue
        right = {s: np.mean([run.answers[s].right for run in group.runs], axis=0) for s in group.states}
        draws = bootstrap(score_table(group.examples, right, keep))
        for reading in ("literal", "renormalised"):
            found = attribute(draws, reading)
            shown = (found.window, found.linear, found.linear_given_window, found.linear_alone)
            cells = [Cell(number(value, digits=2, signed=True), value.value) for value in shown]
            rows.append([group.name, reading, *cells])
    return Table(
        "Which branch answers beyond every reach",
        ("model", "reading", "window", "linear", "linear, given the window", "linear, on its own"),
        rows,
        note=(
            "Window and linear: Shapley values of the share of right answers; they add up to both minus no "
            "attention. The last two columns are what the linear branch's averages."
        ),
    )


def _show(groups: Sequence[Group], console: Console) -> None:
    for found in (reach_table(groups), attribution_table(groups)):
        grid = Grid(title=found.title, title_justify="left")
        for column in found.columns:
            grid.add_column(column)
        for row in found.cells:
            grid.add_row(*(cell.text for cell in row))
        console.print(grid)
    for group in groups:
        console.print(summary(group).replace("`", ""), highlight=False)


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
    """Whether this demo writes a file or folder of this name."""
    if path.name in (MARK, DOCUMENTS, *(f"recall.{suffix}" for suffix in ("json", "md", "html"))):
        return path.is_file()
    recipe, _, seed = path.name.rpartition("-")
    is_conversion = path.name == REFERENCE or (recipe in RECIPES and seed.isdecimal())
    return path.is_dir() and (is_conversion or path.name == "donor")
