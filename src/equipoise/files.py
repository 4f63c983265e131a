"""Writing so that a crash leaves the old file or the new one, and manifests that tell a whole directory from
a damaged one. Needs nothing else of the package."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
"""Size and SHA-256 of every file of a directory, written when all of them are on the disk."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file beside ``path`` and move it there only when it is complete.

    Readers see the old file or the new one, never a part, and after a power failure too: the file is on the
    disk before the rename, and the rename before this returns. The temporary file lies in the same directory,
    since only a rename within one file system is atomic; ``write`` creates it, so the umask holds.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, line ends as they are."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8", newline="\n"))


def sync(path: Path) -> None:
    """Have a file's content, or a directory's names, on the disk before going on."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories, and does without
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """`sync` everything in a directory, names after what they name."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            sync_tree(path)
        else:
            sync(path)
    sync(directory)


def make_directory(directory: Path) -> None:
    """Make a directory and what is missing above it, so that a power failure cannot take them back."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    try:
        sync(directory.parent)
    except OSError:
        directory.rmdir()
        raise


def move_directory(source: Path, target: Path) -> None:
    """Put a complete directory in its place: on the disk first, then renamed; an older one goes."""
    sync_tree(source)
    remove_directory(target)
    os.replace(source, target)
    sync(target.parent)


def remove_leftovers(directory: Path) -> None:
    """Remove what `remove_directory` was killed over."""
    for path in directory.glob(".*.removed"):
        shutil.rmtree(path, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Remove a directory under another name, so that nobody finds half of it under its own."""
    if not directory.exists():
        return
    doomed = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.removed")
    os.replace(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(directory: Path, **noted: Any) -> None:
    """List every file of a directory with size and SHA-256; ``noted`` goes beside the list."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    listed = {
        p.relative_to(directory).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths
    }
    write_text(directory / MANIFEST, json.dumps({**noted, "files": listed}, indent=2))


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 by path.

    Raises:
        OSError, ValueError: there is none, or it is damaged.
    """
    text = (directory / MANIFEST).read_text(encoding="utf-8")
    described: Any = json.loads(text)
    listed: Any = described.get("files") if isinstance(described, dict) else None
    if not isinstance(listed, dict) or not all(_is_entry(name, entry) for name, entry in listed.items()):
        raise ValueError("it does not list files with bytes and sha256")
    return listed


def _is_entry(name: str, entry: Any) -> bool:
    """A path that stays inside the directory, with a size and a hash."""
    parts = name.replace("\\", "/").split("/")
    inside = not Path(name).is_absolute() and ".." not in parts and ":" not in parts[0]
    return inside and isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and "bytes" in entry


def damage(directory: Path) -> str | None:
    """The first thing in which a directory differs from its manifest, in words; None where nothing does.

    Files that the manifest does not list are nobody's business.
    """
    try:
        listed = read_manifest(directory)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, entry in sorted(listed.items()):
        path = directory / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} were written"
            if sha256(path) != entry["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
