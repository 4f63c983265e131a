"""A benchmark run as data for machines and as a page for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from equipoise.evaluate.benchmarks import BenchmarkTable, Column, Row
from equipoise.evaluate.entries import TaskFacts
from equipoise.evaluate.scores import FORMAT, StateScores
from equipoise.evaluate.states import DONOR, BranchState
from equipoise.pages import Cell, Figure, Page, Table, Text, percent
from equipoise.statistics import Estimate


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """A finished run.

    Attributes:
        model: as it was named.
        states: rows, in order.
        scores: by the state's name.
        facts: by task.
        table: what they come to.
        settings: everything else that was asked for, and versions.
    """

    model: str
    states: tuple[BranchState, ...]
    scores: Mapping[str, StateScores]
    facts: Mapping[str, TaskFacts]
    table: BenchmarkTable
    settings: Mapping[str, Any]

    @property
    def tasks(self) -> list[Column]:
        """Columns of single tasks."""
        return [column for column in self.table.columns if not column.is_group]

    @property
    def groups(self) -> list[Column]:
        """Columns of groups, shown on their own after the average."""
        return [column for column in self.table.columns if column.is_group]

    @property
    def averages(self) -> bool:
        """Whether there is more than one column to average."""
        return len(self.table.columns) > 1

    @property
    def recovers(self) -> bool:
        """Whether the donor is among the rows."""
        return DONOR in self.scores


# ---- data


def to_data(run: BenchmarkRun) -> dict[str, Any]:
    """The JSON of a run."""
    table = run.table
    return {
        "format": FORMAT,
        "model": run.model,
        "settings": dict(run.settings),
        "tasks": {name: asdict(facts) for name, facts in run.facts.items()},
        "columns": [
            {**asdict(c), "metric": c.metric, "chance": table.chance[c.label]} for c in table.columns
        ],
        "average_chance": table.average_chance,
        "states": {state.name: _state_data(run, state) for state in run.states},
    }


def _state_data(run: BenchmarkRun, state: BranchState) -> dict[str, Any]:
    row, scores = run.table.rows[state.name], run.scores[state.name]
    return {
        "state": state.state,
        "reading": state.reading,
        "seconds": scores.seconds,
        "scores": {label: asdict(score) for label, score in row.scores.items()},
        **{
            name: None if (value := getattr(row, name)) is None else asdict(value)
            for name in ("average", "recovered", "recovered_above_chance", "below_donor", "below_both")
        },
        "reported": {task: dict(known.reported) for task, known in scores.tasks.items()},
        "notes": list(scores.notes),
    }


# ---- words


def label(state: str) -> str:
    """A row's name for people."""
    return "softmax (donor)" if state == DONOR else state


def summary(run: BenchmarkRun) -> str:
    """The result in a sentence or two."""
    rows, what = run.table.rows, "average" if run.averages else f"score on {run.table.columns[0].label}"
    if not run.recovers or len(rows) == 1:
        best, chance = next(iter(run.states)).name, percent(run.table.average_chance)
        return f"`{label(best)}`: {what} {percent(rows[best].average)}; guessing scores {chance}."
    named = [
        name
        for name in ("both", "window", "window_renormalised", "linear", "linear_renormalised", "none")
        if name in rows
    ]
    parts = [
        f"`{name}` {percent(_known(rows[name].recovered))}"
        for name in named or [s for s in rows if s != DONOR]
    ]
    donor = percent(rows[DONOR].average, interval=False)
    text = f"Recovered of the donor's {what} of {donor}: {', '.join(parts)}."
    loss = rows["window"].below_both if "window" in rows else None
    if loss is not None and "both" in rows:
        text += f" Taking the linear branch away changes it by {_points(-loss)} points."
    return text


def _known(value: Estimate | None) -> Estimate | float:
    return float("nan") if value is None else value


def _points(value: Estimate) -> str:
    """`+0.9 [-0.2, +2.0]`, in percentage points."""
    low, point, high = (100 * part + 0.0 for part in (value.ci95[0], value.value, value.ci95[1]))  # no -0.0
    return f"{point:+.1f} [{low:+.1f}, {high:+.1f}]" if value.defined else f"{point:+.1f}"


# ---- the page


def to_page(run: BenchmarkRun) -> Page:
    """The page of a run: the plot, the paper's Table 1, differences, tasks, how to read it."""
    limit = run.settings.get("limit")
    documents = sum(facts.documents for facts in run.facts.values())
    about = f"{run.model}; {len(run.facts)} tasks, {documents:,} documents"
    sections: list[Figure | Table | Text] = [averages_figure(run), score_section(run)]
    if len(run.states) > 1:
        sections.append(difference_section(run))
    notes = list(
        dict.fromkeys(f"{name}: {note}" for name, known in run.scores.items() for note in known.notes)
    )
    sections += [task_section(run), Text("How to read this", _reading(run))]
    if notes:
        sections.append(Text("What lm-eval warned of", notes))
    return Page(
        title="Benchmarks by branch state",
        subtitle=about + (f" (at most {limit} of each task)" if limit else ""),
        summary=summary(run),
        sections=sections,
    )


def _cell(value: Estimate | float | None) -> Cell:
    known = float("nan") if value is None else value
    return Cell(percent(known), known.value if isinstance(known, Estimate) else known)


