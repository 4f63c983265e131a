"""From an exception to an exit code and a sentence."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from typer.exceptions import TyperException

from equipoise.config import ConfigError
from equipoise.registry import UnknownNameError

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit codes: the work failed; the command was wrong; stopped from the keyboard."""

_FULL = ("No space left on device", "os error 28", "PytorchStreamWriter", "inline_container.cc")
"""How Rust (safetensors) and torch.save word a full disk; neither raises an OSError with its number."""


_NUMBER = re.compile(r"os error (\d+)")
"""How Rust words all other errors of the system."""


class VerbError(Exception):
    """A failure that a verb words itself."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class UsageError(ConfigError):
    """Options that do not go together."""


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of a failure."""
    text = str(error).strip()
    if isinstance(error, VerbError):
        return error.code, text
    if isinstance(error, TyperException):  # typer's own: a wrong option, a missing argument
        return error.exit_code, error.format_message().replace("Value error, ", "")
    # by name: models need torch; ParityError, of the same family, is work that failed
    if isinstance(error, (ConfigError, UnknownNameError)) or type(error).__name__ == "ConversionError":
        return USAGE, text
    if type(error).__module__.startswith("equipoise."):
        return FAILED, text
    if disk_full(error):
        return FAILED, f"the disk is full{_where(error)}: free some space and try again."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FAILED, (
            f"out of memory ({_first_line(text) or type(error).__name__}). Lower the batch size (audit's "
            "--batch-size, convert's micro_batch_size) or the context length."
        )
    if isinstance(error, OSError):
        return FAILED, f"{error.strerror or _first_line(text)}{_where(error)}."
    number = _NUMBER.search(text)
    if number is not None:
        return (
            FAILED,
            f"{os.strerror(int(number[1]))}: a file could not be read or written ({_first_line(text)}).",
        )
    return FAILED, (
        f"{type(error).__name__}: {_first_line(text)}. This was not foreseen; with --debug it shows where "
        "it comes from."
    )


def disk_full(error: BaseException) -> bool:
    """Whether a failure comes, at whatever depth, from a disk or quota without room."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(cause) for words in _FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextmanager
def told_when_full(output: Path, kept: str) -> Generator[None]:
    """Word a full disk as one: which path, and what is left there."""
    try:
        yield
    except Exception as error:
        if not disk_full(error):
            raise
        raise VerbError(f"the disk is full: cannot write to {output}. {kept}", FAILED) from error


def _where(error: Exception) -> str:
    name = getattr(error, "filename", None)
    return f": {name}" if name else ""


def _first_line(text: str) -> str:
    return text.splitlines()[0].rstrip(".") if text else ""
