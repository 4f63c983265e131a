"""Text from anywhere as HTML or Markdown that shows it as it is, but for `code` in backticks."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_CODE = re.compile(r"`([^`]+)`")


def html_text(value: object) -> Markup:
    """Escaped text with `backticks` turned into code elements."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(value))))


def markdown_text(value: object) -> Markup:
    """One line without cell borders, links or markup, but for `code`.

    Marked safe, so that autoescape does not turn apostrophes into entities. Backticks that do not pair up
    one by one are shown as such: what Markdown takes for code there could differ from what is left
    unescaped here.
    """
    text = " ".join(str(value).split())
    if "``" in text or text.count("`") % 2:
        return Markup(_escaped(text).replace("`", "\\`"))
    parts = text.split("`")
    return Markup("`".join(part.replace("|", "\\|") if index % 2 else _escaped(part)
                           for index, part in enumerate(parts)))  # fmt: skip


def _escaped(text: str) -> str:
    for letter in "\\*_|<>#":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("](", "]\\(").replace("&", "&amp;")
