"""Write requirements.lock: every package of the development install, pinned, with the hashes of its files.

    python tools/lock.py    # after a change to pyproject.toml or constraints.txt; needs PyPI

The versions are those installed here. torch is left out: which build fits is up to the machine, so it is
installed first, by its pin in constraints.txt, with what it needs itself.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import tomllib  # pyright: ignore[reportMissingImports]  (Python 3.11, as what it locks)
from packaging.requirements import Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion

LOCK = Path(__file__).parents[1] / "requirements.lock"
INDEX = "https://pypi.org/simple"
EXTRAS = ("dev", "docs")
APART = "torch"
BUILD = ("setuptools",)  # the editable install builds with what is there
PLATFORMS = ("linux", "darwin")
_SYSTEM = {"linux": "Linux", "darwin": "Darwin"}


def needed(platform: str) -> set[str]:
    """Names of all packages that the development install needs on a platform, torch's own left out."""
    found: set[str] = set(BUILD)
    waiting = list(_own(platform))
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name == APART or (name, extra) in seen:
                continue
            seen.add((name, extra))
            found.add(name)
            waiting += _wanted(name, extra, platform)
    return found


def _own(platform: str) -> Iterator[Requirement]:
    project = tomllib.loads(LOCK.with_name("pyproject.toml").read_text(encoding="utf-8"))["project"]
    for lines in (project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)):
        yield from _applying(lines, "", platform)


def _wanted(name: str, extra: str, platform: str) -> Iterator[Requirement]:
    return _applying(metadata.requires(name) or [], extra, platform)


def _applying(lines: list[str], extra: str, platform: str) -> Iterator[Requirement]:
    for line in lines:
        requirement = Requirement(line)
        about = {"extra": extra, "sys_platform": platform, "platform_system": _SYSTEM[platform]}
        if requirement.marker is None or requirement.marker.evaluate(about):
            yield requirement


def hashes(name: str, version: str) -> list[str]:
    """SHA-256 of every file of a release, as the package index lists them."""
    with urllib.request.urlopen(f"{INDEX}/{name}/", timeout=60) as answer:
        page = answer.read().decode()
    found = re.findall(r'href="[^"]*/([^"/#]+)#sha256=([0-9a-f]{64})"', page)
    own = sorted({digest for file, digest in found if _version(file) == version})
    if not own:
        raise SystemExit(f"{name}: expected files of version {version} at {INDEX}, found none.")
    return own


def _version(file: str) -> str | None:
    """The version in a file's name; None for kinds of file that pip does not install."""
    try:
        if file.endswith(".whl"):
            return str(parse_wheel_filename(file)[1])
        return str(parse_sdist_filename(file)[1])
    except (InvalidSdistFilename, InvalidWheelFilename, InvalidVersion):
        return None


def entry(name: str, *, linux_only: bool) -> str:
    """One package's lines: its pin, and the hashes of all its files."""
    version = metadata.version(name)
    marker = ' ; sys_platform == "linux"' if linux_only else ""
    lines = (f"    --hash=sha256:{digest}" for digest in hashes(name, version))
    return " \\\n".join([f"{name}=={version}{marker}", *lines])


def locked(text: str) -> dict[str, str]:
    """Version by name of a lock's text."""
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def write() -> None:
    """Write the lock for what is installed."""
    by_platform = {platform: needed(platform) for platform in PLATFORMS}
    names = sorted(by_platform["linux"])
    lines = [entry(name, linux_only=name not in by_platform["darwin"]) for name in names]
    head = "# Made by tools/lock.py, for Python 3.11 on Linux and macOS; torch is installed before.\n"
    LOCK.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(names)} packages in {LOCK.name}")


if __name__ == "__main__":
    write()
