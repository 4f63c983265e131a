"""An `AuditReport` as a page: the result in words, two plots, the runs, each run in full, how to read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from equipoise.audit.attribution import KEPT, UNTRAINED
from equipoise.audit.plots import MANY, attribution_chart, recovered_chart
from equipoise.audit.render import headline, run_labels, summary, verdict_words
from equipoise.pages import (
    UNDEFINED,
    Badge,
    Cards,
    Cell,
    Details,
    Figure,
    Figures,
    Page,
    Table,
    Terms,
    Text,
    bytes_in_words,
    number,
    percent,
)
from equipoise.statistics import Estimate

if TYPE_CHECKING:
    from equipoise.audit.report import AuditReport, Guards, RunAudit

STATES: Mapping[str, tuple[str, str]] = {
    "both": ("both branches", ""),
    "window_renormalised": ("window", "renormalised"),
    "window": ("window", "literal"),
    "linear_renormalised": ("linear", "renormalised"),
    "linear": ("linear", "literal"),
    UNTRAINED: ("linear, untrained maps", "renormalised"),
    "sinks": ("first 8 tokens only", ""),
    KEPT: ("what keeps a branch in every state", ""),
    "none": ("no attention", ""),
    "softmax_lora": ("the donor's softmax under this run's LoRA", ""),
}
"""What branch states are called on the page, and their reading; others keep their own name."""
_PARTS = {
    "window": "window, Shapley value",
    "linear": "linear, Shapley value",
    "interaction": "interaction",
    "window_alone": "window on its own, over neither",
    "window_given_linear": "window on top of the linear branch",
    "linear_alone": "linear on its own, over neither",
    "linear_given_window": "linear on top of the window",
    "linear_share": "linear share",
}


def audit_page(report: AuditReport) -> Page:
    """The report for people; every figure on it is in `to_dict(report)` too."""
    metric, count = report.metric, len(report.runs)
    return Page(
        title="Which branch does the work?",
        subtitle=(
            f"An audit of {count} conversion{'' if count == 1 else 's'} of {report.donor.name}, each branch "
            f"switched on and off on {metric.documents:,} documents ({metric.tokens:,} tokens, context "
            f"{metric.context_length:,}): {metric.data}"
        ),
        summary=summary(report),
        sections=[_plots(report), _runs(report), _run_by_run(report), _how_to_read(report)],
    )


def _plots(report: AuditReport) -> Figures:
    labels = run_labels(report)
    hatched = (
        "Hatched bars, the literal reading: the other branch's term is zero."
        if len(labels) < MANY
        else "With this many runs, the literal reading is shown run by run below."
    )
    return Figures(
        "What each branch does",
        [
            Figure(
                "What is left when a branch is switched off",
                recovered_chart(report, labels),
                "Recovered performance per branch state and run, with intervals.",
                "If the solid blue bar reaches the one above it while the solid orange bar stays near 0, the "
                f"window does the work alone. {hatched} Bars that leave the chart carry their value.",
            ),
            Figure(
                "Who earns what",
                attribution_chart(report, labels),
                "Shapley values of window and linear branch per run, with intervals.",
                "Blue and orange of one reading add up to the hybrid's whole advantage over no attention. "
                "Interaction (grey) left of 0: the branches know the same things; right of 0: they need each "
                "other.",
            ),
        ],
    )


def _runs(report: AuditReport) -> Table:
    rows: list[list[Cell | str]] = []
    for label, run in zip(run_labels(report), report.runs, strict=True):
        nll = run.states["both"]
        rows.append([
            label,
            Cell("", badges=_badges(run)),
            Cell(number(nll), nll.value),
            *(Cell(percent(value), value.value) for value in headline(run)),
        ])  # fmt: skip
    metric = report.metric
    return Table(
        "Runs",
        ["Run", "Verdict", "NLL, both", "Recovered, both", "Window alone", "Linear alone", "Linear share"],
        rows,
        f"NLL in nats per token; the donor's is {number(report.donor.nll)}. Recovered: 0% is no attention, "
        "100% the donor. Alone: the branch answers at weight 1 (renormalised). Linear share: of the Shapley "
        f"values, renormalised. Brackets: 95% intervals from {metric.bootstrap_resamples:,} bootstrap "
        "resamples of documents, paired across states.",
    )


def _run_by_run(report: AuditReport) -> Cards:
    runs = zip(run_labels(report), report.runs, strict=True)
    return Cards("Run by run: what to do next", [_details(report, label, run) for label, run in runs])


def _details(report: AuditReport, label: str, run: RunAudit) -> Details:
    return Details(
        title=label,
        lead=f"Next: {run.verdict.advice}",
        badges=_badges(run),
        more="Why, what it costs, and every state",
        sections=[
            Text("Why", [run.verdict.reason]),
            Text("What it costs", [_costs(run)]),
            _states(report, run),
            _attribution(run),
        ],
        is_open=len(report.runs) == 1,
    )


def _badges(run: RunAudit) -> list[Badge]:
    return [Badge(words, tone) for words, tone in verdict_words(run)]


def _costs(run: RunAudit) -> str:
    facts = run.facts
    reach = "unlimited" if facts.reach is None else f"{facts.reach:,} tokens"
    cost = f"{facts.train_tokens:,} tokens, {facts.train_seconds:,.0f} s" if facts.train_tokens else "none"
    kinds = (
        ("converted", facts.layers.converted),
        ("local", facts.layers.local),
        ("softmax", facts.layers.softmax),
    )
    layers = ", ".join(f"{len(numbers)} {kind}" for kind, numbers in kinds)
    return (
        f"Decode state {bytes_in_words(facts.state_bytes)} per sequence; reach {reach}; layers: {layers}; "
        f"training: {cost}.{_guards(facts.guards)}"
    )


def _guards(guards: Guards | None) -> str:
    """What the numerical guards counted, in a sentence."""
    if guards is None:
        return ""
    where = "" if not guards.layers else f", in layers {', '.join(map(str, guards.layers))}"
    return (
        f" Numerical guards over {guards.windows} windows: {guards.features:,} features past the dtype, "
        f"{guards.denominators:,} vanishing denominators, {guards.state:.2%} of the last keys' mass lost to "
        f"rounding{where}."
    )


def _states(report: AuditReport, run: RunAudit) -> Table:
    """Every state in both readings, the donor, the control and the references."""
    control = run.control
    others = [name for name in run.states if name not in STATES]
    if control is not None:
        others = [name for name in others if name != control.setting.state]
    rows = [_state("donor", "", report.donor.nll, Estimate(1.0, (math.nan, math.nan)))]
    for name in (*(name for name in STATES if name in run.states), *others):
        what, reading = STATES.get(name, (name, ""))
        rows.append(_state(what, reading, run.states[name], run.recovered[name]))
    if control is not None:
        size = f"{control.setting.window:,} + {control.setting.sinks} sinks"
        what = f"untrained window {size} ({bytes_in_words(control.setting.state_bytes)})"
        rows.append(_state(what, "", control.nll, control.recovered, control.difference))
    for other in run.references:
        what = f"softmax, {other.name} ({other.train_tokens:,} tokens)"
        rows.append(_state(what, "", other.nll, other.recovered, other.difference))
    return Table(
        "Every state",
        ["State", "Reading", "NLL", "Recovered", "Hybrid's lead"],
        rows,
        "NLL and lead in nats per token; a positive lead means that the hybrid is better, on this text.",
    )


def _state(
    what: str, reading: str, nll: Estimate, recovered: Estimate, lead: Estimate | None = None
) -> list[Cell | str]:
    ahead = UNDEFINED if lead is None else _nats(lead, signed=True)
    return [what, reading or UNDEFINED, _nats(nll), _share(recovered), ahead]


def _attribution(run: RunAudit) -> Table:
    rows: list[list[Cell | str]] = []
    for part, words in _PARTS.items():
        values = [getattr(run.attribution[reading], part) for reading in ("renormalised", "literal")]
        share = part == "linear_share"
        rows.append([words, *(_share(value) if share else _nats(value, signed=True) for value in values)])
    return Table(
        "Who earns what",
        ["Part", "Renormalised", "Literal"],
        rows,
        "Nats per token, but for the share. A Shapley value is the mean of what a branch earns on its own "
        "and of what it adds to the other.",
    )


def _nats(value: Estimate, *, signed: bool = False) -> Cell:
    return Cell(number(value, signed=signed), value.value)


def _share(value: Estimate) -> Cell:
    return Cell(percent(value), value.value)


def _how_to_read(report: AuditReport) -> Terms:
    limits = report.thresholds
    text = _HOW_TO_READ.format(
        tolerance=f"{limits.window_tolerance:.1%}",
        dead=f"{limits.dead_linear:.0%}",
        alone=f"{limits.stands_alone:.0%}",
        margin=f"{limits.benefit_margin:g} {report.metric.unit}",
    )
    entries = [paragraph.partition("\n") for paragraph in text.strip().split("\n\n")]
    return Terms("How to read this", [(term, " ".join(words.split())) for term, _, words in entries])


_HOW_TO_READ = """
Branches and states
A converted layer adds a sliding window of exact attention and a linear branch with a fixed-size state. A
state is the model with some of this switched off. None switches off all attention; the donor is the
original model.

