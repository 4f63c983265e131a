"""Write docs/reference/command-line.md: the help of every verb. `make docs` does so, and the page is
not committed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from equipoise.cli import PROGRAM, app

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "command-line.md"


def page() -> str:
    """The page's Markdown."""
    root: Any = typer.main.get_command(app)
    parts = ["# Command line", "", f"`{PROGRAM} VERB --help` prints the same.", ""]
    for words, command in _commands(root, (PROGRAM,)):
        context = command.make_context(" ".join(words), [], resilient_parsing=True, terminal_width=100)
        heading = "Global options" if len(words) == 1 else " ".join(words[1:])
        parts += [f"## {heading}", "", "```text", command.get_help(context).strip(), "```", ""]
    return "\n".join(parts)


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _commands(inner, (*words, name))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    print(PAGE)
