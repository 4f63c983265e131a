"""An `AuditReport` for people: Markdown, one self-contained HTML file, and a table for the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equipoise.audit.plots import attribution_chart, recovered_chart
from equipoise.statistics import Estimate

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from rich.table import Table

    from equipoise.audit.report import AuditReport, RunAudit

UNDEFINED = "–"
# One-branch models have no other branch to report on; its states would only repeat `none`.
_LACKS = {"window_only": "linear", "linear_only": "window"}
_USE_IN_WORDS = {
    "balanced": "both branches carry the work",
    "redundant": "either branch alone would do",
    "imbalanced": "the branches are out of balance",
    "collapsed": "the window does all the work and the linear branch is dead weight",
    "window_only": "there is only a window",
    "linear_only": "there is only a linear branch",
    "inconclusive": "the evidence does not settle which branch does the work",
}
_USE_STYLES = {"balanced": "green", "redundant": "cyan", "imbalanced": "yellow", "collapsed": "red"}


def render_html(report: AuditReport) -> str:
    """`audit.html`: self-contained, light and dark, charts as inline SVG."""
    from markupsafe import Markup

    labels = run_labels(report)
    template = _environment().get_template("audit.html.j2")
    # matplotlib escapes what it draws; everything else goes through the template's autoescape.
    charts = {
        "recovered": Markup(recovered_chart(report, labels)),
        "shares": Markup(attribution_chart(report, labels)),
    }
    return template.render(**_context(report), charts=charts)


def render_markdown(report: AuditReport) -> str:
    """`audit.md`: the same figures as the page, without charts."""
    return _environment().get_template("audit.md.j2").render(**_context(report))


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
        row = _row(label, run)
        verdict = Text(row["use"], style=_USE_STYLES.get(run.verdict.use, ""))
        cells = [
            f"{run.states['both'].value:.3f}",
            *(percent(value, interval=False) for value in _headline(run)),
        ]
        table.add_row(Text(label), *cells, Text("\n").join([verdict, Text(row["benefit"], style="dim")]))
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


def summary(report: AuditReport) -> str:
    """The report in one paragraph of plain words."""
    metric, labels = report.metric, run_labels(report)
    count = len(labels)
    opening = (
        f"{count} conversion{'' if count == 1 else 's'} of {report.donor.name} "
        f"{'was' if count == 1 else 'were'} scored on {metric.documents:,} documents ({metric.tokens:,} "
        f"tokens, context {metric.context_length:,}) with each branch switched on and off."
    )
    by_use: dict[str, list[str]] = {}
    for label, run in zip(labels, report.runs, strict=True):
        by_use.setdefault(run.verdict.use, []).append(label)
    uses = [f"In {_listed(by_use[use])}, {words}." for use, words in _USE_IN_WORDS.items() if use in by_use]
    return " ".join([opening, *uses, _best(report, labels), _benefits(report, labels)])


def percent(value: Estimate, *, interval: bool = True) -> str:
    """`96.0% [95.1, 96.8]`, or a dash where undefined."""
    if not math.isfinite(value.value):
        return UNDEFINED
    point = f"{value.value:.1%}"
    if not interval or not value.defined:
        return point
    return f"{point} [{100 * value.ci95[0]:.1f}, {100 * value.ci95[1]:.1f}]"


def nats(value: Estimate, *, signed: bool = False) -> str:
    """`3.061 [3.012, 3.107]`, or a dash where undefined."""
    if not math.isfinite(value.value):
        return UNDEFINED
    form = "+.3f" if signed else ".3f"
    if not value.defined:
        return format(value.value, form)
    low, high = value.ci95
    return f"{value.value:{form}} [{low:{form}}, {high:{form}}]"


def size(count: int) -> str:
    """Bytes in binary units: `1.5 MiB`."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def _best(report: AuditReport, labels: Sequence[str]) -> str:
    ranked = [(run.states["both"].value, label, run) for label, run in zip(labels, report.runs, strict=True)]
    _, label, run = min(ranked, key=lambda entry: entry[0])
    return (
        f"The best likelihood is that of {label}: it recovers {percent(run.recovered['both'])} of the donor."
    )


