"""Attribution in depth for people: the page behind `attribution.html` and `attribution.md`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from equipoise.audit.depth import Effect, LayerShapley, RandomControl
from equipoise.audit.depth_plots import heat_map, shapley_chart
from equipoise.audit.depth_report import DepthReport
from equipoise.audit.depth_units import BRANCH_NAMES, BranchName
from equipoise.audit.measures import Measure
from equipoise.ops.types import Reading
from equipoise.pages import UNDEFINED, Cell, Figure, Figures, Page, Section, Table, Terms, Text, number
from equipoise.statistics import Estimate

_BRANCH_WORDS: dict[BranchName, str] = {"window": "the window", "linear": "the linear branch"}
_GAMES = {
    "window": "window in each layer, linear branch everywhere",
    "linear": "linear branch in each layer, window everywhere",
    "all": "both branches of each layer",
}


def depth_page(report: DepthReport) -> Page:
    """The page: plots first, then tables, then how to read them."""
    depth = report.depth
    sections: list[Section] = [
        *_shapley_figures(report), *_head_figures(report), *_measure_figures(report), _states(report),
        *_controls(report), _layers(report), _shapley_table(report),
    ]  # fmt: skip
    if report.missing is not None:
        sections.append(Text("Not measured", [f"The donor's own attention: {report.missing}"]))
    return Page(
        title="Where do the branches work?",
        subtitle=(
            f"{report.model}, taken apart in {depth.evaluations:,} sets of branches; "
            f"{depth.settings.metric} on {depth.documents:,} documents: {report.data}"
        ),
        summary=summary(report),
        sections=[*sections, _how_to_read(report)],
    )


def summary(report: DepthReport) -> str:
    """The result in a few sentences: what each branch is worth, and whether random layers are worth more."""
    unit = report.depth.settings.unit
    sentences = [_dearest(report, branch) for branch in BRANCH_NAMES]
    sentences += [
        control_sentence(control, unit)
        for control in report.depth.control
        if control.branch == "linear" and control.answer is not None
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def control_sentence(control: RandomControl, unit: str) -> str:
    """Whether removing a branch costs more or less than removing random pieces."""
    what = f"Removing {_BRANCH_WORDS[control.branch]} everywhere ({control.reading})"
    if control.excess is None:
        return f"{what} cannot be compared with random layers: there are no other sets of as many."
    draws = control.draws
    drawn = (
        f"{control.removed} random of {control.units} branches costs {sum(draws) / len(draws):.3f} "
        f"({min(draws):.3f} to {max(draws):.3f} over {len(draws)} draws)"
    )
    words = {"more": "more", "less": "less", "no clear difference": "neither clearly more nor less"}
    return (
        f"{what} costs {number(control.cost)} {unit}, {words[control.answer or 'no clear difference']} than "
        f"removing random ones: {drawn}."
    )


def _dearest(report: DepthReport, branch: BranchName) -> str:
    """The layer where one branch is missed most, in the renormalised reading if it was taken."""
    mine = [effect for effect in report.depth.layers if effect.unit.branch == branch]
    reading = _main_reading([effect.reading for effect in mine])
    mine = [effect for effect in mine if effect.reading == reading]
    if not mine:
        return f"There is no {branch} branch."
    top = max(mine, key=lambda effect: effect.cost.value)
    ablated = f"Ablated in one layer ({reading}), {_BRANCH_WORDS[branch]} is"
    where = f"layer {top.unit.layer}: {number(top.cost)} {report.depth.settings.unit}"
    if not top.cost.ci95[0] > 0:
        return f"{ablated} clearly missed in none; most in {where}."
    return f"{ablated} missed most in {where}."


def _main_reading(readings: Sequence[Reading]) -> Reading:
    return "renormalised" if "renormalised" in readings or not readings else readings[0]


def _shapley_figures(report: DepthReport) -> list[Section]:
    depth, figures = report.depth, list[Figure]()
    for reading in depth.settings.readings:
        for games, title in (
            (
                [g for g in depth.shapley if g.reading == reading and g.game != "all"],
                "each branch's own game",
            ),
            ([g for g in depth.shapley if g.reading == reading and g.game == "all"], "both branches play"),
        ):
            if games:
                figures.append(
                    Figure(
                        f"Who earns what, by layer ({reading}; {title})",
                        shapley_chart(games, unit=depth.settings.unit, salt=f"shapley-{reading}-{title}"),
                        f"Shapley values of the layers, {reading}, with intervals.",
                        " ".join(_sampling(game) for game in games),
                    )
                )
    return [Figures("Layers", figures)] if figures else []


def _sampling(game: LayerShapley) -> str:
    """How the values were found, and how well."""
    if game.stopped_by == "exact":
        return f"{game.game}: exact, from {game.evaluations} sets."
    doubt = "" if game.trusted else " Too few pairs to trust that error: raise the budget."
    return (
        f"{game.game}: {game.pairs} pairs of permutations ({game.evaluations} sets), largest standard error "
        f"{max(game.standard_errors):.4f}, stopped by {game.stopped_by} (wanted: "
        f"{game.tolerance:.4f}).{doubt}"
    )


def _head_figures(report: DepthReport) -> list[Section]:
    depth = report.depth
    sections: list[Section] = []
    for reading in depth.settings.readings:
        figures: list[Figure] = []
        for branch in BRANCH_NAMES:
            mine = [e for e in depth.heads if e.reading == reading and e.unit.branch == branch]
            if not mine:
                continue
            words = _BRANCH_WORDS[branch]
            figures += [
                _effects_map(
                    mine, [effect.cost for effect in mine], report, f"Cost of ablating {words} in one head",
                    "orange: the hybrid is worse without it; purple: better",
                ),
                _effects_map(
                    mine, [effect.gain for effect in mine], report, f"Gain of restoring {words} in one head",
                    f"all other heads run without {words}; orange: it helps",
                ),
            ]  # fmt: skip
        if figures:
            sections.append(Figures(f"Head by head, {reading}", figures))
    return sections


def _effects_map(
    effects: Sequence[Effect], values: Sequence[Estimate], report: DepthReport, title: str, note: str
) -> Figure:
    layers = sorted({effect.unit.layer for effect in effects})
    grid = [
        [value.value for effect, value in zip(effects, values, strict=True) if effect.unit.layer == layer]
        for layer in layers
    ]
    top = max(range(len(values)), key=lambda index: values[index].value)
    piece = effects[top].unit
    return Figure(
        title,
        heat_map(
            _rectangular(grid), layers, unit=report.depth.settings.unit, signed=True,
            salt=f"{title}-{effects[0].reading}",
        ),
        f"{title}, {effects[0].reading}, layers by heads. The largest is layer {piece.layer}, head "
        f"{piece.head}: {number(values[top])} {report.depth.settings.unit}.",
        f"{report.depth.settings.unit}; {note}.",
    )  # fmt: skip


def _rectangular(grid: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rows of equal length; layers with fewer heads are filled up with NaN."""
    longest = max(len(row) for row in grid)
    return [[*row, *[math.nan] * (longest - len(row))] for row in grid]


