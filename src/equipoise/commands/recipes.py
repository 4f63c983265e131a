"""`equipoise recipes`."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any

import typer
import yaml

from equipoise.commands.output import results
from equipoise.config import RunConfig, Settings


def recipes_command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE", help="Show this one with all of its settings.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="With a recipe: say above each setting what it means.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes, or print one with everything it inherits, as YAML that --recipe takes.

    \b
    equipoise recipes
    equipoise recipes ssd --explain > mine.yaml
    """
    from equipoise.train.recipes import load_recipe, recipe_names

    if name is None:
        shipped = [load_recipe(recipe) for recipe in recipe_names()]
        if as_json:
            _print_json([_summary(run) for run in shipped])
        else:
            _print_table(shipped)
        return
    run = load_recipe(name)
    if as_json:
        _print_json(run.model_dump(mode="json"))
    else:
        typer.echo(to_yaml(run, explain=explain), nl=False)


def stages_of(run: RunConfig) -> list[str]:
    """What a recipe does, in order."""
    present = (("transfer", run.transfer), ("finetune", run.finetune))
    return [stage for stage, settings in present if settings is not None]


def to_yaml(settings: Settings, *, explain: bool = False, depth: int = 0) -> str:
    """Settings as YAML, nested ones indented; with ``explain`` each under its description."""
    plain = settings.model_dump(mode="json")
    indent, lines = "  " * depth, list[str]()
    for name, field in type(settings).model_fields.items():
        if explain and field.description:
            comment = textwrap.wrap(" ".join(field.description.split()), 96 - len(indent))
            lines += [f"{indent}# {part}" for part in comment]
        value = getattr(settings, name)
        if isinstance(value, Settings):
            lines += [f"{indent}{name}:", to_yaml(value, explain=explain, depth=depth + 1).rstrip("\n")]
        else:
            listed = yaml.safe_dump([plain[name]], default_flow_style=True, allow_unicode=True, width=10_000)
            lines.append(f"{indent}{name}: {listed.strip()[1:-1]}")
    return "\n".join(lines) + "\n"


def _summary(run: RunConfig) -> dict[str, Any]:
    return {"name": run.name, "summary": run.summary, "reference": run.reference, "stages": stages_of(run)}


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(shipped: list[RunConfig]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 1, 0), header_style="bold", pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("stages", no_wrap=True)
    table.add_column("what it does")
    for run in shipped:
        stages = Text("\n".join(stages_of(run)) or "nothing trained")
        about = Text(run.summary)
        if run.reference:
            about.append(f"\n{run.reference}", style="dim")
        table.add_row(Text(run.name, style="cyan"), stages, about)
    results().print(table)
    typer.echo("equipoise recipes NAME shows all of a recipe's settings.")
