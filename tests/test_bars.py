"""Bars of counted work on terminals of any width: one line, whatever is being done."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from equipoise.bars import counted, fitted

SOURCES = Path(__file__).parents[1] / "src" / "equipoise"


def shown(width: int, label: str, *, done: int, total: int | None) -> list[str]:
    """The lines that a terminal of this width was given, without colours and movements of the cursor."""
    text = io.StringIO()
    with counted(Console(file=text, force_terminal=True, width=width, legacy_windows=False)) as bars:
        task = bars.add_task(label, total=total)
        bars.update(task, completed=done)
        bars.refresh()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
    return [line for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", plain) if line.strip()]


@pytest.mark.parametrize("width", [40, 60, 79, 80, 200])
@pytest.mark.parametrize(
    ("label", "done", "total"),
    [
        ("ssd", 11, 2000),
        ("hedgecats in out/models/tinyllama audit", 11, 2000),
        ("window_renormalised (3 of 14)", 12345, 1_234_567),
        ("reading", 999_999, 1_000_000),
    ],
)
def test_one_line_with_count_and_time(width: int, label: str, done: int, total: int) -> None:
    lines = shown(width, label, done=done, total=total)
    for line in lines:
        assert len(line.rstrip()) <= width
        assert f"/{total}" in line  # all of it in one line
        assert "-:--:--" in line
    assert f"{done}/{total}" in lines[-1]
    assert ("━" in lines[-1] or "╸" in lines[-1]) == (width >= 80)
    assert label[:6] in lines[-1]
    if width == 200:
        assert label in lines[-1]


def test_an_unknown_total_is_a_question_mark() -> None:
    assert "0/?" in shown(40, "loading", done=0, total=None)[-1]


def test_markup_in_a_name_is_a_name() -> None:
    assert "[red]x" in shown(60, "[red]x", done=1, total=2)[-1]


def test_nothing_goes_to_a_file() -> None:
    text = io.StringIO()
    with counted(Console(file=text, width=40)) as bars:
        bars.advance(bars.add_task("x", total=3))
    assert text.getvalue() == ""


@pytest.mark.parametrize(("room", "expected"), [(20, "loss 1.25, grad 2"), (12, "loss 1.25…"), (7, "")])
def test_words_are_cut_to_the_room_there_is(room: int, expected: str) -> None:
    assert fitted("loss 1.25, grad 2", room) == expected


def test_every_bar_is_made_here() -> None:
    """Rich's own wrap or lose their figures on narrow terminals; those of stages have words of their own."""
    makers = {
        str(p.relative_to(SOURCES))
        for p in SOURCES.rglob("*.py")
        if re.search(r"\bProgress\(", p.read_text())
    }
    assert makers == {"bars.py", "train/layer_progress.py", "train/progress.py"}
