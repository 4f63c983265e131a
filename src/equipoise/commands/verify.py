"""`equipoise verify`: files against the manifest they were written with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.commands.failures import FAILED, VerbError
from equipoise.commands.output import results, say


def verify_command(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIRECTORY…", help="What `convert` saved, or a training checkpoint."),
    ],
) -> None:
    """Hold the files of a directory to its manifest.json: their sizes and SHA-256.

    A manifest tells damage and copies that are not whole, not who wrote the files: it lies beside them. Files
    that it does not list are passed over. The exit code is 1 where anything differs.

    \b
    equipoise verify out/ssd
    """
    from equipoise.files import MANIFEST, damage, read_manifest

    wrong: list[str] = []
    for directory in directories:
        if not (directory / MANIFEST).is_file():
            wrong.append(
                f"{directory}: expected a directory with a {MANIFEST}, as `convert` writes; found none."
            )
            continue
        fault = damage(directory)
        if fault is not None:
            wrong.append(f"{directory}: {fault}.")
            continue
        listed = read_manifest(directory)
        size = sum(int(entry["bytes"]) for entry in listed.values())
        say(results(), f"{directory}: {len(listed)} files, {size:,} bytes, as they were written")
    if wrong:
        raise VerbError("\n".join(wrong), FAILED)
