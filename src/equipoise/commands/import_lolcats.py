"""`equipoise import-lolcats`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from equipoise.commands.failures import INTERRUPTED, VerbError, told_when_full
from equipoise.commands.output import progress, quieten, results, say, say_json

if TYPE_CHECKING:
    from equipoise.models.lolcats import LolcatsImport
    from equipoise.train.convert import RunRecord

RECIPE = "lolcats-import"
"""The recipe that the output's run.json names."""


def import_lolcats_command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Feature maps and LoRA: .pt or .safetensors.")
    ],
    donor: Annotated[
        str, typer.Option("--donor", metavar="DIR", help="The model LoLCATs started from; or a Hub name.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="New directory for the result.")],
    window: Annotated[
        int, typer.Option("--window", metavar="W", min=1, help="Tokens of a window, or of a terrace's block.")
    ] = 64,
    layout: Annotated[
        Literal["terraced", "sliding"],
        typer.Option("--layout", help="LoLCATs' window_tk is terraced, window_sw sliding."),
    ] = "terraced",
    feature_map: Annotated[
        str, typer.Option("--feature-map", metavar="NAME", help="hedgehog is LoLCATs' softmax_dim.")
    ] = "hedgehog",
    affine: Annotated[
        bool, typer.Option("--affine/--no-affine", help="Whether affine_attention_factors was on.")
    ] = False,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", metavar="A", help="Of the LoRA; default twice its rank.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Leave layers that are not in the files as they are.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the import as JSON.")] = False,
) -> None:
    """Make a hybrid of a donor and the files of a LoLCATs checkpoint.

    Files are read as tensors only, no code in them runs. What they cannot say (window, layout,
    feature map, LoRA alpha) comes from the options, never from their names, and is recorded.

    \b
    equipoise import-lolcats distill.pt finetune.pt --donor ./Llama-3.1-8B --output out/lolcats-8b
    """
    quieten()
    from equipoise.models.load import load_tokenizer
    from equipoise.models.lolcats import LolcatsOptions, import_lolcats
    from equipoise.train.convert import save
    from equipoise.train.outputs import claimed

    options = LolcatsOptions(
        window=window, layout=layout, feature_map=feature_map, affine=affine, lora_alpha=lora_alpha,
        allow_partial=allow_partial,
    )  # fmt: skip
    try:
        with told_when_full(output, "No half-written model was left there."), claimed(output):
            tokenizer = load_tokenizer(donor)
            model, imported = import_lolcats(files, donor, options)
            record = record_of(imported, donor)
            save(model, tokenizer, record, output, donor=donor)
    except KeyboardInterrupt:
        raise VerbError("interrupted; nothing was kept.", INTERRUPTED) from None
    if as_json:
        say_json({"output": str(output), **asdict(record)})
    else:
        _summarise(imported, output)


def record_of(imported: LolcatsImport, donor: str) -> RunRecord:
    """The import as a run that trained nothing: an audit reads it like any other."""
    from equipoise.config import RunConfig
    from equipoise.train.convert import RunRecord

    run = RunConfig(
        name=RECIPE,
        summary="Imported from a LoLCATs checkpoint; its training is not recorded in it.",
        reference="LoLCATs, arXiv 2410.10254",
        hybrid=imported.hybrid,
    )
    described: dict[str, Any] = asdict(imported)
    del described["hybrid"]  # stands in the settings
    return RunRecord(
        recipe=RECIPE, settings=run.model_dump(mode="json"), donor=donor, seed=0, train_tokens=0,
        train_seconds=0.0, stages={"import": described}, held_out={},
    )  # fmt: skip


def _summarise(imported: LolcatsImport, output: Path) -> None:
    console, hybrid = results(), imported.hybrid
    count = len(imported.layers) + len(imported.softmax_layers)
    kept = f", {len(imported.softmax_layers)} left softmax" if imported.softmax_layers else ""
    say(
        console,
        f"layers: {len(imported.layers)} of {count} converted{kept}; H {imported.heads}, "
        f"D {imported.head_dim}, F {imported.columns} ({hybrid.feature_multiple * imported.head_dim} "
        "features)",
    )
    low, mean, high = imported.gamma
    say(console, f"gamma: {low:.3f} to {high:.3f}, mean {mean:.3f}")
    if imported.lora is None:
        say(console, "LoRA: none in the files")
    else:
        assumed = " (assumed, twice the rank)" if imported.lora["alpha_assumed"] else ""
        targets = ", ".join(imported.lora["targets"])
        say(
            console,
            f"LoRA: rank {imported.lora['rank']}, alpha {imported.lora['alpha']:g}{assumed}, on {targets}",
        )
    mixing = "linear weights times 1 - gamma" if hybrid.mixing == "shared-affine" else "not affine"
    say(console, f"not in the files: window {hybrid.window}, {hybrid.layout}, {hybrid.feature_map}, {mixing}")
    if imported.replaced:
        note = f"note: {imported.replaced} tensors of earlier files were replaced by those of later ones"
        say(progress(), note, style="yellow")
    place, beside = (shlex.quote(str(path)) for path in (output, output.with_name(output.name + "-audit")))
    say(console, f"{RECIPE}: hybrid in {place}\nnext: equipoise audit {place} --output {beside}")
