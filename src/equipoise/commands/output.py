"""Where verbs write: results on stdout, everything else on stderr, nothing of the libraries' own."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from contextvars import ContextVar

import typer
from rich.console import Console
from rich.text import Text

from equipoise.distributed import launched
from equipoise.secrets import without_secrets

PIPED_WIDTH = 100
"""Columns of a table that goes to a file or a pipe."""


def results() -> Console:
    """What the verb was asked for; on stdout."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(file=sys.stdout, highlight=False, width=wide, quiet=not launched().is_leader)


def progress() -> Console:
    """What happens meanwhile; on stderr."""
    return _stderr(quiet=not launched().is_leader)


def _stderr(*, quiet: bool) -> Console:
    wide = None if sys.stderr.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(file=sys.stderr, highlight=False, width=wide, quiet=quiet)


def say(console: Console, message: str, *, style: str = "") -> None:
    """Print text as it is: no markup read into it, and only the terminal breaks its lines."""
    console.print(Text(message, style=style), soft_wrap=True)


def say_json(value: object) -> None:
    """A result as JSON on stdout, the whole of what stands there; figures that are no numbers are null."""
    from equipoise.pages.writing import finite

    if launched().is_leader:
        typer.echo(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def say_error(message: str) -> None:
    """One `error: …` on stderr, red where that can be seen, without passwords and tokens."""
    message = without_secrets(message)
    console = _stderr(quiet=False)  # whichever of several processes failed
    console.print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)


_debugging: ContextVar[bool] = ContextVar("debugging", default=False)


def set_debugging(wanted: bool) -> None:
    """Note what --debug said, for the verb that follows."""
    _debugging.set(wanted)


def debugging() -> bool:
    """Whether --debug was given."""
    return _debugging.get()


def quieten() -> None:
    """Load the libraries, and stop their own progress bars, notices and warnings unless debugging."""
    if not debugging():
        warnings.simplefilter("ignore")
    # Before anything that imports peft: loaded first, peft would be asked for by our Auto classes half-way.
    importlib.import_module("equipoise.models.load")
    if debugging():
        return
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
