"""The sections of a card that figures go into; plain Markdown of `run.json` and `audit.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from equipoise.models.card import has_single_heads, public_name, window_in_words
from equipoise.pages.content import UNDEFINED
from equipoise.pages.format import bytes_in_words, number, percent
from equipoise.statistics import Estimate

STATES = (
    ("both", "both branches"),
    ("window_renormalised", "window alone"),
    ("linear_renormalised", "linear branch alone"),
    ("window", "linear branch zeroed"),
    ("linear", "window zeroed"),
    ("none", "neither"),
)
"""Rows of the table of states: name in `audit.json`, words."""
ROWS = 12
"""Of the training curve at most."""
LOOKS = (
    ("eval_nll", "held-out NLL", "{:.3f}"),
    ("eval_linear_share", "linear share", "{:.1%}"),
    ("eval_linear_recovered", "linear alone recovers", "{:.1%}"),
    ("eval_recall", "recall", "{:.1%}"),
)
"""Columns of the training curve, where they were watched."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def making_section(described: dict[str, Any], note: dict[str, Any] | None) -> str:
    """Recipe, seed, data and cost; the settings of the converted layers."""
    hybrid = ", ".join(f"{key} {_plain(value)}" for key, value in described["hybrid"].items())
    if note is None:
        return (
            "There is no record of the run (`run.json`), so recipe, data and seed are not known here.\n\n"
            f"Converted layers: {hybrid}."
        )
    settings, stages = note["settings"], note["stages"]
    source = public_name(str(settings["data"]["source"]))
    rows = [
        ["recipe", f"{note['recipe']}: {settings['summary']}" if settings["summary"] else note["recipe"]],
        ["published in", settings["reference"] or UNDEFINED],
        ["seed", str(note["seed"])],
        ["donor", public_name(str(note["donor"]))],
        ["trained on", f"{source}, {note['train_tokens']:,} tokens" if note["train_tokens"] else "nothing"],
        *([name, _stage(stage, settings.get(name))] for name, stage in stages.items()),
        ["converted layers", hybrid],
        ["made with", f"equipoise {note['equipoise_version']}"],
    ]
    told = note["held_out"]
    if {"donor", "result"} <= told.keys():
        losses = f"donor {told['donor']:.3f}, this model {told['result']:.3f} nats per token"
        rows.append(["loss on held-out rows", losses])
    return table(["", ""], rows)


def _stage(stage: dict[str, Any], settings: dict[str, Any] | None) -> str:
    if "steps" not in stage:  # an import
        return "not recorded"
    words = f"{stage['steps']} steps, {stage['tokens']:,} tokens, {stage['seconds']:.0f} s"
    if settings is not None:
        words += f", learning rate {settings['learning_rate']:g}"
    kept = stage.get("kept_step")
    return words if kept is None else f"{words}; weights of step {kept} kept"


def measured_section(audit: dict[str, Any], run: dict[str, Any]) -> str:
    """Verdict, states, attribution, control and references of an audit."""
    metric, verdict = audit["metric"], run["verdict"]
    use, benefit = (str(verdict[key]).replace("_", " ") for key in ("use", "benefit"))
    rows = [["donor", number(_measured(audit["donor"])), percent(1.0, interval=False)]]
    rows += [
        [words, number(_measured(run["states"][name])), percent(_derived(run["recovered"][name]))]
        for name, words in STATES
    ]
    share = run["attribution"]["renormalised"]["linear_share"]
    told = [
        f"**{use}, {benefit}.** {verdict['reason']}",
        f"By `equipoise audit` {audit['equipoise_version']} on {_text(metric['data'])}: "
        f"{metric['documents']} documents, {metric['tokens']:,} tokens, contexts of up to "
        f"{metric['context_length']}. NLL in nats per token; recovered is 0% without attention and 100% for "
        "the donor; in brackets 95% intervals over documents.",
        table(["state", "NLL", "recovered"], rows),
        f"The linear branch's share of the attribution (Shapley value, alone at weight 1): "
        f"{percent(_derived(share))}.",
    ]
    if run["control"] is not None:
        told.append(_control(run["control"], run["state_bytes"]))
    told += [
        f"Against {reference['name']} (softmax, {reference['train_tokens']:,} training tokens): "
        f"{number(_derived(reference['difference']), signed=True)} nats per token, positive where this model "
        "is better."
        for reference in run.get("references", [])
    ]
    others = [
        f"{other['recipe'].partition(' in ')[0]} (seed {other['seed']}) "
        f"{other['verdict']['use'].replace('_', ' ')}, {other['verdict']['benefit'].replace('_', ' ')}"
        for other in audit["runs"]
        if other is not run
    ]
    if others:
        told.append(f"In the same audit: {'; '.join(others)}.")
    return "\n\n".join(told)


