"""A page as HTML and Markdown, and the files of one result."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.files import write_text
from equipoise.pages.content import Cards, Figure, Figures, Page, Table, Terms, Text

if TYPE_CHECKING:
    from jinja2 import Environment

KINDS = {"figure": Figure, "figures": Figures, "table": Table, "text": Text, "terms": Terms, "cards": Cards}
"""What the templates call the kinds of section."""


def installed_version() -> str:
    """equipoise's version, where it is installed."""
    try:
        return metadata.version("equipoise")
    except metadata.PackageNotFoundError:
        return "unknown"


def render_html(page: Page) -> str:
    """One self-contained file: light and dark, tables that sort.

    Its content security policy allows no request and no script but its own, so that a report can be opened
    wherever it comes from.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _render("page.html.j2", page, script=script, digest=digest, stylesheet=_asset("style.css"))


def render_markdown(page: Page) -> str:
    """The same without plots."""
    return re.sub(r"\n{3,}", "\n\n", _render("page.md.j2", page)).rstrip() + "\n"


def write_results(
    directory: str | os.PathLike[str], name: str, page: Page, data: Mapping[str, Any] | str
) -> dict[str, Path]:
    """Write `NAME.json`, `NAME.md` and `NAME.html` into `directory`, creating it.

    All three are rendered before the first is written, and each replaces its predecessor atomically.

    Args:
        directory: where.
        name: of the files, without suffix.
        page: for people.
        data: for machines; NaN and infinities become null. A string is the file's text as it is.

    Returns:
        The paths by suffix.
    """
    shown = replace(page, data_file=f"{name}.json")
    texts = {
        "json": data if isinstance(data, str) else to_json(data),
        "md": render_markdown(shown),
        "html": render_html(shown),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in texts}
    for suffix, text in texts.items():
        write_text(paths[suffix], text)
    return paths


def to_json(data: Mapping[str, Any]) -> str:
    """Indented UTF-8 text; NaN and infinities become null."""
    return json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """JSON data with NaN and infinities as null, and numpy's figures as Python's."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _asset(name: str) -> str:
    templates = resources.files("equipoise.pages").joinpath("templates")
    return templates.joinpath(name).read_text(encoding="utf-8")


def _render(template: str, page: Page, **values: str) -> str:
    return _environment().get_template(template).render(page=page, version=installed_version(), **values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from equipoise.pages import markup

    environment = Environment(
        loader=PackageLoader("equipoise.pages", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = markup.markdown_text
    environment.filters["html"] = markup.html_text
    environment.filters["ours"] = Markup  # the style sheet, the script, and plots: matplotlib escapes
    for name, kind in KINDS.items():
        environment.tests[name] = partial(_is_a, kind)
    return environment


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind)
