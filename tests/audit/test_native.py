"""Audits of native hybrids with planted mixers, and their report."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.audit.native import NativeAudit, prepare, run_native
from equipoise.audit.native_ablation import find_mixers
from equipoise.audit.native_page import native_labels
from equipoise.audit.native_report import to_dict, write_native
from equipoise.audit.native_types import NATIVE_TYPES
from equipoise.data.packing import EvaluationWindow
from equipoise.statistics import Estimate
from native_models import HOLDS, NATIVE, native_model, own_text, silence

ZERO = Estimate(0.0, (0.0, 0.0))
DOCS = Path(__file__).parents[2] / "docs" / "native-hybrids.md"


def audit_of(model: Any, *, documents: int = 15, length: int = 24, **options: Any) -> NativeAudit:
    """On text that the model itself wrote, so that it predicts it best as it is."""
    ids = own_text(model, documents=documents, length=length)
    texts = [
        EvaluationWindow(
            document=index, start=0, input_ids=row, labels=torch.where(torch.arange(length) > 0, row, -100)
        )
        for index, row in enumerate(ids)
    ]
    return run_native(model, prepare(model, texts), **{"name": "tiny", "resamples": 200, **options})


@lru_cache(maxsize=1)
def falcon() -> NativeAudit:
    return audit_of(native_model("falcon_h1"))


@pytest.fixture
def audit() -> NativeAudit:
    """Of a tiny Falcon-H1, made once."""
    return falcon()


class TestFigures:
    def test_are_arithmetic_on_the_scores(self, audit: NativeAudit) -> None:
        v = {name: float(sums.sum() / audit.table.weights.sum()) for name, sums in audit.table.sums.items()}
        for fill, parts in audit.fills.items():
            both, none = v["both"], v[f"{fill}/none"]
            attention, linear = v[f"{fill}/attention"], v[f"{fill}/linear"]
            assert parts.nll["attention"].value == pytest.approx(-attention)
            assert parts.recovered["linear"].value == pytest.approx((linear - none) / (both - none))
            shares = parts.attribution
            assert shares.linear.value == pytest.approx(((linear - none) + (both - attention)) / 2)
            assert shares.window.value + shares.linear.value == pytest.approx(both - none)
            assert shares.interaction.value == pytest.approx(both - attention - linear + none)
        for layer in audit.layers:
            place = layer.mixer.place
            for fill, cost in layer.cost.items():
                without = v[f"{fill}/without {place.role} of layer {place.layer}"]
                assert cost.value == pytest.approx(v["both"] - without)
        control = audit.control["linear"]
        assert control.cost.value == pytest.approx(v["both"] - v["zero/attention"])
        costs = [v["both"] - v[f"zero/random for linear {i}"] for i in range(5)]
        assert [cost for _, cost in control.draws] == pytest.approx(costs)
        assert control.summary == pytest.approx((np.mean(costs), min(costs), max(costs)))
        assert control.excess is not None
        assert control.excess.value == pytest.approx(control.cost.value - np.mean(costs))

    def test_scored_and_calibration_documents(self, audit: NativeAudit) -> None:
        assert audit.table.documents == 12
        assert {w.document for w in audit.split.calibration} == {4, 9, 14}

    def test_ticks_as_announced(self) -> None:
        model, ticks = native_model("bamba"), []
        ids = own_text(model, documents=6, length=8)
        texts = [
            EvaluationWindow(document=i, start=0, input_ids=row, labels=row) for i, row in enumerate(ids)
        ]
        job = prepare(model, texts)
        run_native(model, job, name="x", batch_size=2, resamples=10, tick=lambda: ticks.append(1))
        assert len(ticks) == job.ticks(2)


class TestPlanted:
    @pytest.mark.parametrize("model_type", ["falcon_h1", "minimax"])
    @pytest.mark.parametrize("role", ["linear", "attention"])
    def test_silent_mixers_cost_exactly_nothing(self, model_type: str, role: str) -> None:
        model = native_model(model_type)
        for mixer in find_mixers(model)[1]:
            if mixer.place.role == role:
                silence(mixer.module)
        audit = audit_of(model)
        survivor = "attention" if role == "linear" else "linear"
        for fill in audit.fills.values():
            assert fill.recovered[survivor] == Estimate(1.0, (1.0, 1.0))
            assert fill.attribution.linear_share.value == pytest.approx(0 if role == "linear" else 1)
        assert audit.control[role].cost == ZERO
        costs = {layer.mixer.place.role: layer.cost for layer in audit.layers}
        assert all(costs[role][fill] == ZERO for fill in audit.fills)
        assert all(costs[survivor][fill] != ZERO for fill in audit.fills)
        assert audit.verdict.word == audit.verdict.mean_word == f"{role}_unused"

    def test_constant_mixer_is_missed_as_zeros_but_not_as_its_mean(self) -> None:
        """RecurrentGemma's projections have biases; means of a constant are that constant."""
        model = native_model("recurrent_gemma")
        block = find_mixers(model)[1][0]
        silence(block.module)
        with torch.no_grad():
            block.module.linear_out.bias.fill_(0.5)
        cost = audit_of(model).layers[0].cost
        assert abs(cost["zero"].value) > 0.01
        assert abs(cost["mean"].value) < 1e-6

    @pytest.mark.slow
    @pytest.mark.parametrize("model_type", NATIVE)
    def test_every_type_end_to_end(self, model_type: str, tmp_path: Path) -> None:
        model = native_model(model_type)
        before = {name: values.clone() for name, values in model.state_dict().items()}
        audit = audit_of(model, documents=10, length=16)
        assert [layer.mixer.place.layer for layer in audit.layers] == [
            index for index, held in enumerate(HOLDS[model_type]) for _ in held
        ]
        assert audit.model_type == model_type
        assert audit.fills["zero"].nll["none"].value > audit.nll.value
        paths = write_native([audit], tmp_path, context_length=16, data="its own text")
        assert NATIVE_TYPES[model_type].meaning.split("`")[0] in paths["md"].read_text()
        assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


