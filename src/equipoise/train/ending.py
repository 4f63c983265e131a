"""Runs that are ended from outside: SIGTERM keeps what was trained, and one run at a time has a directory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainerCallback

from equipoise.config import ConfigError

LOCK = ".equipoise.lock"
"""In an output directory while a run writes there."""
TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM came: the run ends with code 143, and no `except Exception` takes it for a failure."""

    def __init__(self, message: str) -> None:
        super().__init__(TERMINATED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class InUseError(ConfigError):
    """Another run writes to the output directory."""


class EndWhenAsked(TrainerCallback):
    """Ends a stage after the optimiser step under way and its checkpoint; elsewhere at once.

    A second SIGTERM does not wait either.
    """

    def __init__(self) -> None:
        self.asked = self.training = False

    def handle(self, *_: Any) -> None:
        """What the signal calls."""
        if self.asked or not self.training:
            raise Terminated("terminated.")
        self.asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False
        if self.asked:  # asked for after the last checkpoint was written: the stage is complete
            raise Terminated("terminated at the end of a stage.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            raise Terminated(f"terminated after step {state.global_step}, which was saved.")


@contextmanager
def ended_by_sigterm() -> Generator[EndWhenAsked]:
    """Listen to SIGTERM; the callback is for the stages. Outside the main thread nothing is listened to."""
    callback = EndWhenAsked()
    if threading.current_thread() is not threading.main_thread():
        yield callback
        return
    before = signal.signal(signal.SIGTERM, callback.handle)
    try:
        yield callback
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def only_run(output: Path) -> Generator[None]:
    """Hold a directory for one run; the lock goes with the process, however that ends.

    Raises:
        InUseError: another run holds it.
    """
    lock = FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InUseError(
            f"{output}: another run is writing there. Wait for it to end, or choose another --output."
        ) from None
    try:
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()
