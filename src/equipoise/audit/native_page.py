"""Native audits for people: the page behind `native.html` and `native.md`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from equipoise.audit.native import NativeAudit
from equipoise.audit.native_plots import layers_chart, recovered_chart, spread_out
from equipoise.audit.native_scores import FILLS, Fill
from equipoise.audit.native_types import ROLES, Role
from equipoise.audit.native_verdict import WORDS, Lean
from equipoise.pages import Cell, Figure, Page, Section, Table, Text, number, percent
from equipoise.statistics import Estimate

_FILL_WORDS: dict[Fill, str] = {"zero": "zeros", "mean": "mean outputs"}
_ROLE_WORDS: dict[Role, str] = {"attention": "attention", "linear": "linear mixers"}
_ONE: dict[Role, str] = {"attention": "attention", "linear": "linear mixer"}


def native_labels(audits: Sequence[NativeAudit]) -> list[str]:
    """The models' short names, or their full ones where two are called the same."""
    short = [Path(audit.name).name for audit in audits]
    return short if len(set(short)) == len(short) else [audit.name for audit in audits]


def native_page(audits: Sequence[NativeAudit], *, data: str) -> Page:
    """The page: plots first, then tables, then how to read them."""
    labels = native_labels(audits)
    sections: list[Section] = [_recovered_figure(audits, labels)]
    sections += [_layers_figure(audit, label) for audit, label in zip(audits, labels, strict=True)]
    sections += [_states_table(audits, labels), _attribution_table(audits, labels)]
    sections += [_control_table(audits, labels)]
    for audit, label in zip(audits, labels, strict=True):
        sections += [_layers_table(audit, label), _meaning(audit, label)]
    sections.append(_reading(audits))
    return Page(
        title="Which mixers do the work?",
        subtitle=f"Likelihood on {data}; {', '.join(_scored(audit) for audit in audits)}.",
        summary=" ".join(f"{label}: {sentence(audit)}" for audit, label in zip(audits, labels, strict=True)),
        sections=sections,
    )


def sentence(audit: NativeAudit) -> str:
    """The verdict's word and why."""
    return f"{audit.verdict.word.replace('_', ' ')}. {audit.verdict.reason}"


def _scored(audit: NativeAudit) -> str:
    tokens = round(float(audit.table.weights.sum()))
    return f"{audit.table.documents} documents, {tokens:,} tokens ({audit.model_type})"


def _recovered_figure(audits: Sequence[NativeAudit], labels: Sequence[str]) -> Figure:
    facts = "; ".join(
        f"{label}: attention alone {_point(audit, 'attention')}, linear mixers alone "
        f"{_point(audit, 'linear')}"
        for audit, label in zip(audits, labels, strict=True)
    )
    return Figure(
        "What each kind of mixer keeps alone",
        recovered_chart(audits, labels),
        f"Recovered performance with the other kind of mixer zeroed. {facts}.",
        "0 is the model without any mixer, 1 the model as it is. Bars end at -0.6 and 1.5.",
    )


def _point(audit: NativeAudit, role: Role) -> str:
    return percent(audit.fills["zero"].recovered[role], interval=False)


def _layers_figure(audit: NativeAudit, label: str) -> Figure:
    worst = max(audit.layers, key=lambda layer: layer.cost["zero"].value)
    scale = " The axis is logarithmic beyond the median cost." if spread_out(audit.layers) else ""
    return Figure(
        f"Layer by layer: {label}",
        layers_chart(audit),
        f"Cost of taking out one mixer at a time. The dearest is the {_ONE[worst.mixer.place.role]} "
        f"of layer {worst.mixer.place.layer}: {number(worst.cost['zero'])} nats per token.",
        f"Bars: the mixer's output is zero. Diamonds: its mean.{scale}",
    )


def _states_table(audits: Sequence[NativeAudit], labels: Sequence[str]) -> Table:
    rows: list[list[Cell | str]] = []
    for audit, label in zip(audits, labels, strict=True):
        rows.append([label, "both (as it is)", "–", _number(audit.nll), _percent(Estimate(1.0, (1.0, 1.0)))])
        for fill in FILLS:
            parts = audit.fills[fill]
            for role in ROLES:
                rows.append(
                    [
                        label, f"{_ROLE_WORDS[role]} alone", _FILL_WORDS[fill], _number(parts.nll[role]),
                        _percent(parts.recovered[role]),
                    ]
                )  # fmt: skip
            none = Estimate(0.0, (0.0, 0.0))
            rows.append([label, "none", _FILL_WORDS[fill], _number(parts.nll["none"]), _percent(none)])
    return Table(
        "States",
        ("model", "mixers that stay", "in the others' place", "NLL", "recovered"),
        rows,
        "NLL in nats per token; models with different tokenizers are not comparable. Brackets: 95% paired "
        "bootstrap over documents.",
    )


