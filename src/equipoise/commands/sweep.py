"""`equipoise sweep`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.commands.demo import parse_seeds
from equipoise.commands.failures import FAILED, INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.options import TrainingData
from equipoise.commands.output import progress, quieten, results, say, say_json
from equipoise.commands.recall_watch import recall_watchers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from equipoise.sweep import SweepDonor
    from equipoise.sweep_plan import Cell, SweepConfig

DEMO = "demo"


def sweep_command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE", help="A sweep that ships, or a YAML file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="New directory, or that of the same sweep.")
    ] = None,
    donor: Annotated[
        str, typer.Option("--donor", metavar="DONOR", help="Directory, Hub name, or the demo's donor.")
    ] = DEMO,
    data: TrainingData = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N[,N…]", help="One conversion per row and seed.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of all cells; repeatable."),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale", metavar="NAME", help="Settings under a name in the file; demo's for its donor."
        ),
    ] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Replace cells made with other settings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and run nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: the comparison, or what is listed.")
    ] = False,
) -> None:
    """Convert and audit every variant with every seed, then compare them. Alone: list the sweeps that ship.

    The same command goes on with a sweep that was stopped. A cell that fails is left out.

    \b
    equipoise sweep activation --output out/activation
    equipoise sweep objectives --donor ./donor --data corpus.jsonl --output out/objectives
    """
    if name is None:
        _list(as_json=as_json)
        return
    if output is None and not dry_run:
        raise UsageError("expected --output DIR for the sweep's results, got none.")
    quieten()
    from equipoise.sweep_plan import load_sweep, plan

    config = load_sweep(name)
    if scale is None and donor == DEMO and DEMO in config.scales:
        scale = DEMO
    chosen = None if seeds is None else parse_seeds(seeds)
    cells = plan(config, scale=scale, data=data, assignments=settings or [], seeds=chosen)
    if dry_run and as_json:
        say_json([{"row": c.row, "seed": c.seed, "settings": c.run.model_dump(mode="json")} for c in cells])
        return
    if dry_run:
        _show(config, cells)
        return
    assert output is not None
    _run(config, cells, donor, output, redo=redo, as_json=as_json)


def _run(
    config: SweepConfig, cells: Sequence[Cell], donor: str, output: Path, *, redo: bool, as_json: bool
) -> None:
    from equipoise.audit.compare_page import console_table, summary
    from equipoise.sweep import SweepDonor, run_sweep

    console = progress()
    try:
        with told_when_full(
            output, "Finished cells are kept. Free some space and give the same command again."
        ):
            found: SweepDonor = SweepDonor.of(donor, console)
            result = run_sweep(
                config, cells, found, output, redo=redo, console=console, watchers=recall_watchers
            )
    except KeyboardInterrupt:
        raise VerbError(
            "interrupted. The same command goes on where this one stopped.", INTERRUPTED
        ) from None
    if as_json:
        typer.echo(result.paths["json"].read_text(encoding="utf-8"), nl=False)
    else:
        results().print(console_table(result.comparison))
        say(results(), summary(result.comparison))
    say(console if as_json else results(), f"report: {result.paths['html']}\ndata:   {result.paths['json']}")
    if result.failures:
        listed = "\n".join(f"  {folder}: {why}" for folder, why in result.failures.items())
        raise VerbError(
            f"{len(result.failures)} of {len(cells)} cells failed and are not in the comparison:\n{listed}\n"
            "The same command tries them again.",
            FAILED,
        )


def _show(config: SweepConfig, cells: Sequence[Cell]) -> None:
    from equipoise.commands.recipes import stages_of

    rows = {cell.row: cell.run for cell in cells}
    seeds = sorted({cell.seed for cell in cells})
    say(results(), f"{config.name}: {config.summary}")
    told = f"{len(rows)} rows × {len(seeds)} seeds ({', '.join(map(str, seeds))}) = {len(cells)} cells"
    say(results(), told, style="bold")
    unsaid = {"name", "summary", "reference"}
    settings = {row: _flat(run.model_dump(mode="json", exclude=unsaid)) for row, run in rows.items()}
    keys = dict.fromkeys(key for flat in settings.values() for key in flat)
    varied = [
        key for key in keys if len({json.dumps(flat[key]) for flat in settings.values() if key in flat}) > 1
    ]
    for row, run in rows.items():
        own = [f"{key} {json.dumps(settings[row][key])}" for key in varied if key in settings[row]]
        stages = " + ".join(stages_of(run)) or "nothing trained"
        say(results(), f"  {row}: {'; '.join([stages, *own])}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; objectives stay together, and a stage that is not there is left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "objectives":
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None or key not in ("transfer", "finetune"):
            flat[f"{prefix}{key}"] = value
    return flat


def _list(*, as_json: bool) -> None:
    from equipoise.sweep_plan import load_sweep, plan, sweep_names

    if as_json:
        shipped = [load_sweep(name) for name in sweep_names()]
        say_json([{"name": c.name, "cells": len(plan(c)), "summary": c.summary} for c in shipped])
        return
    for shipped in sweep_names():
        config = load_sweep(shipped)
        say(results(), f"{shipped} ({len(plan(config))} cells): {config.summary}")
    say(
        results(),
        f"\n{shlex.join(['equipoise', 'sweep', 'NAME', '--output', 'DIR'])} runs one on the demo's donor.",
    )
