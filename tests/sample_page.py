"""A page with one of everything, for tests of how pages look and behave."""

from __future__ import annotations

import math

from equipoise.pages import Badge, Cards, Cell, Details, Figure, Figures, Page, Table, Terms, Text, Tone
from equipoise.pages.plotting import as_svg, canvas

TONES: tuple[Tone, ...] = ("plain", "good", "fair", "warn", "bad")
LONG = "anamewithoutasinglespaceinit" * 6


def plot(salt: str) -> str:
    """A line, labelled."""
    figure, axes = canvas(2.0)
    axes.plot([0, 1, 2], [1, 3, 2])
    axes.set_xlabel("distance, tokens")
    return as_svg(figure, salt=salt)


RUNS = Table(
    "Figures",
    ["Run", "Verdict", "NLL", "State", "Share"],
    [
        ["alpha", Cell("balanced", tone="good", badges=[Badge("untested")]), "3.100 [3.000, 3.200]",
         Cell("1.5 MiB", 1.5 * 2**20), Cell("–", math.nan)],
        ["beta", Cell("collapsed", tone="bad"), "12.000 [11.000, 13.000]", Cell("512 B", 512),
         Cell("-4.0%", -0.04)],
        ["gamma", Cell("imbalanced", tone="warn"), "–", Cell("3.0 KiB", 3072), Cell("50.0%", 0.5)],
        ["delta", "–", "-0.500 [-1.000, 0.000]", Cell("–", math.nan), Cell("7.0%", 0.07)],
    ],
    "With a note, and `code`.",
)  # fmt: skip
LONG_TABLE = Table(
    "Many rows",
    ["Layer", *(f"Head {head}" for head in range(12))],
    [
        [LONG if layer == 3 else f"layer {layer}", *(f"{layer + head / 10:.3f}" for head in range(12))]
        for layer in range(20)
    ],
)
PAGE = Page(
    "Runs & *more*",
    f"Measured on {LONG}",
    "One result in a sentence, with `code.of_a_setting=1`.",
    [
        Figures("Two plots", [
            Figure("Left", plot("left"), "A rising line.", "With a caption."),
            Figure("Right", plot("right"), "Another line."),
        ]),
        Figure("One plot", plot("one"), "A line alone.", "Its caption."),
        RUNS,
        LONG_TABLE,
        Cards("Run by run", [
            Details("alpha", "Next: nothing.", [Text("Inside", ["Words."]), RUNS],
                    [Badge("balanced", "good")]),
            Details("tones", "All of them.", [Terms("Words", [("a", "b")])], [Badge(t, t) for t in TONES]),
        ]),
        Terms("How to read", [("Reach", "how far windows relay.")]),
        Text("Notes", ["A paragraph.", LONG]),
    ],
)  # fmt: skip
