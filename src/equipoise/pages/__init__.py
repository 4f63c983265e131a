"""Result pages: what every verb writes for people, from one description of it.

A `Page` is a summary sentence, then figures, tables and paragraphs. `write_results` puts it beside the JSON
of the same figures: `NAME.json`, `NAME.md` and a self-contained `NAME.html`.
"""

from equipoise.pages.content import Cell, Figure, Page, Section, Table, Text
from equipoise.pages.format import bytes_in_words, number, percent
from equipoise.pages.writing import render_html, render_markdown, write_results

__all__ = [
    "Cell",
    "Figure",
    "Page",
    "Section",
    "Table",
    "Text",
    "bytes_in_words",
    "number",
    "percent",
    "render_html",
    "render_markdown",
    "write_results",
]
