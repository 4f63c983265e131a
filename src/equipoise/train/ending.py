"""Runs that are ended from outside: SIGTERM keeps what was trained, and one run at a time has a directory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from transformers import TrainerCallback

from equipoise.config import ConfigError
from equipoise.distributed import any_rank, meet, ranks

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

    In one process a second SIGTERM does not wait either. Several ranks end after the same step: they agree on
    it where they average their gradients (`RankTrainer.meet_gradients`), so that a signal to one of them is
    enough.

    Attributes:
        asked: a signal came to this rank.
        agreed: one had come to any of them when the step's gradients were averaged.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = self.training = self.over = False

    def handle(self, *_: Any) -> None:
        """What the signal calls."""
        # launchers repeat it, and kill what takes too long
        if self.over or (self.asked and ranks().count > 1):
            return
        if self.asked or not self.training:
            raise Terminated("terminated.")
        self.asked = True

    def _end(self, words: str) -> NoReturn:
        self.over = ranks().count > 1
        meet()  # or the launcher would kill the leader, which may be writing, for the others being gone
        raise Terminated(words)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False
        if any_rank(self.asked):  # asked for after the last checkpoint was written: the stage is complete
            self._end("terminated at the end of a stage.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ranks().count == 1:
            self.agreed = self.asked
        if self.agreed:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            self._end(f"terminated after step {state.global_step}, which was saved.")


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
    except BaseException:
        if ranks().count > 1:  # its launcher sends it again, and this rank still has to say why it ends
            before = signal.SIG_IGN
        raise
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
