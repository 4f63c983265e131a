"""The audit as one value: `AuditReport` -> `audit.json`, `audit.md`, `audit.html`.

`audit.json` is the machine-readable form; its layout is fixed by `audit.schema.json` (JSON Schema, draft
2020-12). Measured likelihoods must be finite and anything else is an error; derived figures that are
undefined (a share of a hybrid that does not beat no attention) are null, value and interval bounds
separately. NaN never reaches the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from equipoise.audit.attribution import (
    DONOR,
    READINGS,
    BranchAttribution,
    Reading,
    attribute,
    check_states,
    recovered,
)
from equipoise.audit.documents import on_one_line
from equipoise.audit.page import audit_page
from equipoise.audit.render import console_table
from equipoise.audit.run_json import measured, plain, run_dict
from equipoise.audit.schema import SCHEMA_VERSION, Json, audit_schema, validate_audit
from equipoise.audit.verdict import Thresholds, Verdict, gather, judge
from equipoise.pages import installed_version, write_results
from equipoise.statistics import INTERVAL, Draws, Estimate, ScoreTable, bootstrap, difference, score

__all__ = [
    "CONTROL",
    "SCHEMA_VERSION",
    "AuditReport",
    "Control",
    "ControlSetting",
    "Donor",
    "Guards",
    "Layers",
    "Metric",
    "RunAudit",
    "RunFacts",
    "audit_run",
    "audit_schema",
    "console_table",
    "to_dict",
    "to_json",
    "validate_audit",
    "write_audit",
]

CONTROL = "swa_sinks_equal_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What was measured, on what.

    Attributes:
        documents, tokens: how much was scored; documents are the clusters of the bootstrap.
        context_length: tokens of context at most.
        bootstrap_resamples: resamples behind every interval.
        data: the text, in words: name, split, revision.
        text_sha256: of the scored tokens (`equipoise.audit.documents.text_fingerprint`), where known: audits
            of the same text can be merged.
    """

    documents: int
    tokens: int
    context_length: int
    bootstrap_resamples: int
    data: str
    name: str = "nll"
    unit: str = "nats/token"
    text_sha256: str | None = None

    @classmethod
    def of(
        cls, table: ScoreTable, *, context_length: int, data: str, resamples: int = 2000,
        text_sha256: str | None = None,
    ) -> Metric:  # fmt: skip
        """The metric of a score table."""
        return cls(
            name=table.metric,
            unit=table.unit,
            documents=table.documents,
            tokens=round(float(table.weights.sum())),
            context_length=context_length,
            bootstrap_resamples=resamples,
            data=data,
            text_sha256=text_sha256,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Donor:
    """The softmax model that was converted; `nll` in nats per token, `extra` for revision and the like."""

    name: str
    nll: Estimate
    extra: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    @classmethod
    def of(cls, table: ScoreTable, *, name: str, resamples: int = 2000, seed: int = 0) -> Donor:
        """The donor's likelihood in a score table, with the same resampling as `audit_run`."""
        return cls(name=name, nll=-score(bootstrap(table, resamples=resamples, seed=seed), DONOR))


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSetting:
    """The bar to beat: the untrained donor with a sliding window and sinks, at the hybrid's state bytes.

    `window` and `sinks` in tokens, `state_bytes` per sequence, `state` its name in the score table.
    """

    window: int
    sinks: int
    state_bytes: int
    state: str = CONTROL


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A measured control on the audit's own text.

    `nll` in nats per token; `difference` is v(both) - v(control) in nats per token, paired by document,
    positive where the hybrid is better.
    """

    setting: ControlSetting
    nll: Estimate
    recovered: Estimate
    difference: Estimate


REFERENCE = "reference:"
"""What the states of references are called in a score table, before their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A softmax model on the same text: the donor after the same LoRA (recipe `lora-only`), say.

    Attributes:
        name: of its recipe.
        train_tokens: what it was trained on.
        nll: in nats per token.
        recovered: on the run's scale.
        difference: v(both) - v(reference), paired by document, positive where the hybrid is better.
    """

    name: str
    train_tokens: int
    nll: Estimate
    recovered: Estimate
    difference: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Layer numbers by what they run: `converted` hybrids, `local` layers left alone, full `softmax`."""

    converted: tuple[int, ...] = ()
    local: tuple[int, ...] = ()
    softmax: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """Counts of `equipoise.layers.guards` over some of the windows, both branches on; all should be 0.

    Attributes:
        windows: how many were looked at.
        features: past the largest number of the model's dtype, or no numbers.
        denominators: of queries for which linear attention's denominator vanishes.
        state: share of the last keys' mass that is rounded away.
        layers: the layers in which one of the three is out of bounds.
    """

    windows: int
    features: int
    denominators: int
    state: float
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What is known about a run without scoring it.

    Attributes:
        state_bytes: constant decode state per sequence, in bytes: window K and V, sinks, S and z of all
            layers.
        reach: tokens that stacked windows can relay information over; None where it is unlimited.
        train_tokens, train_seconds: what the conversion cost.
        layers: which layers were converted.
        guards: numbers near their ends; None where there is no linear branch, or nothing was counted.
    """

    state_bytes: int
    reach: int | None
    train_tokens: int
    train_seconds: float
    layers: Layers
    guards: Guards | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAudit:
    """One converted model: likelihood and recovered performance per branch state, attribution, verdict.

    `scores`, where given, are the per-document sums behind it all; `equipoise compare` needs them.
    """

    recipe: str
    seed: int
    states: Mapping[str, Estimate]
    recovered: Mapping[str, Estimate]
    attribution: Mapping[Reading, BranchAttribution]
    verdict: Verdict
    facts: RunFacts
    control: Control | None = None
    references: Sequence[Reference] = ()
    scores: ScoreTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """One donor, its conversions, what they were measured on. `thresholds` must be those of the verdicts."""

    donor: Donor
    metric: Metric
    runs: Sequence[RunAudit]
    thresholds: Thresholds = field(default_factory=Thresholds)
    equipoise_version: str = field(default_factory=installed_version)


def audit_run(
    table: ScoreTable,
    *,
    recipe: str,
    seed: int,
    has_window: bool,
    has_linear: bool,
    facts: RunFacts,
    control: ControlSetting | None = None,
    benefit_difference: Estimate | None = None,
    benefit_reason: str | None = None,
    references: Mapping[str, int] | None = None,
    thresholds: Thresholds | None = None,
    resamples: int = 2000,
    bootstrap_seed: int = 0,
) -> RunAudit:
    """Audit one run from its per-document sums.

    Args:
        table: likelihoods of every branch state (`ScoreTable.from_nll`).
        recipe, seed: what identifies the run.
        has_window, has_linear: which branches the model has at all.
        facts: state bytes, reach, cost, layers.
        control: the equal-bytes control, where its state is in the table.
        benefit_difference: paired difference from the control on items beyond both reaches, positive where
            the hybrid is better; None, with a `benefit_reason`, where none was measured.
        references: training tokens of softmax models to compare with, by name; their sums are in the table
            under `REFERENCE` and that name.
        thresholds: None for the defaults.
        resamples, bootstrap_seed: of the bootstrap.

    Raises:
        ValueError: a metric other than `nll`, or a benefit given both or neither way.
        KeyError: a control whose state is not in the table.
    """
    if table.metric != "nll":
        raise ValueError(
            f"expected a table of metric 'nll', got {table.metric!r}; audit reports hold likelihoods"
        )
    check_states(table)
    draws = bootstrap(table, resamples=resamples, seed=bootstrap_seed)
    states = [state for state in table.sums if state != DONOR and not state.startswith(REFERENCE)]
    verdict = judge(
        gather(draws, control=None if control is None else control.state),
        has_window=has_window,
        has_linear=has_linear,
        benefit_difference=benefit_difference,
        benefit_reason=benefit_reason,
        thresholds=thresholds,
    )
    return RunAudit(
        recipe=recipe,
        seed=seed,
        states=MappingProxyType({state: -score(draws, state) for state in states}),
        recovered=MappingProxyType({state: recovered(draws, state) for state in states}),
        attribution=MappingProxyType({reading: attribute(draws, reading) for reading in READINGS}),
        verdict=verdict,
        facts=facts,
        control=None if control is None else _measure_control(draws, control),
        references=tuple(
            _measure_reference(draws, name, tokens) for name, tokens in (references or {}).items()
        ),
        scores=table,
    )


def to_dict(report: AuditReport) -> Json:
    """The report in the layout of `audit.schema.json`.

    Raises:
        ValueError: a likelihood that is not finite, no runs, or an extra donor field that hides a fixed one.
    """
    if not report.runs:
        raise ValueError(
            "expected at least one run, got none; an audit without a converted model says nothing"
        )
    fixed = {"name": report.donor.name, **measured(report.donor.nll, "the donor")}
    hidden = sorted(fixed.keys() & report.donor.extra.keys())
    if hidden:
        raise ValueError(f"expected new names in the donor's extra fields, got {hidden}; rename them")
    return {
        "schema_version": SCHEMA_VERSION,
        "equipoise_version": report.equipoise_version,
        "donor": {**fixed, **report.donor.extra},
        "metric": {**plain(report.metric), "interval": INTERVAL},
        "runs": [run_dict(run) for run in report.runs],
    }


def to_json(report: AuditReport) -> str:
    """`audit.json`'s text: indented, UTF-8, no NaN."""
    return on_one_line(json.dumps(to_dict(report), indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def write_audit(report: AuditReport, directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Write `audit.json`, `audit.md` and `audit.html` into `directory`, creating it; returns their paths by
    suffix."""
    text = to_json(report)  # refuses a report that says nothing, before it is drawn
    return write_results(directory, "audit", audit_page(report), text)


def _measure_control(draws: Draws, setting: ControlSetting) -> Control:
    return Control(
        setting=setting,
        nll=-score(draws, setting.state),
        recovered=recovered(draws, setting.state),
        difference=difference(draws, "both", setting.state),
    )


def _measure_reference(draws: Draws, name: str, train_tokens: int) -> Reference:
    state = REFERENCE + name
    return Reference(
        name=name,
        train_tokens=train_tokens,
        nll=-score(draws, state),
        recovered=recovered(draws, state),
        difference=difference(draws, "both", state),
    )
