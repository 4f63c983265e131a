"""What strikes a run at an event, and what is done to its files between two runs."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from equipoise.files import MANIFEST
from equipoise.train.stage_files import step_of
from faults.events import Event, Stream, Strike


def killed(stream: Stream, event: Event, given: dict[str, Any]) -> None:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminated(stream: Stream, event: Event, given: dict[str, Any]) -> None:
    """SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted(stream: Stream, event: Event, given: dict[str, Any]) -> None:
    """SIGINT."""
    os.kill(os.getpid(), signal.SIGINT)


def stopped(stream: Stream, event: Event, given: dict[str, Any]) -> None:
    """SIGSTOP: the run is there, and does nothing."""
    os.kill(os.getpid(), signal.SIGSTOP)


def torn(draw: random.Random) -> Strike:
    """SIGKILL when a part of the file was written."""

    def strike(stream: Stream, event: Event, given: dict[str, Any]) -> None:
        _cut(given["path"], draw)
        killed(stream, event, given)

    return strike


def power_lost(draw: random.Random) -> Strike:
    """What was not synced is gone, whole or in part."""

    def strike(stream: Stream, event: Event, given: dict[str, Any]) -> None:
        assert stream.platter is not None
        stream.platter.lose_power(draw)
        killed(stream, event, given)

    return strike


def failing(number: int, draw: random.Random, *, lasts: bool = True) -> Strike:
    """The operation fails, worded as the library at hand words it; a part of the file may be written.

    Where it ``lasts``, no later write or sync succeeds either.
    """

    def fail(event: Event) -> None:
        message = os.strerror(number)
        if event.name.endswith(".safetensors"):
            raise SafetensorError(f"Error while serializing: I/O error: {message} (os error {number})")
        if event.name.endswith((".pt", ".pth")) and number == errno.ENOSPC:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8384 vs 8278")
        raise OSError(number, message, event.name)

    def strike(stream: Stream, event: Event, given: dict[str, Any]) -> None:
        if event.what == "written":
            _cut(given["path"], draw)
        if lasts:
            stream.after = lambda e: fail(e) if e.what in ("before writing", "before syncing") else None
        fail(event)

    return strike


def small_files_only(draw: random.Random) -> Strike:
    """From now on the kernel lets no file grow past a limit (EFBIG), in any library."""

    def strike(stream: Stream, event: Event, given: dict[str, Any]) -> None:
        limit = draw.randrange(2000, 4000)  # what the run says is a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return strike


def not_a_number(stream: Stream, event: Event, given: dict[str, Any]) -> None:
    """The last layer's keys are NaN from here on."""
    layer = given["trainer"].accelerator.unwrap_model(given["trainer"].model).get_decoder().layers[-1]
    layer.self_attn.k_proj.register_forward_hook(lambda m, i, out: out * float("nan"))


def infinite_gradient(stream: Stream, event: Event, given: dict[str, Any]) -> None:
    """The loss is finite, the gradient of one trained weight is not."""
    weight = next(iter(given["trainer"].trained().values()))
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.view(-1)[0] = float("inf")


def _cut(path: Any, draw: random.Random) -> None:
    size = os.path.getsize(path)
    os.truncate(path, draw.randrange(size) if size else 0)


# ---- to files, between two runs


def flip(path: Path, draw: random.Random) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def spoil(path: Path, draw: random.Random) -> None:
    """A bit, an end cut off, the file, or its content gone."""
    how = draw.choice(["flip", "cut", "empty", "gone"])
    if how == "flip":
        flip(path, draw)
    elif how == "cut":
        _cut(path, draw)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


def cut_off(path: Path, draw: random.Random) -> None:
    """The end of a file, or all of it."""
    if draw.random() < 0.25:
        path.unlink()
    else:
        _cut(path, draw)


def checkpoints(out: Path) -> list[Path]:
    """Of the stage under way, the newest first."""
    stages = [out / "training" / name for name in ("finetune", "transfer")]
    found = next(
        (list(stage.glob("checkpoint-*")) for stage in stages if any(stage.glob("checkpoint-*"))), []
    )
    return sorted(found, key=step_of, reverse=True)


def spoil_newest(out: Path, draw: random.Random) -> None:
    """Any file of the newest checkpoint."""
    newest = checkpoints(out)[0]
    spoil(draw.choice(sorted(p for p in newest.iterdir() if p.name != MANIFEST)), draw)


def spoil_manifest(out: Path, draw: random.Random) -> None:
    """The newest checkpoint's manifest."""
    spoil(checkpoints(out)[0] / MANIFEST, draw)


def spoil_all(out: Path, draw: random.Random) -> None:
    """A file of every checkpoint of the stage."""
    for place in checkpoints(out):
        spoil(draw.choice(sorted(place.iterdir())), draw)