def _control(control: dict[str, Any], state_bytes: int) -> str:
    return (
        f"Against the untrained donor with a window of {control['window']} tokens and {control['sinks']} "
        f"sinks, which takes {bytes_in_words(control['state_bytes'])} a sequence (this model: "
        f"{bytes_in_words(state_bytes)}): {number(_derived(control['difference']), signed=True)} nats per "
        "token on the whole text, positive where this model is better."
    )


def curve_section(note: dict[str, Any] | None) -> str:
    """What was logged while training, at a few steps of each stage; empty where nothing was."""
    stages: dict[str, Any] = {} if note is None else note["stages"]
    logged = {name: stage["history"] for name, stage in stages.items() if stage.get("history")}
    seen = {key for history in logged.values() for look in history for key in look}
    columns = [column for column in LOOKS if column[0] in seen]
    rows: list[list[str]] = []
    for name, history in logged.items():
        by_step: dict[int, dict[str, Any]] = {}
        for entry in history:
            by_step.setdefault(int(entry["step"]), {}).update(entry)
        looked = {step for step, entry in by_step.items() if any(key in entry for key, _, _ in columns)}
        steps = sorted(looked or {step for step, entry in by_step.items() if "loss" in entry})
        rows += [
            [name, str(step), _cell(by_step[step], "loss", "{:.4g}")]
            + [_cell(by_step[step], key, form) for key, _, form in columns]
            for step in _spread(steps, ROWS)
        ]
    if not rows:
        return ""
    header = ["stage", "step", "training loss", *(words for _, words, _ in columns)]
    return f"{table(header, rows)}\n\nThe training loss of stage 1 is that of the transfer objective."


def limits_section(described: dict[str, Any], run: dict[str, Any] | None) -> str:
    """What follows from the conversion itself."""
    hybrid, reach = described["hybrid"], None if run is None else run["reach"]
    near = "no token" if hybrid["window"] is None else f"the last {window_in_words(hybrid)} tokens"
    far = "nothing further back" if hybrid["feature_map"] is None else "all others through the linear branch"
    if hybrid["feature_map"] is not None and has_single_heads(hybrid):
        far = "all others through the linear branch in the heads that have one"
    lines = [f"A converted layer sees {near} by exact attention, {far}."]
    if reach is not None:
        lines.append(f"Stacked windows relay information over {reach:,} tokens at most.")
    if run is not None:
        lines.append(
            f"The decode state takes {bytes_in_words(run['state_bytes'])} a sequence, at any length."
        )
        kept = [f"{len(run['layers'][kind])} {kind}" for kind in ("local", "softmax") if run["layers"][kind]]
        lines += [f"Layers left as the donor's: {', '.join(kept)}."] if kept else []
    lines.append("The donor's own limits hold for this model too.")
    return "\n".join(f"- {line}" for line in lines)


def missing(audit: dict[str, Any] | None, run: dict[str, Any] | None) -> list[str]:
    """What the card cannot say."""
    lines: list[str] = []
    if audit is None or run is None:
        lines.append("Which branch does the work, and whether the linear one is worth its bytes.")
    else:
        if run["verdict"]["benefit"] == "untested":
            lines.append(
                "Whether the hybrid beats a plain window of the same bytes on tokens beyond reach: no such "
                "token was scored."
            )
        lines.append(f"Contexts of more than {audit['metric']['context_length']:,} tokens.")
        recipe = run["recipe"].partition(" in ")[0]
        seeds = {other["seed"] for other in audit["runs"] if other["recipe"].partition(" in ")[0] == recipe}
        if len(seeds) == 1:
            lines.append("Other seeds: all figures are of this one run, and their intervals over documents.")
    lines.append("Task suites (`equipoise evaluate`) and recall at a distance (`equipoise recall`).")
    lines.append("Bias, toxicity and safety.")
    return lines


def _measured(entry: dict[str, Any]) -> Estimate:
    return Estimate(entry["nll"], (entry["ci95"][0], entry["ci95"][1]))


def _derived(entry: dict[str, Any]) -> Estimate:
    value, low, high = (math.nan if x is None else float(x) for x in (entry["value"], *entry["ci95"]))
    return Estimate(value, (low, high))


def _cell(entry: dict[str, Any], key: str, form: str) -> str:
    return form.format(entry[key]) if key in entry else UNDEFINED


def _spread(steps: list[int], count: int) -> list[int]:
    """At most ``count`` of the steps, evenly, first and last among them."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _text(words: str) -> str:
    """The audit's text in words, without the folders of a local file."""
    name, bracket, rest = words.partition(" (")
    return public_name(name) + bracket + rest


def _plain(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