def _measure_figures(report: DepthReport) -> list[Section]:
    figures = [_measure_figure(measure) for measure in report.measures]
    return [Figures("What attention looks like inside", figures)] if figures else []


def _measure_figure(measure: Measure) -> Figure:
    grid = [[value.value for value in row] for row in measure.values]
    known = [value for row in grid for value in row if math.isfinite(value)]
    spread = f"{min(known):.3g} to {max(known):.3g} {measure.kind.unit}" if known else "undefined"
    return Figure(
        measure.kind.title,
        heat_map(_rectangular(grid), measure.layers, unit=measure.kind.unit, signed=False, salt=measure.name),
        f"{measure.kind.title}, layers by heads: {spread}.",
        measure.kind.meaning,
    )


def _states(report: DepthReport) -> Table:
    return Table(
        "What it is taken apart from",
        ["State", f"Score, {report.depth.settings.unit}"],
        [[name, _cell(value)] for name, value in report.depth.states.items()],
        "Higher is better; for nll the score is the log-likelihood. Brackets: 95% intervals over documents.",
    )


def _controls(report: DepthReport) -> list[Section]:
    if not report.depth.control:
        return []
    rows: list[list[Cell | str]] = []
    for control in report.depth.control:
        draws = control.draws
        mean = sum(draws) / len(draws) if draws else math.nan
        spread = f"{mean:.3f} ({min(draws):.3f} to {max(draws):.3f})" if draws else UNDEFINED
        rows.append([
            f"{control.branch}, {control.reading}", _cell(control.cost), Cell(spread, mean), str(len(draws)),
            UNDEFINED if control.excess is None else _cell(control.excess), control.answer or UNDEFINED,
        ])  # fmt: skip
    return [
        Table(
            "Is it this branch, or any so many?",
            ["Removed everywhere", "Cost", "As many at random", "Draws", "Excess", "Costs"],
            rows,
            f"Cost in {report.depth.settings.unit}. A random set holds as many branches of layers, of either "
            "kind; mean (lowest to highest). Excess: cost less that mean, with the draws' own error in its "
            "interval, which decides the last column.",
        )
    ]


