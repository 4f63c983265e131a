"""Switching single layers and heads off, and what attribution in depth makes of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.audit.depth import DepthSettings, attribute_depth, random_sets
from equipoise.audit.depth_units import Scorer, Unit, head_units, layer_units, likelihood, without
from equipoise.config import HybridConfig
from equipoise.data.packing import EvaluationWindow
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode, LayerInputs
from equipoise.models.branches import branches
from equipoise.models.families import ConversionError
from equipoise.models.surgery import hybridize
from equipoise.ops import Branches
from equipoise.ops.reference import hybrid_attention_reference
from support import attention_inputs, padding_mask, random_tokens, tiny_model

READINGS = ("literal", "renormalised")


def hybrid(**config: Any) -> Any:
    """Two layers of four heads, window 4."""
    return hybridize(tiny_model(), HybridConfig(**{"window": 4, **config}))


def windows(*lengths: int) -> list[EvaluationWindow]:
    made = []
    for index, length in enumerate(lengths):
        ids = random_tokens(length, seed=index)
        labels = ids.clone()
        labels[0] = -100
        made.append(EvaluationWindow(document=index, start=0, input_ids=ids, labels=labels))
    return made


TEXTS = windows(20, 9, 26, 14)


class TestHeads:
    """Flags of one head each, [1, H], in a batch of any size."""

    @pytest.mark.parametrize("reading", READINGS)
    @pytest.mark.parametrize(
        ("mixing", "overlap"), [("convex", True), ("convex", False), ("shared", True), ("shared", False)]
    )
    def test_equals_the_definition(self, mixing: str, overlap: bool, reading: Any) -> None:
        """Every head on its own settings: both, window, linear, none."""
        mixer = mixers_of(hybrid(mixing=mixing, overlap=overlap, sinks=2, gate_value=0.3))[0]
        q, k, v = attention_inputs(11, batch=3, size=8)
        mask = padding_mask("holes", 11, batch=3)
        window, linear = (
            torch.tensor([[True, True, False, False]]),
            torch.tensor([[True, False, True, False]]),
        )
        inputs = LayerInputs(q, k, v, 8**-0.5, key_mask=mask)
        out, _ = mixer.hybrid(inputs, branches=Branches(window, linear, reading))
        expected = hybrid_attention_reference(
            q, k, v, mixer.phi_q(q), mixer.phi_k(k), window=4, mixing=mixing, gate=mixer.gate(q),
            overlap=overlap, key_mask=mask, sinks=2,
            branches=Branches(window.expand(3, -1), linear.expand(3, -1), reading),
        )  # fmt: skip
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        assert (out[:, 3] == 0).all()

    def test_decoding_equals_the_forward_pass(self) -> None:
        model, tokens = hybrid(overlap=False), random_tokens(2, 20)
        off = [Unit(0, "linear", 1), Unit(1, "window", 0), Unit(1, "window", 3)]
        with torch.no_grad(), without(model, off, "renormalised"):
            whole = model(tokens, use_cache=False).logits
            first = model(tokens[:, :13], use_cache=True)
            rest = model(tokens[:, 13:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


class TestWithout:
    def test_whole_branches_are_the_named_states(self) -> None:
        model, tokens = hybrid(), random_tokens(2, 15)
        units = layer_units(model)
        for state, off in (
            ("window", [unit for unit in units if unit.branch == "linear"]),
            ("linear", [unit for unit in units if unit.branch == "window"]),
            ("none", units),
            ("both", []),
        ):
            for reading in READINGS:
                with torch.no_grad(), without(model, off, reading):  # pyright: ignore[reportArgumentType]
                    got = model(tokens, use_cache=False).logits
                with torch.no_grad(), branches(model, state, reading=reading):  # pyright: ignore
                    torch.testing.assert_close(got, model(tokens, use_cache=False).logits)

    def test_all_heads_are_their_layer_and_one_is_not(self) -> None:
        model, tokens = hybrid(), random_tokens(2, 15)

        def logits(off: list[Unit]) -> torch.Tensor:
            with torch.no_grad(), without(model, off, "renormalised"):
                return model(tokens, use_cache=False).logits

        heads = [unit for unit in head_units(model) if (unit.layer, unit.branch) == (1, "linear")]
        assert len(heads) == 4
        layer = logits([Unit(1, "linear")])
        torch.testing.assert_close(logits(heads), layer)
        singles = [logits([head]) for head in heads]
        for one, other in itertools.combinations([*singles, layer, logits([])], 2):
            assert not torch.allclose(one, other, atol=1e-4)

    def test_modes_are_as_before_also_after_an_error(self) -> None:
        model = hybrid()
        with branches(model, "window", reading="renormalised"):
            before = [mixer.mode for mixer in mixers_of(model)]
            with pytest.raises(RuntimeError, match="stop"), without(model, [Unit(0, "window")], "literal"):
                raise RuntimeError("stop")
            assert [mixer.mode for mixer in mixers_of(model)] == before
        assert all(mixer.mode == AttentionMode() for mixer in mixers_of(model))

    @pytest.mark.parametrize("unit", [Unit(2, "window"), Unit(0, "linear", 4), Unit(0, "linear", -1)])
    def test_pieces_that_are_not_there(self, unit: Unit) -> None:
        with (
            pytest.raises(ValueError, match="expected a converted layer"),
            without(hybrid(), [unit], "literal"),
        ):
            pass

    def test_model_that_is_not_converted(self) -> None:
        with pytest.raises(ConversionError, match="expected a converted model"):
            layer_units(tiny_model())


class TestScorer:
    def test_scores_each_set_once(self) -> None:
        model, calls = hybrid(), list[int]()
        scorer = Scorer(model, likelihood(TEXTS), lambda: calls.append(1))
        heads = [unit for unit in head_units(model) if (unit.layer, unit.branch) == (0, "window")]
        first = scorer([Unit(0, "window")], "literal")
        np.testing.assert_array_equal(scorer(heads, "literal"), first)
        scorer([], "literal"), scorer([], "renormalised")
        assert len(calls) == 2
        assert not np.allclose(scorer([Unit(0, "window")], "renormalised"), first)
        assert len(calls) == 3

    def test_changing_weights_are_refused(self) -> None:
        weights = iter([np.ones(3), np.array([1.0, 1.0, 2.0])])
        scorer = Scorer(hybrid(), lambda model: (np.zeros(3), next(weights)))
        scorer([], "literal")
        with pytest.raises(ValueError, match="weighs the same documents alike"):
            scorer([Unit(0, "window")], "literal")


SETTINGS = DepthSettings(resamples=50, games=("window", "linear", "all"), budget=60)


@pytest.fixture(scope="module")
def taken_apart() -> tuple[Any, Any, dict[str, int], int]:
    model, stages, scored = hybrid(), dict[str, int](), list[int]()
    depth = attribute_depth(
        model, likelihood(TEXTS), SETTINGS, stage=stages.__setitem__, on_score=lambda: scored.append(1)
    )
    return model, depth, stages, len(scored)


class TestDepth:
    def test_effects_are_the_differences_they_say(self, taken_apart: Any) -> None:
        model, depth, _, _ = taken_apart
        score = likelihood(TEXTS)

        def value(off: list[Unit], reading: Any) -> float:
            with without(model, off, reading):
                sums, tokens = score(model)
            return float(sums.sum() / tokens.sum())

        for effects, units in ((depth.layers, layer_units(model)), (depth.heads, head_units(model))):
            assert [(e.reading, e.unit) for e in effects] == list(itertools.product(READINGS, units))
            for effect in (effects[0], effects[3], effects[-1]):
                whole = [unit for unit in units if unit.branch == effect.unit.branch]
                others = [unit for unit in whole if unit != effect.unit]
                cost = value([], "literal") - value([effect.unit], effect.reading)
                gain = value(others, effect.reading) - value(whole, effect.reading)
                assert effect.cost.value == pytest.approx(cost, abs=1e-6)
                assert effect.gain.value == pytest.approx(gain, abs=1e-6)
                assert effect.cost.ci95[0] < effect.cost.value < effect.cost.ci95[1]

    def test_shapley_values_add_up(self, taken_apart: Any) -> None:
        _, depth, _, _ = taken_apart
        assert [(g.game, g.reading) for g in depth.shapley] == list(
            itertools.product(SETTINGS.games, READINGS)
        )
        for game in depth.shapley:
            lacking = "none" if game.game == "all" else f"without {game.game}, {game.reading}"
            total = depth.states["both"].value - depth.states[lacking].value
            assert game.total.value == pytest.approx(total)
            assert sum(value.value for value in game.values) == pytest.approx(total)
            assert game.efficiency_gap < 1e-9
            assert game.stopped_by == "exact"
        # of two layers, the value is the mean of the two marginals that were measured
        for game in depth.shapley[:4]:
            for player, value in zip(game.players, game.values, strict=True):
                (effect,) = (e for e in depth.layers if (e.unit, e.reading) == (player, game.reading))
                assert value.value == pytest.approx((effect.cost.value + effect.gain.value) / 2)

    def test_nothing_is_scored_twice_nor_more_than_announced(self, taken_apart: Any) -> None:
        _, depth, stages, scored = taken_apart
        assert scored == depth.evaluations
        assert scored <= sum(stages.values())
        assert list(stages)[:3] == ["states", "layers", "heads"]
        assert stages["heads"] == 16 * 2 * 2

    def test_random_layers(self, taken_apart: Any) -> None:
        """Of four pieces two go: six sets, of which two are whole branches."""
        _, depth, _, _ = taken_apart
        assert [(c.branch, c.reading) for c in depth.control] == list(
            itertools.product(("window", "linear"), READINGS)
        )
        for control in depth.control:
            assert (control.removed, control.units, len(control.draws)) == (2, 4, 4)
            cost = (
                depth.states["both"].value
                - depth.states[f"without {control.branch}, {control.reading}"].value
            )
            assert control.cost.value == pytest.approx(cost)
            assert control.excess.value == pytest.approx(cost - np.mean(control.draws))
            low, high = control.excess.ci95
            expected = "more" if low > 0 else "less" if high < 0 else "no clear difference"
            assert control.answer == expected

    def test_drawn_layers_widen_the_interval(self) -> None:
        """With 2 of the 4 sets there are, the draws bring an error of their own."""
        settings = replace(SETTINGS, heads=False, games=())
        few, all_of_them = (
            attribute_depth(hybrid(), likelihood(TEXTS), replace(settings, draws=draws)).control[0]
            for draws in (2, 8)
        )

        def width(control: Any) -> float:
            return control.excess.ci95[1] - control.excess.ci95[0]

        error = np.std(few.draws, ddof=1) / math.sqrt(2)
        assert width(few) > 2 * 10 * error  # Student's quantile of one degree of freedom is 12.7
        assert width(all_of_them) < width(few)

    @pytest.mark.parametrize(
        ("config", "branch"), [({"window": None}, "linear"), ({"feature_map": None}, "window")]
    )
    def test_models_of_one_branch(self, config: dict[str, Any], branch: str) -> None:
        settings = replace(SETTINGS, heads=False)
        depth = attribute_depth(hybrid(**config), likelihood(TEXTS), settings)
        assert {effect.unit.branch for effect in depth.layers} == {branch}
        assert {game.game for game in depth.shapley} == {branch, "all"}
        assert depth.control == []
        assert depth.states[f"without {branch}, literal"].value == depth.states["none"].value

    def test_any_metric_can_be_the_score(self) -> None:
        """Share of tokens that are the likeliest, say."""
        texts = windows(12, 18, 9)

        def accuracy(model: Any) -> tuple[np.ndarray, np.ndarray]:
            hits = []
            for text in texts:
                with torch.no_grad():
                    guesses = model(text.input_ids[None], use_cache=False).logits[0, :-1].argmax(-1)
                hits.append(float((guesses == text.input_ids[1:]).sum()))
            return np.array(hits), np.array([11.0, 17.0, 8.0])

        settings = replace(SETTINGS, metric="accuracy", unit="share", heads=False)
        depth = attribute_depth(hybrid(), accuracy, settings)
        assert (depth.documents, depth.weight) == (3, 36)
        assert 0 <= depth.states["both"].value <= 1


def test_random_sets_are_different_seeded_and_avoid_what_they_should() -> None:
    units = [Unit(layer, branch) for layer in range(3) for branch in ("window", "linear")]
    pure = [frozenset(unit for unit in units if unit.branch == name) for name in ("window", "linear")]
    drawn = random_sets(units, 3, 10, avoid=pure, seed=1)
    assert len(set(drawn)) == 10
    assert {len(one) for one in drawn} == {3}
    assert not set(drawn) & set(pure)
    assert drawn == random_sets(units, 3, 10, avoid=pure, seed=1)
    assert drawn != random_sets(units, 3, 10, avoid=pure, seed=2)
    assert len(random_sets(units, 3, 100, avoid=pure, seed=1)) == math.comb(6, 3) - 2
    assert random_sets(units[:2], 1, 5, avoid=[frozenset(units[:1]), frozenset(units[1:2])], seed=0) == []
