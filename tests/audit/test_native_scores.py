"""Which states of a native hybrid are scored, on what, and that no batch changes a score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from equipoise.audit.native_ablation import Place, ablated, find_mixers
from equipoise.audit.native_scores import (
    Ablation,
    NativeAuditError,
    batches,
    mean_outputs,
    passes,
    plan,
    random_sets,
    score_states,
    score_windows,
    split_windows,
)
from equipoise.audit.native_types import ROLES
from equipoise.data.packing import EvaluationWindow
from native_models import NATIVE, native_model
from support import random_tokens

ALTERNATING = [Place(0, "linear"), Place(1, "attention"), Place(2, "linear"), Place(3, "linear")]
PARALLEL = [Place(layer, role) for layer in range(3) for role in ROLES]


def windows(*lengths: int, documents: list[int] | None = None) -> list[EvaluationWindow]:
    made: list[EvaluationWindow] = []
    for index, length in enumerate(lengths):
        ids = random_tokens(length, seed=index)
        labels = ids.clone()
        labels[0] = -100
        document = index if documents is None else documents[index]
        made.append(EvaluationWindow(document=document, start=0, input_ids=ids, labels=labels))
    return made


class TestScoring:
    @pytest.mark.parametrize("model_type", NATIVE)
    def test_batches_do_not_matter(self, model_type: str) -> None:
        """Equal lengths are batched, nothing is padded: each document is what it is alone."""
        model, texts = native_model(model_type), windows(12, 9, 12, 12, 5)
        nll, tokens = score_windows(model, texts, batch_size=3)
        assert tokens.tolist() == [11, 8, 11, 11, 4]
        for index, text in enumerate(texts):
            with torch.no_grad():
                logits = model(input_ids=text.input_ids[None], use_cache=False).logits[0, :-1].double()
            alone = -logits.log_softmax(-1).gather(1, text.input_ids[1:, None]).sum().item()
            assert nll[index] == pytest.approx(alone, rel=1e-5)

    def test_nothing_is_padded(self) -> None:
        model, shapes = native_model("bamba"), []
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs: shapes.append(
                (tuple(kwargs["input_ids"].shape), bool(kwargs["attention_mask"].all()))
            ),
            with_kwargs=True,
        )
        texts = windows(9, 12, 12, 5, 12)
        score_windows(model, texts, batch_size=2)
        assert shapes == [((2, 12), True), ((1, 12), True), ((1, 9), True), ((1, 5), True)]
        assert batches(texts, 2) == 4

    def test_windows_of_a_document_add_up(self) -> None:
        model, texts = native_model("lfm2"), windows(12, 9, 12, 5, documents=[7, 2, 2, 7])
        nll, tokens = score_windows(model, texts, batch_size=2)
        alone, _ = score_windows(model, windows(12, 9, 12, 5), batch_size=1)
        np.testing.assert_allclose(nll, [alone[1] + alone[2], alone[0] + alone[3]], rtol=1e-6)
        assert tokens.tolist() == [8 + 11, 11 + 4]

    def test_states_are_what_they_say(self) -> None:
        model, texts = native_model("qwen3_next"), windows(12, 9, 12)
        places = [mixer.place for mixer in find_mixers(model)[1]]
        linear, attention = places[:3], places[3:]
        means = mean_outputs(model, texts, batch_size=2)
        ticks: list[int] = []
        states = plan(places, {"linear": [frozenset(places[1:])]})
        table = score_states(model, texts, states, means, batch_size=2, tick=lambda: ticks.append(1))
        expected = {
            "both": ([], None), "zero/attention": (linear, None), "zero/linear": (attention, None),
            "zero/none": (places, None), "mean/attention": (linear, means), "mean/none": (places, means),
            "zero/without linear of layer 1": (places[1:2], None),
            "mean/without attention of layer 3": (attention, means),
            "zero/random for linear 0": (places[1:], None),
        }  # fmt: skip
        for name, (out, fill) in expected.items():
            with ablated(model, out, fill):
                np.testing.assert_allclose(-table.sums[name], score_windows(model, texts, batch_size=2)[0])
        assert table.weights.tolist() == [11, 8, 11]
        # zero/without attention of layer 3 is zero/linear, and likewise for means: scored once
        assert len(ticks) == passes(states) * batches(texts, 2)
        assert passes(states) == len(states) - 2 == 14
        assert np.array_equal(table.sums["mean/linear"], table.sums["mean/without attention of layer 3"])

    def test_likelihood_that_is_not_finite(self) -> None:
        model = native_model("bamba")
        means = {Place(0, "linear"): torch.full((32,), torch.inf)}
        states = {"mean/attention": Ablation(frozenset(means), "mean")}
        with pytest.raises(NativeAuditError, match=r"finite.*'mean/attention'.*float32"):
            score_states(model, windows(5, 6), states, means, batch_size=2)

    def test_means_are_over_tokens_not_windows(self) -> None:
        model, texts = native_model("bamba"), windows(12, 3)
        place = Place(0, "linear")
        both, long, short = (
            mean_outputs(model, chosen, batch_size=4)[place] for chosen in (texts, texts[:1], texts[1:])
        )
        assert both.dtype == torch.float64
        torch.testing.assert_close(both, (12 * long + 3 * short) / 15)


class TestSplit:
    def test_every_fifth_document_makes_the_means(self) -> None:
        texts = windows(*[6] * 14, documents=[0, 0, *range(1, 13)])
        split = split_windows(texts)
        assert {window.document for window in split.calibration} == {4, 9}
        assert {window.document for window in split.scored} == set(range(13)) - {4, 9}
        assert split.held_out
        assert split.calibration_text == (
            "the 12 tokens of every fifth document (2 in all), which are not scored"
        )

    def test_all_make_both_where_there_are_few(self) -> None:
        texts = windows(6, 7, 8, 9)
        split = split_windows(texts)
        assert split.calibration == split.scored == texts
        assert not split.held_out
        assert split.calibration_text.startswith("all 30 tokens of the 4 documents that are scored too")
        assert len(split_windows(windows(6, 7, 8, 9, 10)).scored) == 4


class TestRandomSets:
    @pytest.mark.parametrize("role", ROLES)
    def test_as_many_of_either_kind(self, role: Any) -> None:
        sets = random_sets(PARALLEL, role, draws=8, seed=3)
        own = frozenset(place for place in PARALLEL if place.role == role)
        assert len(set(sets)) == 8
        assert own not in sets
        assert all(len(chosen) == 3 and chosen <= set(PARALLEL) for chosen in sets)
        assert sets == random_sets(PARALLEL, role, draws=8, seed=3)
        assert sets != random_sets(PARALLEL, role, draws=8, seed=4)

    def test_all_there_are_where_they_are_few(self) -> None:
        """Three of four, without the linear ones themselves; one of four, without attention."""
        linear = random_sets(ALTERNATING, "linear", draws=5, seed=0)
        assert len(set(linear)) == 3
        assert all(Place(1, "attention") in chosen for chosen in linear)
        assert set(random_sets(ALTERNATING, "attention", draws=5, seed=0)) == {
            frozenset({place}) for place in ALTERNATING if place.role == "linear"
        }
