"""Attribution in depth for machines: the layout of `attribution.json` (docs/attribution.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise.audit.depth import Depth, Effect, LayerShapley, RandomControl
from equipoise.audit.depth_units import Unit
from equipoise.audit.measures import Measure
from equipoise.pages import installed_version
from equipoise.statistics import INTERVAL, Estimate

SCHEMA_VERSION = 1
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DepthReport:
    """One hybrid taken apart, and what it was measured on.

    Attributes:
        model: its name.
        data: the text, in words.
        context_length: tokens of context at most.
        depth: the attribution.
        measures: diagnostics of attention, if any were taken.
        missing: why the donor's are not among them, if they are not.
        equipoise_version: that measured it.
    """

    model: str
    data: str
    context_length: int
    depth: Depth
    measures: Sequence[Measure] = ()
    missing: str | None = None
    equipoise_version: str = field(default_factory=installed_version)


def to_dict(report: DepthReport) -> Json:
    """The report as plain data; figures that are undefined are NaN here and null in the file."""
    depth, settings = report.depth, report.depth.settings
    return {
        "schema_version": SCHEMA_VERSION,
        "equipoise_version": report.equipoise_version,
        "model": report.model,
        "metric": {
            "name": settings.metric, "unit": settings.unit, "documents": depth.documents,
            "weight": depth.weight, "context_length": report.context_length, "data": report.data,
            "bootstrap_resamples": settings.resamples, "interval": INTERVAL,
        },
        "seed": settings.seed,
        "evaluations": depth.evaluations,
        "states": {name: _estimate(value) for name, value in depth.states.items()},
        "layers": [_effect(effect) for effect in depth.layers],
        "heads": [_effect(effect) for effect in depth.heads],
        "shapley": [_shapley(game) for game in depth.shapley],
        "random_layers": [_control(control) for control in depth.control],
        "measures": [_measure(measure) for measure in report.measures],
        "measures_missing": report.missing,
    }  # fmt: skip


def _effect(effect: Effect) -> Json:
    return {
        **_unit(effect.unit),
        "reading": effect.reading,
        "cost_ablated": _estimate(effect.cost),
        "gain_restored_alone": _estimate(effect.gain),
    }


def _shapley(game: LayerShapley) -> Json:
    values = zip(game.players, game.values, game.standard_errors, strict=True)
    return {
        "game": game.game, "reading": game.reading, "total": _estimate(game.total),
        "efficiency_gap": game.efficiency_gap, "permutation_pairs": game.pairs,
        "evaluations": game.evaluations, "stopped_by": game.stopped_by, "tolerance": game.tolerance,
        "standard_errors_trusted": game.trusted,
        "values": [
            {**_unit(player), **_estimate(value), "permutation_standard_error": error}
            for player, value, error in values
        ],
    }  # fmt: skip


def _control(control: RandomControl) -> Json:
    return {
        "branch": control.branch, "reading": control.reading, "removed": control.removed,
        "units": control.units, "cost": _estimate(control.cost), "draws": list(control.draws),
        "excess": None if control.excess is None else _estimate(control.excess), "answer": control.answer,
    }  # fmt: skip


def _measure(measure: Measure) -> Json:
    kind = measure.kind
    return {
        "name": measure.name,
        "title": kind.title,
        "unit": kind.unit,
        "layers": [
            {"layer": layer, "heads": [_estimate(value) for value in row]}
            for layer, row in zip(measure.layers, measure.values, strict=True)
        ],
    }


def _unit(unit: Unit) -> Mapping[str, object]:
    return {"layer": unit.layer, "branch": unit.branch, "head": unit.head}


def _estimate(value: Estimate) -> Json:
    return {"value": value.value, "ci95": list(value.ci95)}
