"""What a page holds. Plain values: nothing here knows HTML or Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["plain", "good", "fair", "warn", "bad"]

UNDEFINED = "–"
"""What stands for a figure that is undefined, or was not measured; sorts last."""
_NUMBER = re.compile(r"[-+−]?(\d[\d,]*)?\.?\d+%?")
_INTERVAL = re.compile(r"(?P<point>\S+) (?P<interval>\[[^\[\]]*\d[^\[\]]*\])")
_STACKS_UP_TO = 8


@dataclass(frozen=True, slots=True)
class Badge:
    """One or two words that stand out."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Cell:
    """One table cell.

    Attributes:
        text: what is shown; `backticks` become code; an interval `0.3 [0.2, 0.4]` is set below its value.
        value: what the column sorts by; None sorts by the text (as a number where the text is one), NaN
            goes last.
        tone: shown as a coloured badge unless plain.
        badges: further badges after the text.
    """

    text: str
    value: float | int | None = None
    tone: Tone = "plain"
    badges: Sequence[Badge] = ()

    @property
    def key(self) -> str:
        """Sort key for the page's script: a number, or empty where there is none."""
        number = _number_in(self.point) if self.value is None else float(self.value)
        return repr(number) if math.isfinite(number) else ""

    @property
    def missing(self) -> bool:
        """Whether the cell holds no figure where others of its column may."""
        if self.value is not None:
            return not math.isfinite(self.value)
        return self.text in ("", UNDEFINED) and not self.badges

    @property
    def point(self) -> str:
        """The text without the interval at its end."""
        split = _INTERVAL.fullmatch(self.text)
        return split["point"] if split else self.text

    @property
    def interval(self) -> str:
        """The interval at the text's end, or nothing."""
        split = _INTERVAL.fullmatch(self.text)
        return split["interval"] if split else ""

    @property
    def plain_text(self) -> str:
        """Text and badges in one line."""
        return ", ".join(text for text in (self.text, *(badge.text for badge in self.badges)) if text)


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

    @property
    def numeric(self) -> list[bool]:
        """Per column: whether it holds figures, which are set to the right; the first names the rows."""
        columns = list(zip(*self.cells, strict=True)) or [()] * len(self.columns)
        return [
            index > 0 and len(column) > 0 and all(cell.key or cell.missing for cell in column)
            for index, column in enumerate(columns)
        ]

    @property
    def stacks(self) -> bool:
        """Whether a phone shows each row as a card; a longer table, or a narrow one, scrolls in its own."""
        return len(self.columns) > 3 and len(self.rows) <= _STACKS_UP_TO


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot: an `<svg>` element from `equipoise.pages.plotting.as_svg`, and its description.

    Attributes:
        title: the point of it, in a few words.
        svg: the drawing, on white; the page recolours it in dark mode.
        description: what it shows, for those who cannot see it (alt text).
        note: a caption.
    """

    title: str
    svg: str
    description: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Plots side by side where there is room for two, below one another on a phone."""

    title: str
    figures: Sequence[Figure]


@dataclass(frozen=True, slots=True)
class Text:
    """A heading with paragraphs; `backticks` become code."""

    title: str
    paragraphs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Terms:
    """A heading with explained words: pairs of a term and a paragraph."""

    title: str
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Details:
    """A card whose headline is always there, and whose contents open on demand.

    Attributes:
        title: its headline; unique on the page.
        lead: a paragraph that is always visible: what to know, or to do.
        sections: what opens.
        badges: beside the headline.
        more: what the part that opens is called.
        is_open: whether it starts open.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    badges: Sequence[Badge] = ()
    more: str = "More"
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Cards:
    """A heading over a list of `Details`."""

    title: str
    details: Sequence[Details]


Section = Figure | Figures | Table | Text | Terms | Cards


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

    @property
    def text_file(self) -> str:
        """Name of the Markdown file beside it."""
        return f"{self.data_file.removesuffix('.json')}.md" if self.data_file else ""

    @property
    def html_file(self) -> str:
        """Name of the page's own file."""
        return f"{self.data_file.removesuffix('.json')}.html" if self.data_file else ""


def _number_in(text: str) -> float:
    """`-1,024.5%` -> -1024.5; NaN where the text is anything else."""
    if not _NUMBER.fullmatch(text):
        return math.nan
    return float(text.rstrip("%").replace(",", "").replace("−", "-"))
