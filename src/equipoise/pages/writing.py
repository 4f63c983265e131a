"""A page as HTML and Markdown, and the files of one result."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.models.storage import write_atomically
from equipoise.pages.content import Figure, Page, Table, Text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def installed_version() -> str:
    """equipoise's version, where it is installed."""
    try:
        return metadata.version("equipoise")
    except metadata.PackageNotFoundError:
        return "unknown"


def render_html(page: Page) -> str:
    """One self-contained file: no request to the network, light and dark, tables that sort."""
    return _environment().get_template("page.html.j2").render(page=page, version=installed_version())


def render_markdown(page: Page) -> str:
    """The same without plots."""
    text = _environment().get_template("page.md.j2").render(page=page, version=installed_version())
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def write_results(
    directory: str | os.PathLike[str], name: str, page: Page, data: Mapping[str, Any]
) -> dict[str, Path]:
    """Write `NAME.json`, `NAME.md` and `NAME.html` into `directory`, creating it.

    All three are rendered before the first is written, and each replaces its predecessor atomically.

    Args:
        directory: where.
        name: of the files, without suffix.
        page: for people.
        data: for machines; NaN and infinities become null.

    Returns:
        The paths by suffix.
    """
    shown = replace(page, data_file=f"{name}.json")
    texts = {
        "json": json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "md": render_markdown(shown),
        "html": render_html(shown),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in texts}
    for suffix, text in texts.items():
        write_atomically(paths[suffix], partial(_write_text, text=text))
    return paths


def finite(value: Any) -> Any:
    """JSON data with NaN and infinities as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _write_text(path: Path, *, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("equipoise.pages", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = markdown_text
    environment.filters["code"] = code_spans
    environment.filters["drawing"] = Markup  # matplotlib escapes what it draws
    environment.tests["figure"] = partial(_is_a, Figure)
    environment.tests["table"] = partial(_is_a, Table)
    environment.tests["text"] = partial(_is_a, Text)
    return environment


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind)


def markdown_text(value: object) -> Markup:
    """Text that Markdown shows as it is, but for `code`: one line, no cell borders, no links, no markup.

    Marked safe, so that autoescape does not turn apostrophes into entities.
    """
    from markupsafe import Markup

    text = " ".join(str(value).split())
    for letter in "\\*_|<>#":
        text = text.replace(letter, f"\\{letter}")
    return Markup(text.replace("](", "]\\(").replace("&", "&amp;"))


def code_spans(value: object) -> Markup:
    """Escaped text with `backticks` turned into code elements."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(value))))
