"""`equipoise allocate`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.commands.options import (
    DEFAULT_RECIPE,
    Recipe,
    Settings,
    StateBytes,
    TrainingData,
    TrustRemoteCode,
)
from equipoise.commands.output import progress, quieten, results, say, say_json

NOTE = "# Measured on {donor}; `equipoise convert {donor} --recipe FILE` takes it."


def allocate_command(
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="Model directory, or a name on the Hub.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write a recipe with the result there.")
    ] = None,
    recipe: Recipe = DEFAULT_RECIPE,
    state_bytes: StateBytes = None,
    data: TrainingData = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print measurements and result as JSON.")] = False,
) -> None:
    """Measure which heads look far and what each window is worth, and share bytes out by it.

    `equipoise convert` does this by itself where the recipe has an allocation. Alone it is for looking at a
    donor before converting it, and for conversions that shard the donor.

    \b
    equipoise allocate ./donor --data corpus.jsonl --state-bytes 4000000
    equipoise allocate ./donor --state-bytes 4000000 --output mine.yaml
    """
    quieten()
    from equipoise.commands.convert import resolve
    from equipoise.config import ConfigError, merge
    from equipoise.train.allocating import allocated, as_dict

    run = resolve(recipe, data=data, assignments=settings or [], max_steps=None, state_bytes=state_bytes)
    if run.allocation is None:
        raise ConfigError(
            f"{run.name} has no allocation: give --state-bytes, or take the recipe {DEFAULT_RECIPE}."
        )
    if output is not None and output.exists():
        raise ConfigError(f"{output} exists already: name a new file.")
    from equipoise.data.preparing import prepare_data
    from equipoise.files import write_text
    from equipoise.models.load import load_donor, load_tokenizer
    from equipoise.train.convert import rows_at_once

    model = load_donor(donor, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(donor, trust_remote_code=trust_remote_code)
    rows: Any = prepare_data(run, model, tokenizer, seed=0).rows
    console = progress() if as_json else results()
    with tempfile.TemporaryDirectory() as work:
        found = allocated(model, run, rows, Path(work), batch_size=rows_at_once(run), console=console)
    if output is not None:
        from equipoise.commands.recipes import to_yaml

        fixed = run.model_copy(update={"hybrid": found.hybrid, "allocation": None, "name": output.stem})
        write_text(output, f"{NOTE.format(donor=donor)}\n{to_yaml(fixed)}")
        say(progress(), f"recipe written to {output}")
    if as_json:
        say_json(merge({"donor": donor}, as_dict(found)))