def _layers(report: DepthReport) -> Table:
    rows: list[list[Cell | str]] = [
        [
            Cell(f"layer {effect.unit.layer}", effect.unit.layer), effect.unit.branch, effect.reading,
            _cell(effect.cost), _cell(effect.gain),
        ]
        for effect in report.depth.layers
    ]  # fmt: skip
    return Table(
        "Every layer",
        ["Layer", "Branch", "Reading", "Cost, ablated here", "Gain, restored here alone"],
        rows,
        f"In {report.depth.settings.unit}; brackets: 95% intervals over documents.",
    )


def _shapley_table(report: DepthReport) -> Table:
    rows: list[list[Cell | str]] = []
    for game in report.depth.shapley:
        name = f"{game.game}, {game.reading}"
        for player, value, error in zip(game.players, game.values, game.standard_errors, strict=True):
            place = f"{player.branch}, layer {player.layer}"
            rows.append([name, Cell(place, player.layer), _cell(value), Cell(f"{error:.4f}", error)])
        rows.append([name, "sum", _cell(game.total), UNDEFINED])
    return Table(
        "Shapley values",
        ["Game", "Player", "Value", "Standard error of sampling"],
        rows,
        f"In {report.depth.settings.unit}. Players: "
        + "; ".join(f"{game}: {words}" for game, words in _GAMES.items())
        + ". Intervals hold documents and permutations; the sum is v(both) less v(no player).",
    )


def _cell(value: Estimate) -> Cell:
    return Cell(number(value, digits=4), value.value)


def _how_to_read(report: DepthReport) -> Terms:
    settings = report.depth.settings
    return Terms(
        "How to read this",
        [
            (
                "Ablated and restored",
                "Ablated: one branch of one place is switched off in the whole hybrid; what is lost is its "
                "cost. Restored: that branch is off everywhere but there; what is won is its gain. A large "
                "gain without a cost means that others can stand in for it, a cost without a gain that it "
                "works with others only.",
            ),
            (
                "Literal and renormalised",
                "Literal zeroes the ablated branch's term and leaves the other at its weight in the hybrid. "
                "Renormalised lets the other attend alone, at weight 1, in that place.",
            ),
            (
                "Shapley value",
                "A layer's mean contribution over all orders in which the layers can join. The other branch "
                "runs everywhere, unless both branches play: where either branch alone does all the work, "
                "its own game is worth nothing, and only the game of both shows the two halves.",
            ),
            (
                "Sampling",
                "Permutations are drawn in pairs, one and its reverse. Sampling stops when the standard "
                f"error of every value is at most {settings.tolerance:.1%} of what both branches are worth, "
                f"or after {settings.budget:,} sets; games small enough for that are exact.",
            ),
            (
                "Sources",
                "Method: arXiv 2510.05901. Shapley 1953; Castro et al. 2009; Mitchell et al. 2022, arXiv "
                "2104.12199.",
            ),
        ],
    )
