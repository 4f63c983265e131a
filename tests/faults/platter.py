"""What a disk holds after the power went: only what was synced, and of the rest some, none or rubbish.

A file's content is safe as it was when fsync returned; a name in a directory is safe as of that directory's
last fsync. Everything since may or may not be there, each directory and file for itself.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from pathlib import Path

Names = dict[str, int]


class Platter:
    """Follows the directories it is given from now on."""

    def __init__(self, roots: list[Path]) -> None:
        self.roots = roots
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, Names] = {}
        self._held: dict[int, int] = {}  # open, so that the kernel cannot use an inode's number again
        for root in roots:
            for place, _, files in os.walk(root):
                self.directory_synced(Path(place))
                for name in files:
                    self.file_synced(Path(place) / name)

    def file_synced(self, path: Path) -> None:
        self.contents[self._hold(path)] = path.read_bytes()

    def directory_synced(self, path: Path) -> None:
        self.names[self._hold(path)] = self._listed(path)

    def lose_power(self, draw: random.Random) -> None:
        """Leave the directories as they might be found when the machine starts again."""
        kept = 1.0 if draw.random() < 0.4 else draw.random()  # how much of what was not synced is lost
        for root in self.roots:
            if not root.exists():
                continue
            after = root.with_name(root.name + ".after")
            self._build(root.stat().st_ino, root, after, draw, kept)
            shutil.rmtree(root)
            after.rename(root)

    def _build(self, inode: int, now: Path | None, target: Path, draw: random.Random, lost: float) -> None:
        target.mkdir()
        current = self._listed(now) if now is not None else {}
        names = self.names.get(inode, {}) if now is None or draw.random() < lost else current
        for name, child in names.items():
            living = now / name if now is not None and current.get(name) == child else None
            if child in self.names or (living is not None and living.is_dir()):
                self._build(child, living, target / name, draw, lost)
                continue
            safe = self.contents.get(child)
            unsafe = living.read_bytes() if living is not None else None
            (target / name).write_bytes(_found(safe, unsafe, draw, lost))

    def _listed(self, path: Path) -> Names:
        return {entry.name: self._hold(Path(entry.path)) for entry in os.scandir(path)}

    def _hold(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_PATH)
            if stat.S_ISDIR(path.stat().st_mode):
                self.names.setdefault(inode, {})
        return inode


def _found(safe: bytes | None, unsafe: bytes | None, draw: random.Random, lost: float) -> bytes:
    """A file's content afterwards, of what was synced and what was written since."""
    if safe == unsafe and safe is not None:
        return safe
    if unsafe is None or draw.random() < lost:
        return safe or b""
    cut = draw.randrange(len(unsafe) + 1)
    return draw.choice([unsafe, unsafe[:cut], unsafe[:cut] + bytes(len(unsafe) - cut)])
