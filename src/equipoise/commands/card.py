"""`equipoise card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.commands.failures import UsageError, told_when_full
from equipoise.commands.output import progress, quieten, results, say, say_json


def card_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Converted model's directory, or Hub name.")],
    audit: Annotated[
        Path | None, typer.Option("--audit", metavar="DIR", help="Of `equipoise audit`, or its audit.json.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Default: README.md beside the model.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="OWNER/NAME", help="Where the model will be on the Hub.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Of the donor; default: as its card says.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the card rests on as JSON.")] = False,
) -> None:
    """Write the model card, from the run's record and its audit. Says what was not measured.

    \b
    equipoise card out/ssd --audit out/ssd-audit --repo you/llama-ssd
    """
    local = Path(model).is_dir()
    if output is None and not local:
        raise UsageError(f"{model}: expected a local directory, or --output FILE for a Hub model's card.")
    quieten()
    from equipoise.files import write_text
    from equipoise.models.card import CARD
    from equipoise.sharing.card import gather, write_card

    target = output or Path(model) / CARD
    if target.exists() and not force:
        raise UsageError(f"{target}: exists already. Replace it with --force, or give another --output.")
    sources = gather(model, audit, licence=licence)
    place = repo or (f"path/to/{Path(model).resolve().name}" if local else model)
    content = str(write_card(sources, place))
    with told_when_full(target, "No card was written."):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, content)
    if as_json:
        say_json({
            "card": str(target), "audited": sources.run is not None, "recorded": sources.note is not None,
            "licence": sources.licence, "verdict": None if sources.run is None else sources.run["verdict"],
        })  # fmt: skip
        return
    say(results(), f"card: {target}")
    if sources.run is None:
        say(progress(), "note: without --audit it says that nothing was measured", style="yellow")
    if sources.licence is None:
        say(progress(), f"note: no licence named ({sources.licence_from}); give --license", style="yellow")
