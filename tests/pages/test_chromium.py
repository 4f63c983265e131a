"""Pages in a real browser: sorting, phones, light and dark, print, and no word to the network."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from chromium import Browser, Tab
from equipoise.audit.report import write_audit
from equipoise.pages import write_results
from sample_audit import PATTERNS, make_report
from sample_page import PAGE

PHONE = {"width": 390, "height": 844}
OPEN_ALL = "document.querySelectorAll('details').forEach((part) => { part.open = true; })"
# Colour and effective background of every element with text of its own, as [text, colour, background, size].
COLOURS = """
[...document.querySelectorAll('body *')].filter((element) =>
  !element.closest('svg, script') && element.checkVisibility() &&
  [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
).map((element) => {
  let ground = element;
  while (ground.parentElement && getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)')
    ground = ground.parentElement;
  return [element.textContent.trim().slice(0, 30), getComputedStyle(element).color,
          getComputedStyle(ground).backgroundColor];
})
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one of everything."""
    return write_results(tmp_path_factory.mktemp("page"), "page", PAGE, {})["html"]


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of five runs."""
    return write_audit(make_report(PATTERNS), tmp_path_factory.mktemp("audit"))["html"]


@pytest.fixture(params=["everything", "audit"])
def file(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def column(tab: Tab, index: int) -> list[str]:
    """The first table's column, top to bottom, without intervals and badges."""
    return tab.run(
        f"[...document.querySelector('table').tBodies[0].rows].map((row) => "
        f"(row.cells[{index}].firstElementChild ?? row.cells[{index}]).firstChild.textContent.trim())"
    )


def press_heading(tab: Tab, index: int) -> str:
    """Press a heading of the first table by keyboard; how it sorts now."""
    tab.run(f"document.querySelectorAll('table th button')[{index}].focus()")
    tab.press("Enter", code=13, text="\r")
    return tab.run(f"document.querySelectorAll('table thead th')[{index}].getAttribute('aria-sort')")


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of `rgb(r, g, b)`."""
    assert colour.startswith("rgb("), f"{colour} is not opaque"
    parts = np.array([float(part) / 255 for part in colour[4:-1].split(",")])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, two: str) -> float:
    """WCAG 2.2 contrast ratio."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(browser: Browser, file: Path) -> None:
    with browser.opened(file) as tab:
        tab.run(OPEN_ALL)
        press_heading(tab, 0)
        assert tab.requests() == [file.as_uri()]
        assert tab.complaints() == []


def test_the_checks_above_can_fail_because_the_policy_blocks(browser: Browser, everything: Path) -> None:
    with browser.opened(everything) as tab:
        tab.run("new Promise((done) => { const image = new Image(); image.onerror = done; "
                "image.src = 'http://127.0.0.1:9/x.png'; })")  # fmt: skip
        assert any("Content Security Policy" in complaint for complaint in tab.complaints())
        tab.run("document.body.append(Object.assign(document.createElement('script'), { text: 'hit = 1' }))")
        assert tab.run("typeof hit") == "undefined"


@pytest.mark.parametrize(
    ("index", "up", "down"),
    [
        (0, ["alpha", "beta", "delta", "gamma"], ["gamma", "delta", "beta", "alpha"]),
        (1, ["balanced", "collapsed", "imbalanced", "–"], ["imbalanced", "collapsed", "balanced", "–"]),
        (2, ["-0.500", "3.100", "12.000", "–"], ["12.000", "3.100", "-0.500", "–"]),
        (3, ["512 B", "3.0 KiB", "1.5 MiB", "–"], ["1.5 MiB", "3.0 KiB", "512 B", "–"]),
        (4, ["-4.0%", "7.0%", "50.0%", "–"], ["50.0%", "7.0%", "-4.0%", "–"]),
    ],
)
def test_tables_sort_up_down_and_back(
    browser: Browser, everything: Path, index: int, up: list[str], down: list[str]
) -> None:
    with browser.opened(everything) as tab:
        before = column(tab, index)
        assert press_heading(tab, index) == "ascending"
        assert column(tab, index) == up
        assert press_heading(tab, index) == "descending"
        assert column(tab, index) == down
        assert press_heading(tab, index) == "none"
        assert column(tab, index) == before


def test_another_column_takes_over(browser: Browser, everything: Path) -> None:
    with browser.opened(everything) as tab:
        press_heading(tab, 4)
        press_heading(tab, 0)
        sorts = tab.run(
            "[...document.querySelector('table').tHead.rows[0].cells].map((head) => head.ariaSort)"
        )
        assert sorts == ["ascending", "none", "none", "none", "none"]


def test_headings_are_reached_by_tab(browser: Browser, everything: Path) -> None:
    with browser.opened(everything) as tab:
        reached: list[str] = []
        for _ in range(3):
            tab.press("Tab", code=9)
            reached.append(tab.run("document.activeElement.textContent.trim().slice(0, 7)"))
        assert reached[1:] == ["Run", "Verdict"]
        outline = tab.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"


@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_no_page_scrolls_sideways(browser: Browser, file: Path, width: int) -> None:
    with browser.opened(file, width=width, height=844) as tab:
        tab.run(OPEN_ALL)
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run(
            "[...document.querySelectorAll('h1, h2, h3, p, figure, dl, .card')]"
            ".every((part) => part.getBoundingClientRect().right <= document.documentElement.clientWidth)"
        )


def test_on_a_phone_short_tables_are_cards_and_long_ones_scroll_with_their_names_in_view(
    browser: Browser, everything: Path
) -> None:
    with browser.opened(everything, **PHONE) as tab:
        short, long = tab.run(
            "[...document.querySelectorAll('main > section > .scroll')].map((box) => [box.scrollWidth, "
            "box.clientWidth, getComputedStyle(box.querySelector('tbody tr')).display])"
        )
        assert short[0] == short[1]
        assert short[2] == "block"
        assert long[0] > long[1]
        assert long[2] == "table-row"
        assert press_heading(tab, 2) == "ascending"
        assert column(tab, 2)[0] == "-0.500"
        left = (
            "document.querySelectorAll('table')[1].tBodies[0].rows[0].cells[0].getBoundingClientRect().left"
        )
        before = tab.run(left)
        assert before == tab.run(
            f"(document.querySelectorAll('.scroll')[1].scrollLeft = 300, {left})"
        )  # fmt: skip


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_legible(browser: Browser, file: Path, dark: bool) -> None:
    with browser.opened(file, dark=dark) as tab:
        tab.run(OPEN_ALL)
        found: list[Any] = tab.run(COLOURS)
        assert len(found) > 50
        assert (luminance(tab.run("getComputedStyle(document.body).backgroundColor")) < 0.1) == dark
        poor = {(text, colour, ground) for text, colour, ground in found if contrast(colour, ground) < 4.5}
        assert poor == set()


def test_plots_turn_dark_with_the_page(browser: Browser, everything: Path) -> None:
    with browser.opened(everything, dark=True) as tab:
        picture = imread(io.BytesIO(tab.picture(".plot")))
        card = tab.run("getComputedStyle(document.querySelector('.plot')).backgroundColor")
    inside = np.round(255 * picture[4:-4, 4:-4, :3]).astype(int).reshape(-1, 3)
    colours, counts = np.unique(inside @ [1 << 16, 1 << 8, 1], return_counts=True)
    most, brightest = colours[counts.argmax()], inside[inside.sum(1).argmax()] @ [1 << 16, 1 << 8, 1]
    ground, ink = (f"rgb({c >> 16}, {c >> 8 & 255}, {c & 255})" for c in (most, brightest))
    assert ground == card
    assert contrast(ink, ground) > 7


def test_paper_is_white_and_holds_what_is_closed(browser: Browser, everything: Path) -> None:
    with browser.opened(everything, dark=True, media="print") as tab:
        assert luminance(tab.run("getComputedStyle(document.body).backgroundColor")) == 1
        assert tab.run("getComputedStyle(document.querySelector('.plot svg')).filter") == "none"
        closed = "document.querySelectorAll('details:not([open])').length"
        assert tab.run(closed) == 2
        assert tab.run(f"(dispatchEvent(new Event('beforeprint')), {closed})") == 0
        assert tab.run(f"(dispatchEvent(new Event('afterprint')), {closed})") == 2