class TestReport:
    def test_three_files(self, audit: NativeAudit, tmp_path: Path) -> None:
        paths = write_native([audit], tmp_path / "new", context_length=24, data="its own text")
        assert {path.name for path in paths.values()} == {"native.json", "native.md", "native.html"}
        page = paths["html"].read_text()
        assert page.count("<svg") == 2
        for words in ("FalconH1Mixer", "Only full forward passes", "every fifth document", "side by side"):
            assert words in page
            assert words in paths["md"].read_text()

    def test_json_is_strict_and_paired_with_the_audit(self, audit: NativeAudit, tmp_path: Path) -> None:
        paths = write_native([audit], tmp_path, context_length=24, data="its own text")
        content = json.loads(paths["json"].read_text(), parse_constant=pytest.fail)
        model = content["models"][0]
        assert content["kind"] == "native_audit"
        assert model["nll"]["both"]["value"] == pytest.approx(audit.nll.value)
        share = model["attribution"]["mean"]["linear_share"]
        assert share["value"] == pytest.approx(audit.fills["mean"].attribution.linear_share.value)
        assert "attention_given_linear" in model["attribution"]["zero"]
        assert [layer["role"] for layer in model["layers"]] == ["attention", "linear"] * 2
        assert model["layers"][1]["module"] == "model.layers.0.mamba"
        assert model["metric"]["documents"] == 12
        nll, tokens = model["documents"]["nll"], model["documents"]["tokens"]
        assert sum(nll["zero/none"]) / sum(tokens) == pytest.approx(model["nll"]["zero"]["none"]["value"])

    def test_documentation_names_every_field(self, audit: NativeAudit) -> None:
        text = DOCS.read_text(encoding="utf-8")
        described = set(re.findall(r"`([\w/]+)`", text))

        def keys(value: Any) -> set[str]:
            if isinstance(value, dict):
                found = set[str]().union(*(keys(item) for item in value.values()))
                return found if "zero/none" in value else found | value.keys()
            return set[str]().union(*(keys(item) for item in value)) if isinstance(value, list) else set()

        content = to_dict([audit], context_length=24, data="its own text")
        assert keys(content) <= described, keys(content) - described

    def test_documentation_has_the_whole_table(self) -> None:
        text = DOCS.read_text(encoding="utf-8")
        for model_type, kind in NATIVE_TYPES.items():
            row = next(line for line in text.splitlines() if line.startswith(f"| `{model_type}`"))
            for part in (kind.linear.name, kind.linear.kind, kind.attention.name, kind.arrangement):
                assert part in row
            assert f"`{kind.linear.name}` ({kind.linear.kind}; {kind.linear.returns})" in row

    def test_models_of_one_name_are_told_apart(self, audit: NativeAudit) -> None:
        from dataclasses import replace

        a, b = replace(audit, name="one/tiny"), replace(audit, name="two/tiny")
        assert native_labels([a, b]) == ["one/tiny", "two/tiny"]
        assert native_labels([a]) == ["tiny"]
