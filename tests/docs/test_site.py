"""The site's navigation has every page, and every link between files of the repository leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = DOCS / "reference" / "command-line.md"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page != GENERATED)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")


def navigation() -> list[str]:
    """The pages that `zensical.toml` lists, in order."""
    with (ROOT / "zensical.toml").open("rb") as file:
        settings = tomllib.load(file)
    return list(_pages(settings["project"]["nav"]))


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages(inner)


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as Python-Markdown and GitHub both make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


def test_navigation_has_every_page_once() -> None:
    listed = navigation()
    assert len(listed) == len(set(listed))
    there = {page.relative_to(DOCS).as_posix() for page in PAGES}
    records = {page for page in there if page.startswith("adr/") and page != "adr/README.md"}
    assert set(listed) - {GENERATED.relative_to(DOCS).as_posix()} == there - records


def test_the_index_of_decisions_has_every_record() -> None:
    index = (DOCS / "adr" / "README.md").read_text(encoding="utf-8")
    for record in DOCS.glob("adr/0*.md"):
        assert f"]({record.name})" in index or f"({record.name})" in index


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target == GENERATED:
            continue
        assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
        assert page.parent == ROOT or DOCS in [target, *target.parents], f"{link} leads out of the site"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}"


def test_links_to_the_web_are_secure() -> None:
    for page in PAGES:
        assert not re.search(r"\]\(http://", prose(page)), page
