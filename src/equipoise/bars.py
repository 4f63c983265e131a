"""Progress of work that can be counted: one line that fits the terminal, nothing where there is none."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

WIDE = 80
"""Columns from which a bar is drawn; narrower terminals have room for figures only."""
BAR = 12
"""Columns it gets at least."""
TIME = len("00:00:00")


class Label(TextColumn):
    """What is being done, cut to the room that the figures leave: rich would wrap it, or cut the figures."""

    def __init__(self, console: Console) -> None:
        super().__init__("{task.description}", markup=False)
        self.console = console

    def render(self, task: Task) -> Text:
        """The words in one line."""
        digits = len("?" if task.total is None else str(int(task.total)))
        figures = 2 * digits + len("/  ") + TIME + (BAR + 1 if self.console.width >= WIDE else 0)
        return Text(fitted(str(task.description), self.console.width - figures - 2))


def counted(console: Console) -> Progress:
    """Bars of tasks that count up to a total: `with counted(console) as bars: bars.add_task(…)`.

    On narrow terminals the bar goes first, then words; count and remaining time stay.
    """
    drawn = [BarColumn(bar_width=None)] if console.width >= WIDE else []
    return Progress(
        Label(console), *drawn, MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def fitted(text: str, room: int) -> str:
    """The text in so many columns; nothing where not even a word of it fits."""
    if len(text) <= room:
        return text
    return text[: room - 1].rstrip(" ,") + "…" if room >= 8 else ""
