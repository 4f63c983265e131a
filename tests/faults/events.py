"""Everything a run does to its files and every step it takes, as a stream of events to strike at.

Installed in a forked child, which never comes back: nothing is put back in place.
"""

from __future__ import annotations

import builtins
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
import torch

from faults.platter import Platter

_TEMPORARY = re.compile(r"^\.(.+)\.[0-9a-f]{12}(\.\w+)?$")


@dataclass(frozen=True)
class Event:
    """``what`` happened to ``name``, a file or directory by its role: ``checkpoint/optimizer.pt``."""

    what: str
    name: str

    def __str__(self) -> str:
        return f"{self.what} {self.name}"


Strike = Callable[["Stream", Event, dict[str, Any]], None]


class Stream:
    """Counts events; calls ``strike`` at one of them, or notes them all."""

    def __init__(self, world: Path, log: Path | None = None) -> None:
        self.world, self.log = world, log
        self.target: tuple[Callable[[Event], bool], int] | None = None
        self.strike: Strike | None = None
        self.after: Callable[[Event], None] | None = None
        """Called with every event since the strike: a disk that is full stays full."""
        self.platter: Platter | None = None

    def aim(self, matches: Callable[[Event], bool], nth: int, strike: Strike) -> None:
        self.target, self.strike = (matches, nth), strike

    def happens(self, what: str, name: str, **given: Any) -> None:
        event = Event(what, name)
        if self.log is not None:
            with _OPEN(self.log, "a", encoding="utf-8") as file:
                file.write(f"{event}\n")
        if self.after is not None:
            self.after(event)
        if self.target is None or not self.target[0](event):
            return
        matches, left = self.target
        self.target = (matches, left - 1) if left else None
        if not left and self.strike is not None:
            self.strike(self, event, given)

    def role(self, path: Any) -> str | None:
        """What a path is for; None outside the run's own directories."""
        path = Path(os.path.abspath(path))
        try:
            parts = path.relative_to(self.world).parts
        except ValueError:
            return None
        name = parts[-1] if parts else ""
        match = _TEMPORARY.match(name)
        name = match[1] + (match[2] or "") if match else name
        if name.startswith(".checkpoint-") or any(".removed" in part for part in parts):
            return "removed/" + name
        if parts[:1] == ("cache",):
            return "cache/tokens" if name.endswith(".safetensors") else "cache/"
        if parts[:1] != ("out",):
            return None
        if any(re.match(r"checkpoint-\d+$", part) for part in parts):
            return "checkpoint/" if name.startswith("checkpoint-") else f"checkpoint/{name}"
        if len(parts) > 1 and parts[1] == "training":
            kind = "work" if len(parts) == 3 and "." in name else "stage"
            return f"{kind}/{name}" if "." in name else f"{kind}/"
        if ".staging" in parts:
            return f"result/{name}"
        return f"output/{name}" if len(parts) > 1 else "output/"


_OPEN = builtins.open
_FSYNC, _REPLACE, _UNLINK, _RMDIR = os.fsync, os.replace, os.unlink, os.rmdir


class _Watched:
    """A file open for writing; tells when it is closed."""

    def __init__(self, file: Any, done: Callable[[], None]) -> None:
        self._file, self._done = file, done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)
        self._done()

    def __iter__(self) -> Any:
        return iter(self._file)

    def close(self) -> None:
        self._file.close()
        self._done()


def install(stream: Stream) -> None:
    """Watch this process from now on."""
    _install_writers(stream)
    _install_names(stream)
    _install_steps(stream)


def _install_writers(stream: Stream) -> None:
    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        role = stream.role(file) if isinstance(file, str | os.PathLike) and set(mode) & set("wax+") else None
        if role is None:
            return _OPEN(file, mode, *args, **kwargs)
        stream.happens("before writing", role, path=file)
        made = _OPEN(file, mode, *args, **kwargs)
        return _Watched(made, lambda: stream.happens("written", role, path=file))

    def wrapped(write: Callable[..., Any], position: int) -> Callable[..., Any]:
        def writes(*args: Any, **kwargs: Any) -> Any:
            path = args[position] if len(args) > position else kwargs.get("filename", kwargs.get("f"))
            role = stream.role(path) if isinstance(path, str | os.PathLike) else None
            if role is not None:
                stream.happens("before writing", role, path=path)
            write(*args, **kwargs)
            if role is not None:
                stream.happens("written", role, path=path)

        return writes

    builtins.open = io.open = opened  # type: ignore[assignment]
    torch.save = wrapped(torch.save, 1)
    for module in (safetensors.torch, safetensors.numpy):
        module.serialize_file = wrapped(module.serialize_file, 1)  # type: ignore[attr-defined]


def _install_names(stream: Stream) -> None:
    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        role = stream.role(path)
        if role is None:
            _FSYNC(handle)
            return
        stream.happens("before syncing", role, path=path)
        if stream.platter is not None:  # the real one would take its time
            (stream.platter.directory_synced if path.is_dir() else stream.platter.file_synced)(path)
        stream.happens("synced", role, path=path)

    def replace(source: Any, target: Any, **kwargs: Any) -> None:
        role = stream.role(target)
        if role is not None:
            role = "removed/" if ".removed" in str(target) else role
            stream.happens("before renaming", role, path=source)
        _REPLACE(source, target, **kwargs)
        if role is not None:
            stream.happens("renamed", role, path=target)

    def removing(remove: Callable[..., None]) -> Callable[..., None]:
        def removes(path: Any, *, dir_fd: int | None = None) -> None:
            place = Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else Path(path)
            role = stream.role(place)
            remove(path, dir_fd=dir_fd)
            if role is not None:
                stream.happens("removed", role, path=place)

        return removes

    os.fsync, os.replace, os.rename = fsync, replace, replace  # type: ignore[assignment]
    os.unlink, os.rmdir = removing(_UNLINK), removing(_RMDIR)
    os.remove = os.unlink


def _install_steps(stream: Stream) -> None:
    from equipoise.train import stages, trainer

    for kind in (stages.TransferTrainer, stages.FinetuneTrainer):
        step = kind.training_step

        def training_step(self: Any, *args: Any, step: Any = step, **kwargs: Any) -> Any:
            stream.happens("step", self.stage_name, trainer=self)
            loss = step(self, *args, **kwargs)
            stream.happens("gradients", self.stage_name, trainer=self)
            return loss

        kind.training_step = training_step  # type: ignore[method-assign]
    commit = trainer.commit_checkpoint

    def committed(directory: Path, step: int, keep: Any) -> None:
        stream.happens("full", directory.name)  # filled, and nothing of it certain yet
        commit(directory, step, keep)
        stream.happens("committed", f"{directory.name} {step}")

    trainer.commit_checkpoint = committed
    optimise = torch.optim.AdamW.step

    def step_of_optimiser(self: Any, *args: Any, **kwargs: Any) -> Any:
        stream.happens("before optimising", "")
        result = optimise(self, *args, **kwargs)
        stream.happens("optimised", "")
        return result

    torch.optim.AdamW.step = step_of_optimiser  # type: ignore[method-assign]
