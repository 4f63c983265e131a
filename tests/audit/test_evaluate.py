"""Scoring documents in every branch state, and audits of hybrids made to lean on one branch or the other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.audit.attribution import KEPT, UNTRAINED
from equipoise.audit.evaluate import (
    CONTROL_SINKS,
    GUARDED,
    STATES,
    RunNote,
    audit_model,
    guard_counts,
    score_documents,
)
from equipoise.audit.report import CONTROL, AuditReport, Donor, Metric, to_dict, validate_audit
from equipoise.config import HybridConfig
from equipoise.data.packing import EvaluationWindow
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode
from equipoise.models.adapters import add_lora
from equipoise.models.auto import merge_adapters
from equipoise.models.branches import branches, capture
from equipoise.models.families import ConversionError
from equipoise.models.layout import state_bytes
from equipoise.models.storage import CheckpointError
from equipoise.models.surgery import hybridize
from equipoise.ops import Branches
from equipoise.ops.transfer_loss import transfer_cross_entropy
from support import random_tokens, tiny_model

NOTE = RunNote("test", 7, 100, 1.5)


def hybrid(donor: Any = None, **config: Any) -> Any:
    """A tiny hybrid with window 4; two layers of head_dim 8."""
    return hybridize(tiny_model() if donor is None else donor, HybridConfig(**{"window": 4, **config}))


def windows(*lengths: int, documents: list[int] | None = None, unlabelled: int = 1) -> list[EvaluationWindow]:
    made = []
    for index, length in enumerate(lengths):
        ids = random_tokens(length, seed=index)
        labels = ids.clone()
        labels[:unlabelled] = -100
        document = index if documents is None else documents[index]
        made.append(EvaluationWindow(document=document, start=0, input_ids=ids, labels=labels))
    return made


def score(model: nn.Module, texts: list[EvaluationWindow], **options: Any) -> Any:
    options = {"beyond": None, "batch_size": 3, "tick": lambda: None, **options}
    return score_documents(model, texts, **options)


class TestGuards:
    def test_a_healthy_model_has_nothing_to_tell(self) -> None:
        found = guard_counts(hybrid(), windows(20, 9))
        assert found is not None
        assert (found.windows, found.features, found.denominators, found.layers) == (2, 0, 0, ())
        assert found.state < 1e-6

    def test_counts_of_the_first_windows_by_layer(self) -> None:
        model = hybrid(feature_map="relu")
        broken = mixers_of(model)[1]
        assert broken.phi_q is not None
        with torch.no_grad():
            for parameter in broken.phi_q.parameters():
                parameter.zero_()  # no query has a feature that is not 0
        texts = windows(*range(5, 5 + GUARDED + 2))
        found = guard_counts(model, texts)
        assert found is not None
        tokens = sum(len(text.input_ids) for text in texts[:GUARDED])
        own = guard_counts(hybrid(feature_map="relu"), texts)
        assert own is not None
        assert found.windows == GUARDED
        assert found.denominators >= broken.heads * tokens > own.denominators
        assert 1 in found.layers

    def test_features_that_overflow(self) -> None:
        model = hybrid(feature_map="exp")
        first, second = mixers_of(model)
        assert first.phi_k is not None
        first.phi_k.register_forward_hook(lambda module, given, out: out * torch.inf)
        found = guard_counts(model, windows(12))
        assert found is not None
        assert found.features > 0
        assert 0 in found.layers

    def test_windows_alone_have_none(self) -> None:
        assert guard_counts(hybrid(feature_map=None), windows(9)) is None


class TestScores:
    def test_sums_are_those_of_each_document_alone(self) -> None:
        model = hybrid()
        texts = windows(20, 9, 33, 2, 14, documents=[5, 2, 5, 9, 2], unlabelled=1)
        texts[2].labels[10:15] = -100
        scores = score(model, texts, beyond=8)
        expected = np.zeros((4, 3))
        for text in texts:
            with torch.no_grad():
                logits = model(text.input_ids[None], use_cache=False).logits[0, :-1].double()
            losses = -logits.log_softmax(-1).gather(1, text.input_ids[1:, None])[:, 0]
            kept = text.labels[1:] != -100
            far = kept & (torch.arange(len(kept)) > 8)
            column = [2, 5, 9].index(text.document)
            for row, (values, mask) in enumerate(((losses, kept), (kept, kept), (losses, far), (kept, far))):
                expected[row, column] += values[mask].double().sum().item()
        got = np.stack([scores.nll, scores.tokens, scores.far_nll, scores.far_tokens])
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert scores.tokens.tolist() == [8 + 13, 19 + 32 - 5, 1]

    @pytest.mark.parametrize("batch_size", [1, 2, 50])
    @pytest.mark.parametrize("state", ["both", "window", "linear", "softmax", "sinks"])
    def test_batches_and_padding_do_not_matter(self, state: str, batch_size: int) -> None:
        model, texts = hybrid(overlap=False), windows(20, 9, 33, 2, 14)
        with branches(model, state):
            one, other = score(model, texts, batch_size=batch_size), score(model, texts[::-1], batch_size=3)
        np.testing.assert_allclose(one.nll, other.nll, rtol=1e-5)
        np.testing.assert_array_equal(one.tokens, other.tokens)

    @pytest.mark.parametrize(("beyond", "far"), [(None, 0), (0, 8), (1, 7), (7, 1), (8, 0)])
    def test_far_tokens_are_predicted_from_beyond_the_cut(self, beyond: int | None, far: int) -> None:
        """Ten tokens: nine predictions, from positions 0 to 8."""
        scores = score(hybrid(), windows(10), beyond=beyond)
        assert scores.tokens.tolist() == [9]
        assert scores.far_tokens.tolist() == [far]
        assert (scores.far_nll > 0).tolist() == [far > 0]

    def test_ticks_once_a_batch(self) -> None:
        ticks: list[int] = []
        score(hybrid(), windows(5, 6, 7, 8), tick=lambda: ticks.append(1))
        assert len(ticks) == 2


def audit(model: Any, texts: list[EvaluationWindow], **options: Any) -> Any:
    return audit_model(model, texts, NOTE, **{"resamples": 200, **options})


class TestAudit:
    def test_every_state_in_a_valid_report(self) -> None:
        model, texts = hybrid(), windows(30, 40, 25, 31)
        ticks: list[int] = []
        run, table, donor = audit(model, texts, tick=lambda: ticks.append(1))
        assert set(table.sums) == {*STATES, CONTROL, UNTRAINED}
        assert set(run.states) == set(table.sums) - {"softmax"}
        assert len(ticks) == len(table.sums)
        assert all(mixer.mode == AttentionMode() for mixer in mixers_of(model))
        report = AuditReport(
            donor=Donor.of(table, name="tiny"),
            metric=Metric.of(table, context_length=40, data="noise"),
            runs=[run],
        )
        written = json.loads(json.dumps(to_dict(report)))
        validate_audit(written)
        facts = written["runs"][0]
        assert (facts["recipe"], facts["seed"], facts["train_tokens"]) == ("test", 7, 100)
        assert (facts["state_bytes"], facts["reach"]) == (state_bytes(model), 6)
        assert facts["layers"] == {"converted": [0, 1], "local": [], "softmax": []}

    def test_states_are_what_their_names_say(self) -> None:
        model, texts = hybrid(), windows(30, 40)
        _, table, donor = audit(model, texts)
        plain = score(tiny_model(), texts)
        np.testing.assert_allclose(donor.nll, plain.nll, rtol=1e-5)
        for name, (state, reading) in STATES.items():
            with branches(model, state, reading=reading):
                np.testing.assert_allclose(
                    -table.sums[name], score(model, texts, batch_size=8).nll, rtol=1e-6
                )
        assert len({round(float(sums.sum()), 6) for sums in table.sums.values()}) == len(table.sums)

    def test_untrained_maps_are_those_of_the_runs_seed(self) -> None:
        """And the trained ones are back in place afterwards."""
        texts, model = windows(30, 40), hybridize(tiny_model(), HybridConfig(window=4), seed=NOTE.seed)
        with branches(model, "linear", reading="renormalised"):
            untrained = score(model, texts)
        with torch.no_grad():
            for mixer in mixers_of(model):
                mixer.phi_k.weight.mul_(-2)
        before = [p.clone() for mixer in mixers_of(model) for p in mixer.parameters()]
        _, table, _ = audit(model, texts)
        np.testing.assert_allclose(-table.sums[UNTRAINED], untrained.nll, rtol=1e-5)
        assert not np.allclose(table.sums["linear_renormalised"], table.sums[UNTRAINED], rtol=1e-4)
        after = [p for mixer in mixers_of(model) for p in mixer.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))

    def test_known_donor_is_not_run_again(self) -> None:
        model, texts = hybrid(), windows(30, 40)
        _, _, donor = audit(model, texts)
        ticks: list[int] = []
        _, table, again = audit(model, texts, donor=donor, tick=lambda: ticks.append(1))
        assert again is donor
        assert len(ticks) == len(table.sums) - 1
        np.testing.assert_array_equal(-table.sums["softmax"], donor.nll)

    def test_donor_and_control_run_without_adapters(self) -> None:
        """Untrained, both of them; all other states keep the adapters on."""
        texts = windows(30, 40)
        _, plain, _ = audit(hybrid(), texts)
        tuned = hybrid()
        add_lora(tuned, rank=2, alpha=4.0, targets=["q_proj", "v_proj"])
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.5)
        _, table, _ = audit(tuned, texts)
        for state in ("softmax", CONTROL):
            np.testing.assert_allclose(table.sums[state], plain.sums[state], rtol=1e-6)
        for state in {*STATES, "softmax_lora"} - {"softmax", "none"}:
            if state == "softmax_lora":  # what the adapters alone do to the donor
                assert not np.allclose(table.sums[state], plain.sums["softmax"], rtol=1e-4)
                continue
            assert not np.allclose(table.sums[state], plain.sums[state], rtol=1e-4)

    def test_merged_adapters_are_refused(self) -> None:
        model = hybrid()
        add_lora(model, rank=2, alpha=4.0, targets=["q_proj"])
        merge_adapters(model)
        with pytest.raises(ConversionError, match="merged"):
            audit(model, windows(10, 12))

    def test_model_that_is_not_converted(self) -> None:
        with pytest.raises(ConversionError, match="expected a converted model"):
            audit(tiny_model(), windows(10, 12))


class TestBranchesInSomeHeads:
    def test_what_is_kept_is_where_the_scale_starts(self) -> None:
        own: dict[int, dict[str, Any]] = {0: {"feature_map": None}, 1: {"linear_heads": (1, 2)}}
        model, texts = hybrid(per_layer=own), windows(30, 40)
        run, table, _ = audit(model, texts)
        with branches(model, Branches(window=False, linear=False)):
            expected = score(model, texts, batch_size=8).nll
        np.testing.assert_allclose(-table.sums[KEPT], expected, rtol=1e-6)
        assert not np.allclose(table.sums[KEPT], table.sums["none"], rtol=1e-4)
        assert run.verdict.use not in ("window_only", "linear_only")  # whatever the first layer has
        assert "the layers and heads that keep a branch (0%)" in run.verdict.reason or (
            "what cannot be ablated" in run.verdict.reason
        )


class TestOneBranch:
    def test_without_a_window(self) -> None:
        run, table, _ = audit(hybrid(window=None), windows(30, 40))
        assert run.verdict.use == "linear_only"
        np.testing.assert_array_equal(table.sums["window"], table.sums["none"])
        np.testing.assert_allclose(table.sums["both"], table.sums["linear_renormalised"])

    def test_without_a_linear_branch(self) -> None:
        run, table, _ = audit(hybrid(feature_map=None, sinks=4), windows(30, 40))
        assert run.verdict.use == "window_only"
        assert UNTRAINED not in table.sums
        assert run.verdict.benefit == "untested"
        assert "SWA + sinks itself" in run.verdict.reason
        np.testing.assert_array_equal(table.sums["linear"], table.sums["none"])
        # the control of equal bytes is the model itself
        assert run.control.setting.window == 4
        np.testing.assert_allclose(table.sums[CONTROL], table.sums["both"])


def trained_donor(texts: list[EvaluationWindow], steps: int = 60) -> Any:
    """A tiny donor that has learned to look one or more tokens back, as these texts ask."""
    model = tiny_model(num_hidden_layers=1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.stack([text.input_ids for text in texts])
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def copied(distance: int, count: int = 12, length: int = 24) -> list[EvaluationWindow]:
    """Each token is the one so many places before it: attention has to look exactly there."""
    made = []
    for index in range(count):
        ids = random_tokens(distance, seed=index, vocab=20).repeat(-(-length // distance))[:length]
        labels = ids.clone()
        labels[:distance] = -100
        made.append(EvaluationWindow(document=index, start=0, input_ids=ids, labels=labels))
    return made


@pytest.fixture(scope="module")
def donor() -> Any:
    return trained_donor(copied(3), steps=150)


class TestVerdicts:
    """Hybrids of a donor that must look back 3 tokens."""

    def convert(self, donor: Any, **config: Any) -> Any:
        return hybrid(copy.deepcopy(donor), **config)

    def test_destroyed_linear_branch_is_collapse(self, donor: Any) -> None:
        """Maps that seek out what the donor looks away from: the window does all the work."""
        model = self.convert(donor, window=6, gate_value=0.9)
        for mixer in mixers_of(model):
            mixer.phi_q.weight.data.copy_(-3 * torch.eye(8))
            mixer.phi_k.weight.data.copy_(3 * torch.eye(8))
        run, table, donor_scores = audit(model, copied(3), resamples=500)
        none, both = table.sums["none"].sum(), table.sums["both"].sum()
        assert donor_scores.nll.sum() < -none / 2
        assert both > none
        assert run.verdict.use == "collapsed"
        shares = run.attribution["renormalised"]
        assert shares.window.value > 5 * abs(shares.linear.value)

    def test_window_that_sees_nothing_leaves_linear_attention(self, donor: Any) -> None:
        """A window of the token itself is no help here; maps exact enough answer alone."""
        model = self.convert(donor, window=1, gate_value=0.05, feature_map="exp")
        for mixer in mixers_of(model):
            learn_softmax(model, mixer, copied(3))
        run, table, _ = audit(model, copied(3), resamples=500)
        shares = run.attribution["renormalised"]
        assert shares.linear.value > 0
        assert shares.linear.value > 5 * abs(shares.window.value)
        assert run.verdict.use not in ("collapsed", "window_only", "balanced")
        assert -table.sums["linear_renormalised"].sum() < -table.sums["window_renormalised"].sum()


def learn_softmax(model: Any, mixer: Any, texts: list[EvaluationWindow], steps: int = 150) -> None:
    """Fit one layer's maps to its donor's attention weights."""
    ids = torch.stack([text.input_ids for text in texts])
    seen: list[Any] = []
    with torch.no_grad(), capture(model, lambda own, inputs, output: seen.append(inputs)):
        model(ids, use_cache=False)
    (inputs,) = seen
    optimizer = torch.optim.Adam(mixer.parameters(), lr=3e-2)
    for _ in range(steps):
        loss = transfer_cross_entropy(
            inputs.q, inputs.k, mixer.phi_q(inputs.q), mixer.phi_k(inputs.k), scale=inputs.scale
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class TestControl:
    def test_window_of_equal_bytes(self) -> None:
        """A layer: K and V of w tokens of 2 heads in 2 bytes; S and z of 4 heads, 16 features in 4."""
        model = hybrid()
        run, table, _ = audit(model, windows(30, 40))
        per_token = 2 * 2 * 8 * 2
        own = 4 * per_token + 4 * 16 * (8 + 1) * 4
        assert run.control.setting.state_bytes == 2 * own
        assert run.control.setting.sinks == CONTROL_SINKS
        window = run.control.setting.window
        assert (window + CONTROL_SINKS) * per_token <= own < (window + CONTROL_SINKS + 1) * per_token
        with branches(model, AttentionMode("swa", window=window, sinks=CONTROL_SINKS)):
            np.testing.assert_allclose(-table.sums[CONTROL], score(model, windows(30, 40), batch_size=8).nll)

    # one map per key/value head, D features: an equal window of 4 + 9 - 4 = 9, reach 16 over two layers
    SMALL = {"map_heads": "key_value", "feature_multiple": 1}

    def untested(self, model: Any, *lengths: int) -> str:
        run, _, _ = audit(model, windows(*lengths))
        assert run.verdict.benefit == "untested"
        return run.verdict.reason

    def test_reasons_why_benefit_is_untested(self) -> None:
        assert "the window of equal bytes (36 tokens) covers the whole context of 30" in self.untested(
            hybrid(), 30, 30
        )
        assert "(hybrid 6, SWA + sinks at equal bytes 16) in a context of 18 tokens" in self.untested(
            hybrid(**self.SMALL), 18, 18
        )
        assert "layers left with full softmax see everything" in self.untested(
            hybrid(layers=(0,), **self.SMALL), 40, 40
        )
        assert "fewer than two documents" in self.untested(hybrid(**self.SMALL), 60, 12)

    @pytest.mark.parametrize(("length", "tested"), [(22, False), (23, True)])
    def test_sinks_count_into_what_is_within_reach(self, length: int, tested: bool) -> None:
        """From position 20 the control sees token 4 by relay, 16 back, and tokens 0 to 3 as sinks: all.

        From position 21, token 4 is hidden; 23 tokens are predicted from positions up to 21.
        """
        run, _, _ = audit(hybrid(**self.SMALL), windows(length, length, length))
        assert (run.verdict.benefit != "untested") == tested

    def test_nothing_within_reach_hides_from_the_control(self) -> None:
        """What `beyond` claims, on the model: up to the cut a prediction depends on token 4, past it not."""
        model = hybrid(**self.SMALL)
        ids = random_tokens(1, 24)
        changed = ids.clone()
        changed[0, 4] = (ids[0, 4] + 1) % 60 + 3
        with torch.no_grad(), branches(model, AttentionMode("swa", window=9, sinks=CONTROL_SINKS)):
            differs = (model(ids).logits - model(changed).logits).abs().amax(-1)[0] > 0
        assert differs[20]
        assert not differs[21:].any()

    def test_benefit_is_measured_beyond_both_reaches(self) -> None:
        model, texts = hybrid(**self.SMALL), windows(60, 50, 55, 40)
        run, _, _ = audit(model, texts, resamples=500)
        both = score(model, texts, beyond=20)
        with branches(model, AttentionMode("swa", window=9, sinks=CONTROL_SINKS)):
            control = score(model, texts, beyond=20)
        gain = (control.far_nll - both.far_nll).sum() / both.far_tokens.sum()
        assert abs(gain) > 0.02
        assert run.verdict.benefit != "untested"
        wanted = "beneficial" if gain > 0 else "not_beneficial"
        assert run.verdict.benefit in (wanted, "inconclusive")


class TestRunNote:
    def test_from_run_json(self, tmp_path: Path) -> None:
        settings = {"data": {"source": "text.jsonl", "subset": None, "text_column": "body"}}
        note = {"recipe": "ssd", "seed": 3, "train_tokens": 5, "train_seconds": 1, "settings": settings}
        (tmp_path / "run.json").write_text(json.dumps(note))
        assert RunNote.read(tmp_path) == RunNote("ssd", 3, 5, 1.0, "text.jsonl", None, "body")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"recipe": "ssd"}'])
    def test_damaged(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run\.json: expected what .equipoise convert. writes"):
            RunNote.read(tmp_path)

    def test_model_without_one_goes_by_its_directory(self, tmp_path: Path) -> None:
        assert RunNote.read(tmp_path / "somewhere") == RunNote("somewhere", 0, 0, 0.0)
