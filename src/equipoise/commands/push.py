"""`equipoise push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from equipoise.commands.failures import INTERRUPTED, VerbError
from equipoise.commands.output import progress, quieten, results, say, say_json


def push_command(
    model: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Of a converted model.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository; made if it is not there.")],
    audit: Annotated[
        Path | None, typer.Option("--audit", metavar="DIR", help="Write the card from this audit.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Of the donor; default: as its card says.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: the Hub's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded and ask the Hub nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was uploaded as JSON.")] = False,
) -> None:
    """Upload a converted model, full or a delta, to the Hub with its card.

    The card is the directory's README.md (`equipoise card`), or written now. Log in first: `hf auth login`.

    \b
    equipoise push out/ssd you/llama-ssd --audit out/ssd-audit --private
    """
    quieten()
    from equipoise.pages.format import bytes_in_words
    from equipoise.sharing.push import push_directory

    console = progress()
    try:
        done = push_directory(
            model, repo, audit=audit, licence=licence, private=private, dry_run=dry_run,
            say=lambda words: say(console, words),
        )  # fmt: skip
    except KeyboardInterrupt:
        raise VerbError("interrupted: all files arrived, or none.", INTERRUPTED) from None
    if as_json:
        say_json(asdict(done))
        return
    for name, size in done.files.items():
        say(results(), f"{name:<32} {bytes_in_words(size)}")
    card = {
        "directory": "card: the directory's README.md",
        "written": "card: written now" + ("" if audit else ", without an audit"),
        "kept": "card: the repository's own stays",
    }[done.card]
    say(results(), f"{card}; {done.checkpoint} checkpoint")
    say(results(), f"nothing was uploaded to {done.repo}" if done.url is None else done.url)
