"""Output directories: claimed by one run, refused where something else is in them, written whole or not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from equipoise.config import ConfigError
from equipoise.distributed import meet, ranks
from equipoise.files import (
    MANIFEST,
    make_directory,
    remove_directory,
    remove_leftovers,
    sync,
    sync_tree,
    write_manifest,
)
from equipoise.train.ending import LOCK, only_run
from equipoise.train.reporting import LOGS

RUN = "run.json"
"""What was run, beside the model it made."""
WORK = "training"
"""Sub-folder with training checkpoints, until the run is done."""
START = "start.json"
"""In the work folder: what the run was started with, so that it is not resumed with something else."""
STAGING = ".staging"
_PROBE = ".write-test"
_KEPT = ("*/checkpoint-*", "*/finished.json", "inputs/done/*")
_LAST = ("config.json", MANIFEST, RUN)
"""Moved into an output last, in this order, each when what came before is on the disk."""


class OutputError(ConfigError):
    """An output directory that cannot be used; the message says why and what to do."""


@contextmanager
def claimed_by_leader(output: Path, *, resume: bool = False, shared: bool = False) -> Generator[None]:
    """`claimed`, by one of several ranks for all of them; the others wait until it is."""
    claim = claimed(output, resume=resume, shared=shared) if ranks().is_leader else nullcontext()
    with claim:
        meet()
        yield


@contextmanager
def claimed(output: Path, *, resume: bool = False, shared: bool = False) -> Generator[None]:
    """Prepare a directory (see `prepare_output`); where the block fails, leave nothing in it but checkpoints.

    A directory that was made here and stayed empty goes too. Unless it is shared, nobody else may claim it
    meanwhile.

    Raises:
        OutputError: see `prepare_output`.
        InUseError: another run writes there.
    """
    is_new = not output.exists()
    prepare_output(output, resume=resume, shared=shared)
    try:
        with nullcontext() if shared else only_run(output):
            try:
                yield
            except BaseException:
                shutil.rmtree(output / STAGING, ignore_errors=True)
                if not shared and not _worth_keeping(output):
                    shutil.rmtree(output / WORK, ignore_errors=True)
                    shutil.rmtree(output / LOGS, ignore_errors=True)
                raise
    except BaseException:
        if is_new and not any(output.iterdir()):
            output.rmdir()
        raise


def prepare_output(output: Path, *, resume: bool = False, shared: bool = False) -> None:
    """Make the directory, or refuse it; see `check_output`.

    Raises:
        OutputError: not a directory, holds files already, or cannot be written.
    """
    check_output(output, resume=resume, shared=shared)
    try:
        make_directory(output)
        probe = output / _PROBE
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror}). Choose another --output."
        ) from None


def check_output(output: Path, *, resume: bool = False, shared: bool = False) -> None:
    """Refuse a directory by what is there.

    Args:
        output: must be new or empty.
        resume: it must hold a run that is not finished, or nothing.
        shared: it may hold other things.

    Raises:
        OutputError: not a directory, or holds files already.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: expected a directory to write to, got a file. Choose another --output.")
    if resume and (output / RUN).is_file():
        raise OutputError(f"{output}: this run is finished (it has a {RUN}); there is nothing to resume.")
    started = (output / WORK / START).is_file()
    found = output.is_dir() and not all(_is_nothing(path) for path in output.iterdir())
    if found and not shared and not (resume and started):
        hint = " A killed run goes on with --resume." if started else ""
        hint = " There is no run to resume in it." if resume else hint
        raise OutputError(f"{output}: exists and is not empty. Choose another --output, or remove it.{hint}")


@contextmanager
def staged(output: Path) -> Generator[Path]:
    """A folder inside ``output`` to fill; at the end its files move out, config.json and `run.json` last.

    All are on the disk before the first moves, with a manifest of their hashes.
    """
    staging = output / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    write_manifest(staging)
    sync_tree(staging)
    order = sorted(staging.iterdir(), key=lambda p: (_LAST.index(p.name) if p.name in _LAST else -1, p.name))
    for path in order:
        target = output / path.name
        if path.name in _LAST:
            sync(output)
        if target.is_dir():
            remove_directory(target)
        os.replace(path, target)
    staging.rmdir()
    remove_leftovers(output)
    sync(output)


def left_behind(output: Path) -> bool:
    """Whether a run that is finished was killed before it had cleaned up."""
    return (output / RUN).is_file() and (output / WORK).is_dir()


def clean_up(output: Path) -> None:
    """Remove what a finished run needs no more."""
    shutil.rmtree(output / STAGING, ignore_errors=True)
    remove_leftovers(output)
    shutil.rmtree(output / WORK, ignore_errors=True)


def _is_nothing(path: Path) -> bool:
    """What a run that was killed before it began can leave."""
    if path.name == WORK and path.is_dir():
        return not (path / START).is_file() and not any(path.glob("*/checkpoint-*"))
    return path.name in (LOCK, _PROBE)


def _worth_keeping(output: Path) -> bool:
    """Whether a run that failed has something to go on from, or has begun to move its model in place."""
    own = (WORK, LOGS, LOCK, STAGING, _PROBE)
    moved = any(path.name not in own for path in output.iterdir())
    return moved or any(any((output / WORK).glob(name)) for name in _KEPT)
