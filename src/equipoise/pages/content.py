"""What a page holds. Plain values: nothing here knows HTML or Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["plain", "good", "fair", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One table cell.

    Attributes:
        text: what is shown; `backticks` become code.
        value: what the column sorts by; None sorts by the text, NaN goes last.
        tone: shown as a coloured badge unless plain.
    """

    text: str
    value: float | None = None
    tone: Tone = "plain"

    @property
    def key(self) -> str:
        """Sort key for the page's script: a number, or empty where there is none."""
        return "" if self.value is None or not math.isfinite(self.value) else repr(float(self.value))


@dataclass(frozen=True, slots=True)
class Table:
    """A table that sorts by its columns; the first column names the row.

    Attributes:
        title: its heading.
        columns: header texts.
        rows: as many cells as columns each; strings stand for plain cells.
        note: a paragraph below: units, intervals, what was scored.

    Raises:
        ValueError: a row of another length.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"expected {len(self.columns)} cells a row in {self.title!r}, got {len(row)}: {row!r}"
                )

    @property
    def cells(self) -> list[list[Cell]]:
        """All rows as cells."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot: an `<svg>` element from `equipoise.pages.plotting.as_svg`, and its description.

    Attributes:
        title: the point of it, in a few words.
        svg: the drawing.
        description: what it shows, for those who cannot see it (alt text).
        note: a caption.
    """

    title: str
    svg: str
    description: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A heading with paragraphs; `backticks` become code."""

    title: str
    paragraphs: Sequence[str]


Section = Figure | Table | Text


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page.

    Attributes:
        title: its heading.
        subtitle: what was measured with what, one line.
        summary: the result in one or two sentences.
        sections: in reading order: plots first, then tables, then how to read them.
        data_file: name of the JSON file beside it; set by `write_results`.
    """

    title: str
    subtitle: str
    summary: str
    sections: Sequence[Section] = field(default_factory=tuple)
    data_file: str = ""
