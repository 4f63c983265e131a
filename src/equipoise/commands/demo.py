"""`equipoise demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.commands.failures import INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.output import progress, quieten, results


def demo_command(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="New directory, or that of an earlier demo.")
    ],
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N[,N…]", help="One conversion per recipe and seed.")
    ] = "0",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the audit as JSON, all else on stderr.")
    ] = False,
) -> None:
    """Train a small donor on Python's own sources, convert it by five recipes, and audit them.

    Needs no network and no GPU; takes some minutes. An earlier demo in the directory is replaced.

    \b
    equipoise demo --output out/demo
    """
    chosen = parse_seeds(seeds)
    quieten()
    from equipoise.demo import run_demo

    try:
        with told_when_full(output, "Free some space and run the demo again."):
            run_demo(output, seeds=chosen, console=progress() if as_json else results())
    except KeyboardInterrupt:
        raise VerbError(
            "interrupted. A donor that was trained is kept for the next demo.", INTERRUPTED
        ) from None
    if as_json:
        typer.echo((output / "audit.json").read_text(encoding="utf-8"), nl=False)


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0,1,2"`` -> ``(0, 1, 2)``.

    Raises:
        UsageError: not a list of different whole numbers from 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise UsageError(f"--seeds: expected different whole numbers, for instance 0,1,2, got {text!r}.")
    return tuple(int(part) for part in parts)
