"""Result pages: what every verb writes for people, from one description of it.

A `Page` is a summary sentence, then figures, tables and paragraphs. `write_results` puts it beside the JSON
of the same figures: `NAME.json`, `NAME.md` and a self-contained `NAME.html`.
"""

from equipoise.pages.content import (
    UNDEFINED,
    Badge,
    Cards,
    Cell,
    Details,
    Figure,
    Figures,
    Page,
    Section,
    Table,
    Terms,
    Text,
    Tone,
)
from equipoise.pages.format import bytes_in_words, number, percent
from equipoise.pages.writing import installed_version, render_html, render_markdown, write_results

__all__ = [
    "UNDEFINED",
    "Badge",
    "Cards",
    "Cell",
    "Details",
    "Figure",
    "Figures",
    "Page",
    "Section",
    "Table",
    "Terms",
    "Text",
    "Tone",
    "bytes_in_words",
    "installed_version",
    "number",
    "percent",
    "render_html",
    "render_markdown",
    "write_results",
]