What keeps a branch in every state
Layers and heads with a window alone keep it while others are ablated, and so do layers whose linear branch is
a mean of the past, which cannot stand alone. Where there are such, verdict and shares start from what they do
by themselves, with neither branch anywhere else; means of the past count with the linear branch.

Literal and renormalised
Literal zeroes one branch's term and leaves the other at the weight it has in the hybrid. Renormalised lets
the surviving branch answer alone, at weight 1. Failing alone is no proof of being unused, and standing
alone is no proof of being used, so both are shown. “Alone” without a word means renormalised.

Linear share and interaction
The Shapley value of a branch averages what it adds to nothing and what it adds to the other branch. The
linear share is its part of the sum; where a branch does harm the share leaves 0–100%. Interaction is what
the two do together beyond what they do apart.

What decides a verdict
On the recovered scale: two states within {tolerance} do equally well; a linear branch that recovers no more
than {dead} alone, or above its own untrained maps, is dead; a branch that recovers {alone} alone stands on
its own. An interval decides; a point estimate does only where it lies far from the threshold, and the
reason then says so.

Collapsed
The window alone does as well as both, and the linear branch alone is dead.

Balanced
Each branch stands alone, and removing either costs something.

Redundant
Either alone does as well as both.

Imbalanced
Everything else that is settled, among it a linear branch that is used but cannot stand alone.

Inconclusive
The intervals straddle a threshold.

Reach, and why a benefit can be untested
Windows in stacked layers can relay information over a distance called reach. Only answers that lie further
back must come from the linear branch. The benefit is therefore judged on items beyond the reach of the
hybrid and of an untrained window with sinks that uses as many bytes. Without such items, or where that
window covers the whole context, the benefit is untested: a balanced hybrid may still not be worth its
conversion. An advantage below {margin} counts as none.

Sources
Method: arXiv 2510.05901. Attribution: Shapley, 1953.
"""
