"""Pages as files: complete, self-contained, and their data without NaN."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from equipoise.pages import Page, Table, Text, render_html, render_markdown, write_results
from equipoise.pages.plotting import as_svg, canvas, printable
from sample_page import PAGE


class Parser(HTMLParser):
    """Collects what a page would load or follow, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data", "action"}
        ]
        if tag not in {"meta", "br", "link", "img"}:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_a_page_stands_alone() -> None:
    page = render_html(replace(PAGE, data_file="x.json"))
    parser = Parser()
    parser.feed(page)
    assert not parser.stack
    outside = {link for link in parser.links if not link.startswith(("#", "data:"))}
    assert outside == {"x.json", "x.md"}
    assert parser.tags.isdisjoint({"img", "iframe", "object"})
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_the_policy_admits_the_script_of_the_page_and_no_other() -> None:
    page = render_html(PAGE)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_strings_cannot_inject() -> None:
    evil = "<script>alert(1)</script>\"'><b>"
    page = Page(
        evil, evil, evil, [Table(evil, [evil, "b"], [[evil, evil]], evil), Text(evil, [evil])], f"{evil}.json"
    )
    shown = render_html(page)
    assert shown.count("<script") == 1
    assert "<b>" not in shown
    assert not re.search(r"(?<!\\)<(?!https?:)", render_markdown(replace(page, data_file="")))


def test_headings_nest() -> None:
    levels = [int(level) for level in re.findall(r"<h(\d)", render_html(PAGE))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    headings = [len(found) for found in re.findall(r"^(#+) ", render_markdown(PAGE), re.MULTILINE)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))


def test_markdown_holds_what_the_page_does() -> None:
    text = render_markdown(replace(PAGE, data_file="x.json"))
    assert text.startswith("# Runs & *more*\n".replace("&", "&amp;").replace("*", "\\*"))
    assert "[x.json](x.json)" in text
    assert "[x.html](x.html)" in text
    assert "| alpha | balanced, untested | 3.100 [3.000, 3.200] |" in text
    assert "### alpha: balanced" in text
    assert "#### Inside" in text
    assert "- **Reach**: how far windows relay." in text
    assert "\n\n\n" not in text


def test_results_are_three_files(tmp_path: Path) -> None:
    data = {
        "a": math.nan,
        "b": [1.5, math.inf],
        "c": {"d": np.float32(0.5), "e": np.array([1, 2])},
        3: (None,),
    }
    paths = write_results(tmp_path / "new" / "folder", "audit", PAGE, data)
    assert {suffix: path.name for suffix, path in paths.items()} == {
        "json": "audit.json", "md": "audit.md", "html": "audit.html",
    }  # fmt: skip
    assert json.loads(paths["json"].read_text(encoding="utf-8")) == {
        "a": None, "b": [1.5, None], "c": {"d": 0.5, "e": [1, 2]}, "3": [None],
    }  # fmt: skip
    assert 'href="audit.md"' in paths["html"].read_text(encoding="utf-8")
    assert sorted(path.name for path in paths["json"].parent.iterdir()) == sorted(
        p.name for p in paths.values()
    )


def test_data_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_results(tmp_path / "out", "audit", PAGE, {"a": object()})
    assert not (tmp_path / "out").exists()


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    assert write_results(tmp_path, "x", PAGE, '{"a": 1}\n')["json"].read_bytes() == b'{"a": 1}\n'


def drawing(salt: str) -> str:
    figure, axes = canvas(2.0)
    axes.plot([1, 2], [3, 1], label="run")
    axes.set_title(printable("a$b$c 漢 and a name that is too long"), parse_math=False)
    return as_svg(figure, salt=salt)


def test_plots_are_reproducible_and_their_ids_differ() -> None:
    assert drawing("one") == drawing("one")
    assert drawing("one").startswith("<svg")
    assert drawing("one").rstrip().endswith("</svg>")
    ids = [set(re.findall(r'\bid="(m\w+|p\w+)"', drawing(salt))) for salt in ("one", "two")]
    clips = [{name for name in found if re.fullmatch(r"[mp][0-9a-f]{10}", name)} for found in ids]
    assert clips[0]
    assert not clips[0] & clips[1]


def test_labels_that_can_be_drawn() -> None:
    assert printable("short") == "short"
    assert printable("漢字 x") == "?? x"
    assert printable("x" * 30) == "x" * 23 + "..."
