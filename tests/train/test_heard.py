"""Which linear branches a hybrid listens to."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from equipoise import branches
from equipoise.data.packing import collate
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.branches import observe
from equipoise.ops import Branches
from equipoise.train.heard import as_json, heard, part_of, tell

SHUT = 40.0
"""A logit of the window's weight from which nothing is left for the other branch in float32."""


def gated(recipe: Any, hybrid: Any, **settings: Any) -> Any:
    """Both branches in heads 1 and 3 of both layers, a gate per head; layer 1 does not listen to head 3."""
    model = hybrid(recipe(hybrid={"gate": "per_head", "linear_heads": [1, 3], **settings}))
    with torch.no_grad():
        mixers_of(model)[1].gate_logit[3] = SHUT
    return model.eval()


def test_it_is_weighed_by_the_square_of_what_windows_lose(
    recipe: Any, hybrid: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise.train.losses.AT_ONCE", 5)  # several pieces a row, and a rest
    model, some = gated(recipe, hybrid), [rows[i] for i in range(3)]
    found = heard(model, some)
    assert {layer: set(of) for layer, of in found.items()} == {0: {1, 3}, 1: {1, 3}}
    assert found[1][3] == pytest.approx(0, abs=1e-6)

    sums, total = torch.zeros(2), 0.0
    for row in some:
        arguments = {name: tensor for name, tensor in collate([row]).items() if name != "labels"}
        inputs = list[LayerInputs]()

        def observer(
            mixer: HybridMixer, given: LayerInputs, output: Tensor, seen: list[LayerInputs] = inputs
        ) -> None:
            if mixer.layer_idx == 0:
                seen.append(given)

        with torch.no_grad(), observe(model, observer):
            model(**arguments, use_cache=False)
            with branches(model, "softmax"):
                donor = model(**arguments, use_cache=False).logits[0].log_softmax(-1)
            with branches(model, "window", reading="renormalised"):
                near = model(**arguments, use_cache=False).logits[0].log_softmax(-1)
        weights = (donor.exp() * (donor - near)).sum(-1).square()
        segments = arguments["segment_ids"][0]
        weights[-1] = 0
        weights[:-1][segments[1:] != segments[:-1]] = 0  # what comes next belongs to another document
        mixer = mixers_of(model)[0]
        window, linear = (
            mixer.hybrid(inputs[0], branches=one)[0][0, [1, 3]].norm(dim=-1)
            for one in (Branches(linear=False), Branches(window=False))
        )
        sums += (weights * linear / (linear + window)).sum(-1)
        total += float(weights.sum())
    assert [found[0][head] for head in (1, 3)] == pytest.approx((sums / total).tolist(), rel=1e-4)


def test_windows_that_are_enough_say_nothing(recipe: Any, hybrid: Any, rows: Any) -> None:
    model = gated(recipe, hybrid, window=32)
    assert heard(model, [rows[0]]) == {}


def test_the_model_is_left_as_it_was(recipe: Any, hybrid: Any, rows: Any) -> None:
    model = gated(recipe, hybrid).train()
    heard(model, [rows[0]])
    assert model.training
    assert all(mixer.observer is None and mixer.mode.kind == "hybrid" for mixer in mixers_of(model))


def test_means_are_not_asked_where_others_look_things_up(recipe: Any, hybrid: Any, rows: Any) -> None:
    mean = {"feature_map": "constant", "feature_dim": 1, "mixing": "calibrated", "gate": "per_token"}
    model = hybrid(recipe(hybrid={"per_layer": {0: mean}})).eval()
    assert set(heard(model, [rows[0]])) == {1}


def test_parts_are_of_the_terms(recipe: Any, hybrid: Any) -> None:
    model, parts = gated(recipe, hybrid), list[Tensor]()

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        parts.append(part_of(mixer, inputs))

    with observe(model, observer), torch.no_grad():
        model(torch.arange(3, 15)[None], use_cache=False)
    first, second = parts
    assert first.shape == second.shape == (1, 2, 12)
    assert first.min() > 0.05
    assert second[:, 1].abs().max() < 1e-6


class TestTelling:
    def told(self, found: Any) -> str:
        console = Console(file=StringIO(), width=300)
        tell(found, console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def test_few_heads_are_named(self) -> None:
        shown = self.told({3: {2: 0.92, 3: 0.001}})
        assert "most: 0.92 in layer 3 head 2, 0.00 in layer 3 head 3" in shown
        assert "hardly heard: layer 3 head 3." in shown
        assert "gate_learning_rate" in shown

    def test_many_are_counted(self) -> None:
        shown = self.told({layer: dict.fromkeys(range(4), 0.1 * layer) for layer in range(4)})
        assert "0.00 to 0.30 in 16 heads" in shown
        assert "hardly heard: layer 0 head 0, layer 0 head 1, layer 0 head 2, layer 0 head 3." in shown
        deaf = self.told({0: dict.fromkeys(range(12), 0.0)})
        assert "layer 0 head 7 and 4 more." in deaf

    def test_nothing_is_said_of_nothing(self) -> None:
        assert self.told({}) == ""
        assert "hardly" not in self.told({0: {0: 0.5}})

    def test_json_has_strings_for_keys(self) -> None:
        assert as_json({3: {2: 0.5}}) == {"3": {"2": 0.5}}