def _benefits(report: AuditReport, labels: Sequence[str]) -> str:
    words = {
        "beneficial": "Beyond reach, the hybrid beats an untrained window of equal bytes in",
        "not_beneficial": "Beyond reach, the hybrid does not beat an untrained window of equal bytes in",
        "inconclusive": "Whether the hybrid beats an untrained window of equal bytes stays open in",
    }
    judged = {
        benefit: [
            label for label, run in zip(labels, report.runs, strict=True) if run.verdict.benefit == benefit
        ]
        for benefit in words
    }
    parts = [f"{words[benefit]} {_listed(names)}." for benefit, names in judged.items() if names]
    return " ".join(parts) or (
        "Whether a linear branch is worth having, against an untrained window of equal bytes, was not tested "
        "here."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _headline(run: RunAudit) -> list[Estimate]:
    """Recovered by both, window alone, linear alone; linear share. Undefined for an absent branch."""
    lacks = _LACKS.get(run.verdict.use)
    nothing = Estimate(math.nan, (math.nan, math.nan))
    return [
        run.recovered["both"],
        nothing if lacks == "window" else run.recovered["window_renormalised"],
        nothing if lacks == "linear" else run.recovered["linear_renormalised"],
        nothing if lacks else run.attribution["renormalised"].linear_share,
    ]


def _row(label: str, run: RunAudit) -> dict[str, Any]:
    """One run, as strings for the templates."""
    both, window, linear, share = (percent(value) for value in _headline(run))
    facts, control = run.facts, run.control
    return {
        "label": label,
        "recipe": run.recipe,
        "seed": run.seed,
        "use_key": run.verdict.use,
        "use": run.verdict.use.replace("_", " "),
        "benefit_key": run.verdict.benefit,
        "benefit": {"inconclusive": "benefit unclear"}.get(
            run.verdict.benefit, run.verdict.benefit.replace("_", " ")
        ),
        "reason": run.verdict.reason,
        "advice": run.verdict.advice,
        "nll": nats(run.states["both"]),
        "both": both,
        "window": window,
        "linear": linear,
        "share": share,
        "reach": "unlimited" if facts.reach is None else f"{facts.reach:,} tokens",
        "state": size(facts.state_bytes),
        "cost": f"{facts.train_tokens:,} tokens, {facts.train_seconds:,.0f} s"
        if facts.train_tokens
        else "untrained",
        "layers": f"{len(facts.layers.converted)} converted, {len(facts.layers.local)} local, "
        f"{len(facts.layers.softmax)} softmax",
        "control": None
        if control is None
        else f"{nats(control.difference, signed=True)} nats/token against an untrained window of "
        f"{control.setting.window:,} + {control.setting.sinks} sinks ({size(control.setting.state_bytes)})",
    }


def _context(report: AuditReport) -> dict[str, Any]:
    labels = run_labels(report)
    return {
        "report": report,
        "summary": summary(report),
        "donor_nll": nats(report.donor.nll),
        "rows": [_row(label, run) for label, run in zip(labels, report.runs, strict=True)],
        "limits": report.thresholds,
        "uses": _USE_IN_WORDS,
    }


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("equipoise.audit", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _markdown_text
    environment.filters["code"] = _code_spans
    return environment


def _markdown_text(value: object) -> Markup:
    """Text that Markdown shows as it is, but for `code`: one line, no cell borders, no links, no markup.

    Marked safe, so that autoescape does not turn apostrophes into entities.
    """
    from markupsafe import Markup

    text = " ".join(str(value).split())
    for letter in "\\*_|<>#":
        text = text.replace(letter, f"\\{letter}")
    return Markup(text.replace("](", "]\\(").replace("&", "&amp;"))


def _code_spans(value: object) -> Markup:
    """Escaped text with `backticks` turned into code elements."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(value))))
