"""`equipoise export`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from equipoise.commands.failures import INTERRUPTED, VerbError, told_when_full
from equipoise.commands.options import ConvertedModel
from equipoise.commands.output import quieten, results, say, say_json


def export_command(
    model: ConvertedModel,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="New directory for the result.")],
    softmax: Annotated[
        bool, typer.Option("--softmax", help="The donor's architecture, which transformers runs alone.")
    ] = False,
    lora: Annotated[
        Literal["merge", "drop", "keep"] | None,
        typer.Option("--lora", help="What becomes of LoRA; default: merge, with --softmax drop."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Of the weights; auto: as they are stored, for a delta the donor's."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a converted model whole: LoRA merged, or the donor back.

    --softmax gives the donor's weights back bit by bit; with --lora merge those plus LoRA, which
    was trained for the hybrid.

    \b
    equipoise export out/ssd --output out/ssd-merged
    equipoise export out/ssd --softmax --output out/donor
    """
    quieten()
    import torch

    from equipoise.sharing.export import check, export
    from equipoise.train.outputs import claimed

    check(model, softmax=softmax, lora=lora or ("drop" if softmax else "merge"))
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    try:
        with told_when_full(output, "No half-written model was left there."), claimed(output):
            done = export(model, output, softmax=softmax, lora=lora, dtype=wanted)
    except KeyboardInterrupt:
        raise VerbError("interrupted; nothing was kept.", INTERRUPTED) from None
    if as_json:
        say_json({"output": str(output), **asdict(done)})
        return
    place, console = shlex.quote(str(output)), results()
    kind = "softmax model" if done.softmax else "hybrid"
    adapters = "" if done.lora == "none" else f", LoRA {done.lora}"
    say(
        console,
        f"{kind} ({done.model_type}, {done.parameters:,} parameters, {done.dtype}{adapters}) in {place}",
    )
    say(console, f"next: equipoise generate {place} 'Once upon a time'")
