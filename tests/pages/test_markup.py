"""Text stays text: in HTML and in Markdown, whoever wrote it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from equipoise.pages.markup import html_text, markdown_text

MARKDOWN = MarkdownIt("commonmark").enable("table")


def shown(text: str) -> str:
    return MARKDOWN.render(str(markdown_text(text)))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a & b's <i>", "a &amp; b&#39;s &lt;i&gt;"),
        ("set `a.b=<c>` to `x`", "set <code>a.b=&lt;c&gt;</code> to <code>x</code>"),
        ("`", "`"),
    ],
)
def test_html(text: str, html: str) -> None:
    assert html_text(text) == html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("snake_case_name *x* #1", "snake_case_name *x* #1"),
        ("# no heading\nof two lines", "# no heading of two lines"),
        ("R&amp;D <b> [x](javascript:1)", "R&amp;amp;D &lt;b&gt; [x](javascript:1)"),
        ("`hybrid.gate=per_head` and `<b>`", "<code>hybrid.gate=per_head</code> and <code>&lt;b&gt;</code>"),
        ("`a``b`<b>`", "`a``b`&lt;b&gt;`"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_markdown(text: str, html: str) -> None:
    assert shown(text) == f"<p>{html}</p>\n"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab `|<>&*_[]()\\!/\"'", max_size=24))
def test_nothing_becomes_markup(text: str) -> None:
    """Only paragraphs and code come out, and a table row keeps its cells."""
    tags = {tag.split(">")[0].strip("/") for tag in shown(f"x {text}").split("<")[1:]}
    assert tags <= {"p", "code"}
    table = MARKDOWN.render(f"| a | b |\n|---|---|\n| x {markdown_text(text)} | end |\n")
    assert table.count("<td>") == 2
    assert "<td>end</td>" in table
