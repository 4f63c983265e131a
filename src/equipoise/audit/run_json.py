"""A run of an audit as `audit.json` holds it."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from equipoise.audit.documents import document_sums
from equipoise.audit.schema import Json
from equipoise.statistics import Estimate

if TYPE_CHECKING:
    from equipoise.audit.report import Control, Guards, Reference, RunAudit


def run_dict(run: RunAudit) -> Json:
    """One run in the layout of `audit.schema.json`.

    Raises:
        ValueError: a likelihood that is not finite.
    """
    name = f"{run.recipe} (seed {run.seed})"
    return {
        "recipe": run.recipe,
        "seed": run.seed,
        "states": {state: measured(nll, f"state {state!r} of {name}") for state, nll in run.states.items()},
        "recovered": {state: _derived(value) for state, value in run.recovered.items()},
        "attribution": {
            reading: {part: _derived(value) for part, value in plain(values).items()}
            for reading, values in run.attribution.items()
        },
        "verdict": plain(run.verdict),
        "control": None if run.control is None else _control_dict(run.control, name),
        "references": [_reference_dict(reference) for reference in run.references],
        "state_bytes": run.facts.state_bytes,
        "reach": run.facts.reach,
        "train_tokens": run.facts.train_tokens,
        "train_seconds": run.facts.train_seconds,
        "layers": {kind: list(layers) for kind, layers in plain(run.facts.layers).items()},
        "guards": None if run.facts.guards is None else _guards_dict(run.facts.guards),
        **({} if run.scores is None else {"documents": document_sums(run.scores)}),
    }


def _guards_dict(guards: Guards) -> Json:
    return {**plain(guards), "layers": list(guards.layers)}


def _control_dict(control: Control, name: str) -> Json:
    return {
        "window": control.setting.window,
        "sinks": control.setting.sinks,
        "state_bytes": control.setting.state_bytes,
        **measured(control.nll, f"the control of {name}"),
        "recovered": _derived(control.recovered),
        "difference": _derived(control.difference),
    }


def _reference_dict(reference: Reference) -> Json:
    return {
        "name": reference.name,
        "train_tokens": reference.train_tokens,
        **measured(reference.nll, f"the reference {reference.name}"),
        "recovered": _derived(reference.recovered),
        "difference": _derived(reference.difference),
    }


def plain(record: Any) -> Json:
    """A dataclass's fields, one level deep."""
    return {part.name: getattr(record, part.name) for part in fields(record)}


def measured(nll: Estimate, what: str) -> Json:
    """A likelihood, which must be finite; `what` it is of, for the error.

    Raises:
        ValueError: it is not.
    """
    if not nll.defined:
        raise ValueError(
            f"expected a finite NLL with a finite interval for {what}, got {nll.value} {list(nll.ci95)}; the "
            "model diverges there: evaluate in float32, and check the training run"
        )
    return {"nll": nll.value, "ci95": list(nll.ci95)}


def _derived(value: Estimate) -> Json:
    return {"value": _or_null(value.value), "ci95": [_or_null(bound) for bound in value.ci95]}


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