def headings(run: BenchmarkRun) -> list[str]:
    """Columns of the table of scores."""
    shown = [column.label for column in run.tasks]
    shown += ["average"] if run.averages else []
    shown += [column.label for column in run.groups]
    return shown + (["recovered", "above chance"] if run.recovers else [])


def score_cells(run: BenchmarkRun, row: Row) -> list[Estimate | None]:
    """A row's values, in the order of `headings`."""
    values: list[Estimate | None] = [row.scores[column.label] for column in run.tasks]
    values += [row.average] if run.averages else []
    values += [row.scores[column.label] for column in run.groups]
    return values + ([row.recovered, row.recovered_above_chance] if run.recovers else [])


def score_section(run: BenchmarkRun) -> Table:
    """The paper's Table 1, and a row for guessing."""
    table = run.table
    rows: list[list[Cell | str]] = [
        [label(state.name), *map(_cell, score_cells(run, table.rows[state.name]))] for state in run.states
    ]
    guesses = [table.chance[column.label] for column in run.tasks]
    guesses += [table.average_chance] if run.averages else []
    guesses += [table.chance[column.label] for column in run.groups]
    rows.append(["guessing", *map(_cell, guesses), *([Cell("–", float("nan"))] * (2 if run.recovers else 0))])
    counted = len({column.entry for column in table.columns})
    return Table(
        "Scores",
        ["branch state", *headings(run)],
        rows,
        f"The average counts each of the {counted} tasks and groups once. Recovered: average over the "
        "donor's; above chance: the same with what guessing scores subtracted from both. "
        "In brackets 95% intervals. A dash: undefined, since the donor does not beat guessing there.",
    )


def difference_section(run: BenchmarkRun) -> Table:
    """What each state loses, paired."""
    rows = run.table.rows
    shown = [("below_donor", "below donor"), ("below_both", "below both")]
    shown = [(name, words) for name, words in shown if getattr(next(iter(rows.values())), name) is not None]
    body: list[list[Cell | str]] = [
        [label(name), *(_difference(getattr(row, part)) for part, _ in shown)] for name, row in rows.items()
    ]
    return Table(
        "Differences of the average",
        ["branch state", *(words for _, words in shown)],
        body,
        "In percentage points: donor, or hybrid, minus the state; paired by document. A difference whose "
        "interval holds zero is not established.",
    )


def _difference(value: Estimate) -> Cell:
    return Cell(_points(value), value.value)


def task_section(run: BenchmarkRun) -> Table:
    """What was run."""
    shown = {task: metric for column in run.table.columns for task, metric in column.parts}
    rows: list[list[Cell | str]] = [
        [
            name,
            shown.get(name, "–").removesuffix(",none"),
            Cell(f"{facts.documents:,} of {facts.of:,}", float(facts.documents)),
            Cell(str(facts.num_fewshot), float(facts.num_fewshot)),
            facts.version,
            facts.output_type,
            facts.dataset or "made by the task",
        ]
        for name, facts in run.facts.items()
    ]
    columns = ["task", "metric", "documents", "examples in prompt", "version", "type", "data"]
    return Table("Tasks", columns, rows, f"lm-eval {run.settings.get('lm_eval')}.")


def _reading(run: BenchmarkRun) -> Sequence[str]:
    return (
        "`both` is the hybrid. `window` and `linear` run one branch with the other's term zeroed; with "
        "`_renormalised` the survivor attends alone, at weight 1. `none` has no attention at all, "
        "`sinks` attends to the first eight tokens, and `softmax` is the donor: the original "
        "attention, without adapters.",
        "Intervals are percentile bootstraps over documents, the same documents for every state; averages "
        f"resample within each task ({run.settings.get('resamples'):,} resamples).",
        "Guessing is one over the number of options in multiple choice, and 0 where an answer is generated.",
    )


def averages_figure(run: BenchmarkRun) -> Figure:
    """Averages with their intervals; the donor and guessing as lines."""
    from equipoise.pages.plotting import (
        BOTH,
        CONTROL,
        FONT,
        INK,
        LINEAR,
        NEUTRAL,
        WINDOW,
        as_svg,
        canvas,
        printable,
    )

    names = [state.name for state in run.states]
    figure, axes = canvas(0.9 + 0.3 * len(names))
    colours = {"both": BOTH, "window": WINDOW, "linear": LINEAR, DONOR: INK, "softmax_lora": CONTROL}
    for place, name in enumerate(names):
        average = run.table.rows[name].average
        colour = colours.get(name.partition("_")[0] if name not in colours else name, NEUTRAL)
        if average.defined:
            axes.plot([100 * bound for bound in average.ci95], [place, place], color=colour, linewidth=2)
        axes.plot([100 * average.value], [place], "o", color=colour, markersize=6)
    axes.axvline(100 * run.table.average_chance, color=NEUTRAL, linestyle=":", linewidth=1.4)
    if run.recovers:
        axes.axvline(100 * run.table.rows[DONOR].average.value, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_yticks(range(len(names)), [printable(label(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    what = "average" if run.averages else printable(run.table.columns[0].label)
    axes.set_xlabel(f"{what}, % (dotted: guessing{'; dashed: donor' if run.recovers else ''})", fontsize=FONT)
    described = "; ".join(f"{label(n)} {percent(run.table.rows[n].average)}" for n in names)
    return Figure("Score of each branch state", as_svg(figure, salt="benchmarks"), described)
