"""An `AuditReport` in words: names of runs, verdicts, a summary, and a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from equipoise.pages import UNDEFINED, Tone, percent
from equipoise.statistics import Estimate

if TYPE_CHECKING:
    from rich.table import Table

    from equipoise.audit.report import AuditReport, RunAudit

# One-branch models have no other branch to report on; its states would only repeat `none`.
_LACKS = {"window_only": "linear", "linear_only": "window"}
_USE_IN_WORDS = {
    "balanced": "both branches carry the work",
    "redundant": "either branch alone would do",
    "imbalanced": "the branches are out of balance",
    "collapsed": "the window does all the work and the linear branch is dead weight",
    "window_only": "there is only a window",
    "linear_only": "only the linear branch does any work",
    "inconclusive": "the evidence does not settle which branch does the work",
}
_BENEFIT_IN_WORDS = {
    "beneficial": "Beyond reach, the hybrid beats an untrained window of equal bytes in",
    "not_beneficial": "Beyond reach, the hybrid does not beat an untrained window of equal bytes in",
    "inconclusive": "Whether the hybrid beats an untrained window of equal bytes stays open in",
}
_USE_STYLES = {"balanced": "green", "redundant": "cyan", "imbalanced": "yellow", "collapsed": "red"}
_USE_TONES: dict[str, Tone] = {
    "balanced": "good",
    "redundant": "fair",
    "imbalanced": "warn",
    "collapsed": "bad",
}
_BENEFIT_TONES: dict[str, Tone] = {"beneficial": "good", "not_beneficial": "bad"}


def console_table(report: AuditReport) -> Table:
    """One row per run, for a terminal of 100 columns; recovered performance in percent of the donor."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"Which branch does the work? Donor: {report.donor.name}"), title_justify="left")
    table.add_column("run", overflow="fold", min_width=12, max_width=24)
    for title in ("NLL", "both", "window\nalone", "linear\nalone", "linear\nshare"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", min_width=12)
    for label, run in zip(run_labels(report), report.runs, strict=True):
        (use, _), (benefit, _) = verdict_words(run)
        verdict = Text(use, style=_USE_STYLES.get(run.verdict.use, ""))
        cells = [
            f"{run.states['both'].value:.3f}",
            *(percent(value, interval=False) for value in headline(run)),
        ]
        table.add_row(Text(label), *cells, Text("\n").join([verdict, Text(benefit, style="dim")]))
    for reference in report.runs[0].references:
        shares = [percent(reference.recovered, interval=False), UNDEFINED, UNDEFINED, UNDEFINED]
        table.add_row(Text(reference.name), f"{reference.nll.value:.3f}", *shares, Text("stays softmax"))
    table.caption = (
        "Recovered: 0% no attention, 100% donor. Alone: at weight 1 (renormalised).\n"
        f"Donor NLL {report.donor.nll.value:.3f}; {report.metric.documents} documents, "
        f"{report.metric.tokens:,} tokens."
    )
    table.caption_justify = "left"
    return table


def run_labels(report: AuditReport) -> list[str]:
    """A name per run: the recipe, and the seed where a recipe was run with several."""
    recipes = [run.recipe for run in report.runs]
    return [
        f"{run.recipe} (seed {run.seed})" if recipes.count(run.recipe) > 1 else run.recipe
        for run in report.runs
    ]


def verdict_words(run: RunAudit) -> tuple[tuple[str, Tone], tuple[str, Tone]]:
    """Use and benefit, each in words with its tone."""
    use, benefit = run.verdict.use, run.verdict.benefit
    unclear = {"inconclusive": "benefit unclear"}
    return (
        (use.replace("_", " "), _USE_TONES.get(use, "plain")),
        (unclear.get(benefit, benefit.replace("_", " ")), _BENEFIT_TONES.get(benefit, "plain")),
    )


def headline(run: RunAudit) -> list[Estimate]:
    """Recovered by both, window alone, linear alone; linear share. Undefined for an absent branch."""
    lacks = _LACKS.get(run.verdict.use)
    if lacks == "window" and run.recovered["window_renormalised"].value != 0:
        lacks = None  # a window that is there and does nothing has figures of its own
    nothing = Estimate(math.nan, (math.nan, math.nan))
    return [
        run.recovered["both"],
        nothing if lacks == "window" else run.recovered["window_renormalised"],
        nothing if lacks == "linear" else run.recovered["linear_renormalised"],
        nothing if lacks else run.attribution["renormalised"].linear_share,
    ]


def summary(report: AuditReport) -> str:
    """The result in one paragraph of plain words."""
    groups = {
        words: [run for run in report.runs if run.verdict.use == use] for use, words in _USE_IN_WORDS.items()
    }
    uses = [f"In {_named(runs, report)}, {words}." for words, runs in groups.items() if runs]
    return " ".join([*uses, _best(report), _benefits(report)])


def _best(report: AuditReport) -> str:
    nll, label, run = min(
        zip((run.states["both"].value for run in report.runs), run_labels(report), report.runs, strict=True),
        key=lambda entry: entry[0],
    )
    recovered = percent(run.recovered["both"], interval=False)
    known = f"{nll:.3f} nats per token, {recovered} of the donor."
    return (
        f"It scores {known}" if len(report.runs) == 1 else f"The best likelihood is that of {label}: {known}"
    )


def _benefits(report: AuditReport) -> str:
    judged = {
        words: [run for run in report.runs if run.verdict.benefit == benefit]
        for benefit, words in _BENEFIT_IN_WORDS.items()
    }
    return " ".join(f"{words} {_named(runs, report)}." for words, runs in judged.items() if runs) or (
        "Whether a linear branch is worth having, against an untrained window of equal bytes, was not tested "
        "here."
    )


def _named(runs: Sequence[RunAudit], report: AuditReport) -> str:
    """`lolcats (seeds 0 and 2) and ssd`: recipes, with seeds where a recipe has other runs than these."""
    names: list[str] = []
    for recipe in dict.fromkeys(run.recipe for run in runs):
        here = [str(run.seed) for run in runs if run.recipe == recipe]
        every = sum(run.recipe == recipe for run in report.runs)
        if every == 1:
            names.append(recipe)
        elif len(here) == every:
            names.append(f"{recipe} (all {every} seeds)")
        else:
            names.append(f"{recipe} (seed{'' if len(here) == 1 else 's'} {_listed(here)})")
    return _listed(names)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
