"""What can go wrong in an evaluation."""

from __future__ import annotations


class HarnessError(RuntimeError):
    """Tasks that cannot be run, or scored; the message says which and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, in short."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
