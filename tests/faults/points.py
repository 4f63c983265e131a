"""Where a run is struck, how, and what has to be true afterwards.

The seed of a run draws the recipe, which of the matching moments it is, and where a file is cut.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from faults.events import Event, Strike
from faults.strikes import (
    cut_off,
    failing,
    infinite_gradient,
    interrupted,
    killed,
    not_a_number,
    power_lost,
    small_files_only,
    spoil,
    spoil_all,
    spoil_manifest,
    spoil_newest,
    terminated,
    torn,
)

KILLED = -9
Matches = Callable[[Event], bool]
Tamper = Callable[[Path, random.Random], None]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to strike.

    Attributes:
        name: what happens, in words.
        at: the moments it can happen at.
        strike: what it is, drawn anew for each run.
        ends: exit code of the struck run; -9 for SIGKILL.
        words: one of them stands in its message.
        power: the files are left as a power failure leaves them.
        tamper: done to the output before it is resumed.
        passed_over: how many checkpoints the damage may cost; None for all.
        again: the resumed run is struck as well, anywhere.
        donor: done to a shard of the donor, which is put back after a start that has to be refused.
        ranks: how many run it; one of them is struck.
    """

    name: str
    at: Matches
    strike: Callable[[random.Random], Strike] = lambda draw: killed
    ends: int = KILLED
    words: tuple[str, ...] = ()
    power: bool = False
    tamper: Tamper | None = None
    passed_over: int | None = 0
    again: bool = False
    donor: Tamper | None = None
    ranks: int = 1


def on(*wanted: str) -> Matches:
    """Events by their text: ``written checkpoint/optimizer.pt``; an end in ``*`` matches any end."""

    def matches(event: Event) -> bool:
        text = str(event)
        return any(text.startswith(w[:-1]) if w.endswith("*") else text == w for w in wanted)

    return matches


def later_checkpoint(event: Event) -> bool:
    """A checkpoint is whole, and there is one before it."""
    return event.what == "committed" and int(event.name.split()[1]) > 2


def result_moves(event: Event) -> bool:
    return event.what == "renamed" and event.name.startswith("output/")


WRITES = ("before writing *", "written *")
FULL = ("disk is full",)


def spoil_file(*names: str) -> Tamper:
    """One of the files, by its path under the output; the cache's lies beside it."""

    def tamper(out: Path, draw: random.Random) -> None:
        found = [path for name in names for path in sorted(out.glob(name))]
        spoil(draw.choice(found), draw)

    return tamper


def spoil_tokens(out: Path, draw: random.Random) -> None:
    """A file of the token cache."""
    spoil(draw.choice(sorted((out.parent / "cache").rglob("*.safetensors"))), draw)


def spoil_best(out: Path, draw: random.Random) -> None:
    """The checkpoint that early stopping would take."""
    from faults.strikes import checkpoints

    spoil(draw.choice(sorted(checkpoints(out)[-1].iterdir())), draw)


_KILLS = {
    "weights of a checkpoint: before they are written": "before writing checkpoint/trained.safetensors",
    "weights of a checkpoint: written, not synced": "written checkpoint/trained.safetensors",
    "weights of a checkpoint: synced, not renamed": "synced checkpoint/trained.safetensors",
    "weights of a checkpoint: renamed": "renamed checkpoint/trained.safetensors",
    "manifest: before it is written": "before writing checkpoint/manifest.json",
    "manifest: written, not synced": "written checkpoint/manifest.json",
    "manifest: synced, not renamed": "synced checkpoint/manifest.json",
    "manifest: renamed, directory not synced": "renamed checkpoint/manifest.json",
    "checkpoint: complete, not in place": "before renaming checkpoint/",
    "checkpoint: in place, directory not synced": "renamed checkpoint/",
    "checkpoint: in place, older ones still there": "synced stage/",
    "while an older checkpoint is cleared": "removed removed/*",
    "finished.json: written, not synced": "written stage/finished.json",
    "finished.json: synced, not renamed": "synced stage/finished.json",
    "finished.json: renamed, directory not synced": "renamed stage/finished.json",
    "start.json: written, not synced": "written work/start.json",
    "start.json: renamed, directory not synced": "renamed work/start.json",
    "run.json: written, not synced": "written result/run.json",
    "manifest of the result: synced, not renamed": "synced result/manifest.json",
    "token cache: synced, not renamed": "synced cache/tokens",
    "before the optimiser takes its step": "before optimising ",
    "after the optimiser took its step": "optimised ",
    "between gradients and optimiser": "gradients *",
}
"""SIGKILL, by the event it follows."""

_TORN = {
    "weights of a checkpoint": "written checkpoint/trained.safetensors",
    "optimizer.pt": "written checkpoint/optimizer.pt",
    "scheduler.pt": "written checkpoint/scheduler.pt",
    "rng_state.pth": "written checkpoint/rng_state.pth",
    "trainer_state.json": "written checkpoint/trainer_state.json",
    "manifest of a checkpoint": "written checkpoint/manifest.json",
    "weights of a finished stage": "written stage/trained.safetensors",
    "weights of the result": "written result/*",
    "token cache": "written cache/tokens",
}
"""SIGKILL when a part of the file is written."""

