"""What can go wrong in an evaluation."""

from __future__ import annotations

from equipoise.secrets import without_secrets


class HarnessError(RuntimeError):
    """Tasks that cannot be run, or scored; the message says which and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, in short; reports carry it on, so without passwords and tokens."""
    return without_secrets(str(error)).strip().partition("\n")[0].rstrip(".") or type(error).__name__
