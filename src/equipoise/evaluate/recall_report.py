"""The page of a recall evaluation: curves over distance with the reach drawn, and two numbers a state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.evaluate.recall_results import (
    Group,
    Recall,
    as_data,
    beyond_all,
    bins_of,
    by_task,
    gain,
    marked,
    recall_of,
)
from equipoise.evaluate.recall_running import CONTROL, items_of
from equipoise.pages import Cell, Figure, Page, Section, Table, Text, number, percent, plotting, write_results

NAME = "recall"
CLOSE = 2.2
"""Labels of two reaches lie on one another where one is less than so many times the other."""

_STYLES: Mapping[str, tuple[str, str, str]] = {
    "softmax": (plotting.DONOR_COLOUR, ":", "softmax (the donor)"),
    "softmax_lora": (plotting.DONOR_COLOUR, "-.", "softmax with adapters"),
    "both": (plotting.BOTH, "-", "both branches"),
    "window_renormalised": (plotting.WINDOW, "-", "window alone"),
    "window": (plotting.WINDOW, "--", "window, literal"),
    "linear_renormalised": (plotting.LINEAR, "-", "linear alone"),
    "linear": (plotting.LINEAR, "--", "linear, literal"),
    "none": (plotting.NEUTRAL, "-", "no attention"),
    "sinks": (plotting.NEUTRAL, "--", "sinks alone"),
    CONTROL: (plotting.CONTROL, "-", "SWA + sinks, equal bytes"),
}
"""Colour, line and words of each state."""

HOW_TO_READ = (
    "An item is right if the greedy answer is its answer, token by token (`multivalue`: if it stands "
    "anywhere in what was generated).",
    "Distance, in tokens: from the predicting position (the last token of the question) to the last token of "
    "the answer where the text states it.",
    "Reach: how far stacked windows relay information, the sum over layers of (w - 1). Beyond it only linear "
    "attention can answer, or a sink. Within: the whole statement lies in reach. Items whose statement "
    "straddles the reach are in the curve but in neither number.",
    "Beyond every reach: the items that neither the model's windows nor those of the control can have "
    "relayed; the same items for all states, so these compare. The control is the untrained donor with a "
    "window and four sinks that take the same bytes.",
    "Literal: the other branch's term is zeroed. Alone: at weight 1 (renormalised).",
    "Intervals are 95% bootstraps over documents, of the mean over seeds; with several seeds the smallest "
    "and largest of them follow in parentheses.",
)


@dataclass(frozen=True)
class Described:
    """What the page says of the evaluation beside its figures.

    Attributes:
        settings: for the JSON: tasks, lengths, examples, seed and so on.
        data: the haystack in words.
        resamples: of the bootstrap.
    """

    settings: Mapping[str, Any]
    data: str
    resamples: int = 2000


def write_recall(
    groups: Sequence[Group], described: Described, directory: Path, *, extra: Sequence[Section] = ()
) -> dict[str, Path]:
    """Write `recall.json`, `recall.md` and `recall.html`; gives their paths by suffix.

    `extra` are sections of a caller that knows more, shown after the first table.
    """
    data = {"settings": dict(described.settings), "data": described.data,
            **as_data(groups, resamples=described.resamples)}  # fmt: skip
    return write_results(directory, NAME, recall_page(groups, described, extra=extra), data)


def recall_page(groups: Sequence[Group], described: Described, *, extra: Sequence[Section] = ()) -> Page:
    """The whole page."""
    examples = groups[0].examples
    tasks = list(dict.fromkeys(example.task for example in examples))
    lengths = sorted({example.length for example in examples})
    sections: list[Section] = [
        figure(group, salt=f"recall-{index}", resamples=described.resamples)
        for index, group in enumerate(groups)
    ]
    sections += [reach_table(groups, described.resamples), *extra, guess_table(groups)]
    sections += [task_table(groups, described.resamples), Text("How to read it", HOW_TO_READ)]
    return Page(
        title="Recall beyond reach",
        subtitle=(
            f"{', '.join(tasks)} at {', '.join(map(str, lengths))} tokens; {len(examples)} texts, "
            f"{len(items_of(examples))} answers; hidden in {described.data}."
        ),
        summary=" ".join(summary(group, described.resamples) for group in groups),
        sections=sections,
    )


def summary(group: Group, resamples: int = 2000) -> str:
    """One sentence: what the model recalls where windows cannot help, and who of the branches does it."""
    first = group.states[0] if "both" not in group.states else "both"
    far = beyond_all(group)
    own = marked(group.examples, group.sights[first].beyond)
    keep, where = (far, "every reach") if far.any() else (own, "its reach")
    if not keep.any():
        return (
            f"`{group.name}`: no answer lies beyond reach; nothing here tells windows from linear attention."
        )
    parts = [
        f"{_words(state)} {recall_of(group, state, keep, resamples=resamples).estimate.value:.0%}"
        for state in ("both", "window_renormalised", "linear_renormalised", CONTROL, "softmax")
        if state in group.states
    ]
    text = f"`{group.name}` beyond {where} ({int(keep.sum())} answers): {', '.join(parts)}."
    if "both" in group.states and CONTROL in group.states and far.any():
        more = gain(group, "both", CONTROL, far, resamples=resamples)
        text += f" Gain on window and sinks at equal bytes: {number(more, digits=2, signed=True)}."
    return text


def _words(state: str) -> str:
    return _STYLES[state][2]


# ---- the plot


def figure(group: Group, *, salt: str, resamples: int = 2000) -> Figure:
    """Accuracy against distance, a line per state, its seeds' spread, and the reach."""
    drawing, axes = plotting.canvas(3.8)
    parts = bins_of(group.examples)
    middles = [max(1.0, part.middle) for part in parts]
    for state in [s for s in _STYLES if s in group.states]:
        colour, line, words = _STYLES[state]
        found = [recall_of(group, state, part.keep, resamples=1) for part in parts]
        values = [recall.estimate.value for recall in found]
        axes.plot(middles, values, color=colour, linestyle=line, marker="o", markersize=3, linewidth=1.6,
                  label=words)  # fmt: skip
        if len(group.runs) > 1:
            low, high = zip(*(recall.spread for recall in found), strict=True)
            axes.fill_between(middles, low, high, color=colour, alpha=0.15, linewidth=0)
    drawn: dict[int, float] = {}
    for state in (s for s in ("both", "window", CONTROL) if s in group.states):
        reach = group.sights[state].reach
        if reach and reach not in drawn:
            # a label above the one that it would lie on
            drawn[reach] = 1.04 + 0.06 * any(max(reach, at) < CLOSE * min(reach, at) for at in drawn)
            control = state == CONTROL
            axes.axvline(reach, color=_STYLES[state][0], linestyle=(0, (4, 2)), linewidth=1.2)
            axes.annotate(f"{'control ' if control else ''}reach {reach}", (reach, drawn[reach]), ha="center",
                          fontsize=plotting.FONT - 2, color=plotting.INK, annotation_clip=False)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("distance to the answer, tokens", color=plotting.INK)
    axes.set_ylabel("answered rightly", color=plotting.INK)
    axes.legend(
        fontsize=plotting.FONT - 3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2
    )
    seeds = f", mean and spread of {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    described = "; ".join(
        f"{_words(s)} " + ", ".join(f"{v:.0%}" for v in _curve(group, s)) for s in group.states
    )
    distances = ", ".join(f"{part.low}-{part.high}" for part in parts)
    return Figure(
        title=f"{group.name}: recall against distance",
        svg=plotting.as_svg(drawing, salt=salt),
        description=f"Share answered rightly at distances {distances}: {described}.",
        note=f"Dashed verticals: the reach of the model's windows and of the control's{seeds}.",
    )


