"""Native audits -> `native.json`, `native.md`, `native.html`. The layout of the JSON is described in
docs/native-hybrids.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.audit.documents import text_fingerprint
from equipoise.audit.native import FillAudit, MixerCost, NativeAudit, RandomControl
from equipoise.audit.native_ablation import Place
from equipoise.audit.native_page import native_page
from equipoise.audit.native_scores import FILLS, SURVIVORS, state_name
from equipoise.audit.native_types import ROLES, MixerClass
from equipoise.pages import installed_version, write_results
from equipoise.statistics import Estimate

SCHEMA_VERSION = 1
NAME = "native"
Json = dict[str, Any]
_DIGITS = 6
"""Decimals of a document's summed NLL in nats."""


def to_dict(audits: Sequence[NativeAudit], *, context_length: int, data: str) -> Json:
    """The content of `native.json`.

    Args:
        audits: of the models, in order.
        context_length: tokens of context at most.
        data: the text, in words.
    """
    return {
        "kind": "native_audit",
        "schema_version": SCHEMA_VERSION,
        "equipoise_version": installed_version(),
        "models": [_model(audit, context_length, data) for audit in audits],
    }


def write_native(
    audits: Sequence[NativeAudit], directory: str | os.PathLike[str], *, context_length: int, data: str
) -> dict[str, Path]:
    """Write the three files into `directory`; gives their paths by suffix."""
    content = to_dict(audits, context_length=context_length, data=data)
    return write_results(directory, NAME, native_page(audits, data=data), content)


def _model(audit: NativeAudit, context_length: int, data: str) -> Json:
    return {
        "model": audit.name,
        "model_type": audit.model_type,
        "architecture": _architecture(audit),
        "meaning": audit.kind.meaning,
        "metric": {
            "name": audit.table.metric,
            "unit": audit.table.unit,
            "documents": audit.table.documents,
            "tokens": round(float(np.sum(audit.table.weights))),
            "context_length": context_length,
            "bootstrap_resamples": audit.resamples,
            "data": data,
            "text_sha256": text_fingerprint(audit.split.scored),
        },
        "calibration": {
            "documents": len({window.document for window in audit.split.calibration}),
            "tokens": sum(len(window.input_ids) for window in audit.split.calibration),
            "held_out": audit.split.held_out,
            "description": audit.split.calibration_text,
        },
        "nll": {"both": _estimate(audit.nll)} | {fill: _estimates(audit.fills[fill].nll) for fill in FILLS},
        "recovered": {fill: _estimates(audit.fills[fill].recovered) for fill in FILLS},
        "attribution": {fill: _attribution(audit.fills[fill]) for fill in FILLS},
        "layers": [_layer(layer) for layer in audit.layers],
        "random_control": {role: _control(audit.control[role]) for role in ROLES},
        "verdict": {
            "word": audit.verdict.word,
            "word_mean": audit.verdict.mean_word,
            "reason": audit.verdict.reason,
        },
        "documents": _documents(audit),
    }


def _architecture(audit: NativeAudit) -> Json:
    def described(kind: MixerClass) -> Json:
        return {"class": kind.name, "kind": kind.kind, "returns": kind.returns}

    return {
        "arrangement": audit.kind.arrangement,
        **{role: described(audit.kind.of(role)) for role in ROLES},
    }


def _attribution(fill: FillAudit) -> Json:
    """The fields of `BranchAttribution`, with attention where it says window."""
    parts = fill.attribution
    return {
        name.replace("window", "attention"): _estimate(getattr(parts, name))
        for name in type(parts).__dataclass_fields__
    }


def _layer(layer: MixerCost) -> Json:
    return {
        "layer": layer.mixer.place.layer,
        "role": layer.mixer.place.role,
        "class": type(layer.mixer.module).__name__,
        "module": layer.mixer.path,
        "cost": _estimates(layer.cost),
    }


def _control(control: RandomControl) -> Json:
    mean, lowest, highest = control.summary or (None, None, None)
    return {
        "mixers": control.count,
        "cost": _estimate(control.cost),
        "draws": [{"mixers": _places(chosen), "cost": cost} for chosen, cost in control.draws],
        "mean": mean,
        "lowest": lowest,
        "highest": highest,
        "excess": None if control.excess is None else _estimate(control.excess),
    }


def _places(places: frozenset[Place]) -> list[Json]:
    return [{"layer": place.layer, "role": place.role} for place in sorted(places)]


def _documents(audit: NativeAudit) -> Json:
    """Sums per document of the states that the attribution is made of."""
    states = ["both", *(state_name(fill, survivor) for fill in FILLS for survivor in SURVIVORS)]
    return {
        "tokens": [round(float(tokens)) for tokens in audit.table.weights],
        "nll": {state: [round(-float(s), _DIGITS) for s in audit.table.sums[state]] for state in states},
    }


def _estimates(values: Mapping[Any, Estimate]) -> Json:
    return {str(name): _estimate(value) for name, value in values.items()}


def _estimate(value: Estimate) -> Json:
    return {"value": value.value, "ci95": list(value.ci95)}