def _attribution_table(audits: Sequence[NativeAudit], labels: Sequence[str]) -> Table:
    rows: list[list[Cell | str]] = []
    for audit, label in zip(audits, labels, strict=True):
        for fill in FILLS:
            parts = audit.fills[fill].attribution
            rows.append(
                [
                    label, _FILL_WORDS[fill], _number(parts.window), _number(parts.linear),
                    _percent(parts.linear_share), _number(parts.window_alone),
                    _number(parts.window_given_linear), _number(parts.linear_alone),
                    _number(parts.linear_given_window), _number(parts.interaction),
                ]
            )  # fmt: skip
    return Table(
        "Attribution",
        (
            "model", "in a mixer's place", "attention", "linear", "linear share", "attention alone adds",
            "attention adds to linear", "linear alone adds", "linear adds to attention", "interaction",
        ),
        rows,
        "Shapley values of two players, nats per token: they add up to what all mixers are worth, and each "
        "is the mean of the two marginals beside it. A negative interaction says that the two do the same "
        "work, a positive one that they need each other.",
    )  # fmt: skip


def _control_table(audits: Sequence[NativeAudit], labels: Sequence[str]) -> Table:
    rows: list[list[Cell | str]] = []
    for audit, label in zip(audits, labels, strict=True):
        for role in ROLES:
            control = audit.control[role]
            mean, lowest, highest = control.summary or (float("nan"),) * 3
            spread = f"{mean:.3f} ({lowest:.3f} to {highest:.3f})" if control.summary else "–"
            rows.append(
                [
                    label, f"all {_ROLE_WORDS[role]} ({control.count})", _number(control.cost),
                    Cell(spread, mean), str(len(control.draws)),
                    "–" if control.excess is None else _number(control.excess),
                ]
            )  # fmt: skip
    return Table(
        "Is it these mixers, or any so many?",
        ("model", "zeroed", "cost", "as many at random", "draws", "excess"),
        rows,
        "Cost in nats per token; random draws: mean (lowest to highest) over sets of as many mixers of "
        "either kind. Excess: cost less the draws' mean. A set that makes up most of the mixers overlaps "
        "with every draw, so its excess says little.",
    )


def _layers_table(audit: NativeAudit, label: str) -> Table:
    rows: list[list[Cell | str]] = [
        [
            Cell(f"{layer.mixer.place.layer}", layer.mixer.place.layer),
            layer.mixer.place.role,
            f"`{type(layer.mixer.module).__name__}`",
            _number(layer.cost["zero"], digits=4),
            _number(layer.cost["mean"], digits=4),
        ]
        for layer in audit.layers
    ]
    return Table(
        f"Every mixer of {label}",
        ("layer", "role", "class", "cost of zeros", "cost of its mean"),
        rows,
        "Cost of taking that one mixer out, nats per token; below zero the model is better without it.",
    )


def _meaning(audit: NativeAudit, label: str) -> Text:
    kind = audit.kind
    return Text(
        f"What zeroing means in {label}",
        (
            f"{audit.model_type}: the linear mixers are `{kind.linear.name}` ({kind.linear.kind}), attention "
            f"is `{kind.attention.name}` ({kind.attention.kind}). {kind.meaning}",
            f"Mean outputs were taken in the intact model over {audit.split.calibration_text}.",
        ),
    )


def _reading(audits: Sequence[NativeAudit]) -> Text:
    words: set[Lean] = {word for audit in audits for word in (audit.verdict.word, audit.verdict.mean_word)}
    return Text(
        "How to read this",
        (
            "A mixer is the part of a layer that moves information between tokens. It is taken out by "
            "putting zeros, or its mean output, the same vector at every token, in place of what it returns. "
            "Zeros take a model off what it was trained on, means less so: where they disagree, trust "
            "neither alone.",
            "There is no donor here: the scale runs from no mixer at all to the model as it is. That a model "
            "breaks without its linear mixers says that it relies on them, not that they beat attention.",
            "Only full forward passes are scored, on windows of one document each, batched by length without "
            "padding. Generation with a cache is not ablated.",
            *(f"`{word}`: {WORDS[word]}" for word in sorted(words)),
        ),
    )


def _number(value: Estimate, *, digits: int = 3) -> Cell:
    return Cell(number(value, digits=digits), value.value)


def _percent(value: Estimate) -> Cell:
    return Cell(percent(value), value.value)