def _curve(group: Group, state: str) -> list[float]:
    return [
        recall_of(group, state, part.keep, resamples=1).estimate.value for part in bins_of(group.examples)
    ]


# ---- the tables


def reach_table(groups: Sequence[Group], resamples: int = 2000) -> Table:
    """Within reach, beyond reach, and beyond every reach: per model and state."""
    rows: list[list[Cell | str]] = []
    for group in groups:
        far = beyond_all(group)
        for state in group.states:
            seen = group.sights[state]
            kept = (marked(group.examples, seen.within), marked(group.examples, seen.beyond), far)
            cells = [_cell(recall_of(group, state, keep, resamples=resamples)) for keep in kept]
            limit = Cell("unlimited" if seen.reach is None else str(seen.reach),
                         math.inf if seen.reach is None else float(seen.reach))  # fmt: skip
            window = f" (window {seen.window})" if seen.window else ""
            rows.append([group.name, f"{_words(state)}{window}", limit, *cells])
    counts = "; ".join(
        f"{group.name}: {int(marked(group.examples, group.sights[group.states[0]].within).sum())} items "
        f"within the reach of {_words(group.states[0])}, {int(beyond_all(group).sum())} beyond every reach"
        for group in groups
    )
    return Table(
        "Within and beyond reach",
        ("model", "state", "reach", "within reach", "beyond reach", "beyond every reach"),
        rows,
        note=f"Share of answers that are right. {counts}.",
    )


def guess_table(groups: Sequence[Group]) -> Table:
    """What guessing would score, by design and as measured."""
    rows: list[list[Cell | str]] = []
    for group in groups:
        blind = float(np.mean([item.guess for _, item in items_of(group.examples)]))
        for state in group.states:
            answers = [run.answers[state] for run in group.runs]
            chance, confused = (
                float(np.mean(values))
                for values in ([a.by_chance for a in answers], [a.confused for a in answers])
            )
            cells = (_share(blind, precise=True), _share(chance), _share(confused))
            rows.append([group.name, _words(state), *cells])
    return Table(
        "Guessing",
        ("model", "state", "blind guess", "right for another text", "another key's answer"),
        rows,
        note=(
            "Blind guess: one over the number of possible answers. Right for another text: the same output "
            "graded against the answers of the next text, which nobody who reads only this one can know. "
            "Another key's answer: what stands in the text, but was not asked."
        ),
    )


def task_table(groups: Sequence[Group], resamples: int = 2000) -> Table:
    """Recall by task and length, all distances together."""
    rows: list[list[Cell | str]] = []
    for group in groups:
        kept = by_task(group.examples)
        for state in group.states:
            for (task, length), keep in kept.items():
                found = recall_of(group, state, keep, resamples=resamples)
                rows.append([group.name, _words(state), task, Cell(str(length), length), _cell(found)])
    return Table("By task and length", ("model", "state", "task", "length", "right"), rows,
                 note="All distances together.")  # fmt: skip


def _cell(found: Recall) -> Cell:
    text = percent(found.estimate)
    if len(found.seeds) > 1:
        low, high = found.spread
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return Cell(text, found.estimate.value)


def _share(value: float, *, precise: bool = False) -> Cell:
    tiny = precise and 0 < value < 0.001
    return Cell(f"{value:.0e}" if tiny else percent(value), value)
