"""Write docs/reference/public-names.txt: what is public, with signatures, fields and defaults.

The names are those that the pages of docs/reference show. Signatures are read from
the source, which is not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
LISTING = PAGES / "public-names.txt"


def shown_names() -> list[str]:
    """Every name that a page of the reference shows, sorted."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    return sorted(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE), key=str.lower)


def listing() -> str:
    """The text of the listing."""
    package = griffe.load("equipoise", search_paths=[ROOT / "src"])
    lines = [line for name in shown_names() for line in described(package, name)]
    return "\n".join(lines) + "\n"


def described(package: griffe.Object | griffe.Alias, name: str) -> Iterator[str]:
    """One name: its signature, or its kind, bases and public members."""
    target = package[name.removeprefix("equipoise.")]
    found = target.final_target if isinstance(target, griffe.Alias) else target
    if isinstance(found, griffe.Function):
        yield name.removesuffix(found.name) + _signature(found)
    elif isinstance(found, griffe.Class):
        bases = ", ".join(map(str, found.bases))
        yield f"class {name}({bases})" if bases else f"class {name}"
        for member in found.members.values():
            if not (member.name == "__init__" and "dataclass" in found.labels):  # its fields say the same
                yield from (f"    {line}" for line in _member(member))
    elif isinstance(found, griffe.Attribute):
        yield f"{name}{_typed(found)}"


def _member(member: griffe.Object | griffe.Alias) -> Iterator[str]:
    """A public method or field; nothing for what is inherited, imported or private."""
    if member.name.startswith("_") and member.name != "__init__":
        return
    if isinstance(member, griffe.Function):
        yield _signature(member)
    elif isinstance(member, griffe.Attribute):
        yield f"{member.name}{_typed(member)}"


def _signature(function: griffe.Function) -> str:
    return re.sub(r"\s+", " ", str(function.signature()))


def _typed(attribute: griffe.Attribute) -> str:
    annotation = "" if attribute.annotation is None else f": {attribute.annotation}"
    value = "" if attribute.value is None else f" = {attribute.value}"
    return re.sub(r"\s+", " ", annotation + value)


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8", newline="\n")
    print(LISTING)