_POWER = {
    "while weights of a checkpoint are written": ("* checkpoint/trained.safetensors",),
    "around the manifest": ("* checkpoint/manifest.json",),
    "around a checkpoint's move into place": ("before renaming checkpoint/", "renamed checkpoint/"),
    "right after a checkpoint": ("committed *",),
    "while older checkpoints are cleared": ("removed removed/*",),
    "around finished.json": ("* stage/finished.json",),
    "around start.json": ("* work/start.json",),
    "while the result moves into place": ("* output/*",),
    "at any moment": ("*",),
}

_ERRORS = {
    "disk full: weights of a checkpoint": ("written checkpoint/trained.safetensors", errno.ENOSPC, FULL),
    "disk full: optimizer.pt": ("written checkpoint/optimizer.pt", errno.ENOSPC, FULL),
    "disk full: trainer_state.json": ("written checkpoint/trainer_state.json", errno.ENOSPC, FULL),
    "disk full: manifest": ("written checkpoint/manifest.json", errno.ENOSPC, FULL),
    "disk full: the result": ("written result/*", errno.ENOSPC, FULL),
    "input/output error while syncing a checkpoint": (
        "before syncing checkpoint/*",
        errno.EIO,
        ("Input/output error",),
    ),
    "input/output error while syncing the result": (
        "before syncing result/*",
        errno.EIO,
        ("Input/output error",),
    ),
    "directory turns read-only": ("before writing checkpoint/*", errno.EROFS, ("Read-only file system",)),
}


def _any(event: Event) -> bool:
    return True


def _glob(*patterns: str) -> Matches:
    """``* name``: any event of that name."""
    from fnmatch import fnmatchcase

    return lambda event: any(fnmatchcase(str(event), pattern) for pattern in patterns)


POINTS: tuple[Point, ...] = (
    *(Point(name=f"killed: {name}", at=on(event)) for name, event in _KILLS.items()),
    *(Point(name=f"torn: {name}", at=on(event), strike=torn) for name, event in _TORN.items()),
    *(
        Point(name=f"power lost: {name}", at=_glob(*events), strike=power_lost, power=True)
        for name, events in _POWER.items()
    ),
    *(
        Point(name=name, at=on(event), strike=partial(failing, number), ends=1, words=words)
        for name, (event, number, words) in _ERRORS.items()
    ),
    Point(
        name="files cannot grow: a limit of the system", at=on("step *"), strike=small_files_only, ends=1,
        words=("File too large", *FULL),
    ),
    Point(name="killed: at a step", at=on("step *")),
    Point(name="killed: while result files move", at=result_moves),
    Point(name="killed: while training files are removed", at=_glob("removed stage/*", "removed checkpo*")),
    Point(name="killed: at any moment", at=_any),
    Point(name="killed twice: at any moment, and again on the way back", at=_any, again=True),
    Point(name="SIGTERM at a step", at=on("step *"), strike=lambda draw: terminated, ends=143),
    Point(name="SIGTERM at any moment", at=_any, strike=lambda draw: terminated, ends=143),
    Point(name="SIGINT at any moment", at=_any, strike=lambda draw: interrupted, ends=130),
    Point(
        name="loss is NaN", at=on("step *"), strike=lambda draw: not_a_number, ends=1,
        words=("is nan at step",),
    ),
    Point(
        name="gradient is infinite", at=on("gradients *"), strike=lambda draw: infinite_gradient, ends=1,
        words=("gradient is not finite at step", "is inf at step", "is nan at step"),
    ),
    Point(name="damaged: newest checkpoint", at=later_checkpoint, tamper=spoil_newest, passed_over=1),
    Point(name="damaged: newest manifest", at=later_checkpoint, tamper=spoil_manifest, passed_over=1),
    Point(name="damaged: every checkpoint", at=later_checkpoint, tamper=spoil_all, passed_over=None),
    Point(name="damaged: best checkpoint", at=later_checkpoint, tamper=spoil_best, passed_over=None),
    Point(
        name="damaged: weights of a finished stage", at=on("step finetune"), passed_over=0,
        tamper=spoil_file("training/transfer/trained.safetensors", "training/transfer/finished.json"),
    ),
    Point(name="damaged: token cache", at=on("step *"), tamper=spoil_tokens),
    Point(name="donor: a shard is cut off", at=on("step *"), donor=cut_off),
    Point(name="donor: a shard is cut off, no step taken", at=on("written work/start.json"), donor=cut_off),
    Point(
        name="a rank dies", at=on("step *", "gradients *", "before optimising ", "optimised "), ends=1,
        words=("another of the 2 processes of this run stopped",), ranks=2,
    ),
)  # fmt: skip
