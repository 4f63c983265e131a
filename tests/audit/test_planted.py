"""Models whose attribution is known because every weight was set by hand.

One question a text: somewhere a marker of one of two kinds carries a class, and the last token asks for it.

    <bos> f f f N2 f f f f f f f ?N  2        the answer, class 2, stands behind the question

Layer 0, head 0 finds markers of kind N, layer 1, head 1 those of kind F, by softmax or by feature maps;
nothing else in the model does anything. A marker one token before the question is seen by the window (w = 4),
one twelve before is not (nor by windows in relay: the reach is 6). Maps of a head are `good` (they find the
marker wherever it is) or `dead` (they look at everything but markers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch

from equipoise.audit.attribution import DONOR, attribute
from equipoise.audit.depth import Depth, DepthSettings, attribute_depth
from equipoise.audit.depth_units import Unit, likelihood
from equipoise.audit.evaluate import RunNote, audit_model
from equipoise.audit.report import RunAudit
from equipoise.audit.verdict import gather, judge
from equipoise.config import HybridConfig
from equipoise.data.packing import EvaluationWindow
from equipoise.layers.interface import mixers_of
from equipoise.models.surgery import hybridize
from equipoise.statistics import Estimate, ScoreTable, bootstrap
from support import tiny_model

CLASSES = 4
BOS, FILLER, ASK = 1, 2, {"N": 4, "F": 5}
MARKER, ANSWER = {"N": 8, "F": 12}, 16  # and the classes' numbers on top
OUTPUT, VALUE, FLAG = 24, {"N": 12, "F": 16}, {"N": 20, "F": 21}  # places in the hidden state
ASKED = {"N": 22, "F": 23}
LENGTH = 24
NEAR, FAR = 1, 12  # distance from the question to the marker
HEAD_OF = {"N": (0, 0), "F": (1, 1)}
"""The layer and head that find each kind of marker."""

Maps = Literal["good", "dead"]
Kind = Literal["N", "F"]


def build(maps: Mapping[Kind, Maps]) -> Any:
    """The hybrid: w = 4, g = 0.5, overlapping."""
    donor = tiny_model(
        num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in donor.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        _embed(donor)
        for kind, (layer, head) in HEAD_OF.items():
            _search(donor.model.layers[layer].self_attn, head, kind)
        model = hybridize(donor, HybridConfig(window=4))
        for mixer in mixers_of(model):
            for phi in (mixer.phi_q, mixer.phi_k):
                phi.weight.copy_(10 * torch.eye(8).expand_as(phi.weight))
        for kind, (layer, head) in HEAD_OF.items():
            if maps[kind] == "dead":
                mixers_of(model)[layer].phi_k.weight[head].neg_()
    return model.eval()


def _embed(donor: Any) -> None:
    """A token's own place, its flags and its class; the head reads the class found."""
    table, readout = donor.model.embed_tokens.weight, donor.lm_head.weight
    for token in range(3):
        table[token, token] = 1
    for kind in ("N", "F"):
        table[ASK[kind], ASKED[kind]] = 1
        for number in range(CLASSES):
            table[MARKER[kind] + number, FLAG[kind]] = 1
            table[MARKER[kind] + number, VALUE[kind] + number] = 1
    for number in range(CLASSES):
        table[ANSWER + number, 3] = 1
        readout[ANSWER + number, OUTPUT + number] = 4


def _search(attention: Any, head: int, kind: Kind) -> None:
    """Questions of this kind look for its markers, everything else for anything but those.

    The third pair of rotary dimensions turns by 1e-9 a token: there, q and k do not depend on position.
    """
    start, slot = 8 * head, 8 * head + 3
    everything = [place for place in range(24) if place != ASKED[kind]]
    attention.q_proj.weight[slot, everything] = -4
    attention.q_proj.weight[slot, ASKED[kind]] = 4
    attention.k_proj.weight[slot, [0, 1, 2, 3, *ASKED.values(), *FLAG.values()]] = -1
    attention.k_proj.weight[slot, FLAG[kind]] = 1
    for number in range(CLASSES):
        attention.v_proj.weight[start + number, VALUE[kind] + number] = 1
        attention.o_proj.weight[OUTPUT + number, start + number] = 100


def question(document: int, kind: Kind, distance: int, number: int) -> EvaluationWindow:
    """One text; only the answer counts."""
    ids = torch.full((LENGTH,), FILLER)
    ids[0], ids[-2], ids[-1] = BOS, ASK[kind], ANSWER + number
    ids[-2 - distance] = MARKER[kind] + number
    labels = torch.full((LENGTH,), -100)
    labels[-1] = ids[-1]
    return EvaluationWindow(document=document, start=0, input_ids=ids, labels=labels)


def texts(share_of_f: float, *, distances: Mapping[Kind, int], documents: int = 40) -> list[EvaluationWindow]:
    """Documents of 2 to 7 questions, each of kind F with this probability."""
    rng = np.random.default_rng(3)
    made: list[EvaluationWindow] = []
    for document in range(documents):
        for _ in range(rng.integers(2, 8)):
            kind: Kind = "F" if rng.random() < share_of_f else "N"
            made.append(question(document, kind, distances[kind], int(rng.integers(CLASSES))))
    return made


@dataclass(frozen=True)
class Case:
    """A planted model, its texts, and what must come out."""

    maps: Mapping[Kind, Maps]
    share_of_f: float
    distances: Mapping[Kind, int]
    window: float
    linear: float
    use: str


CASES = {
    "linear branch is zero": Case(
        {"N": "dead", "F": "dead"}, 0.0, {"N": NEAR, "F": NEAR}, window=1, linear=0, use="collapsed"
    ),
    "window branch is zero": Case(
        {"N": "dead", "F": "good"}, 1.0, {"N": NEAR, "F": FAR}, window=0, linear=1, use="linear_only"
    ),
    "both carry half": Case(
        {"N": "dead", "F": "good"}, 0.5, {"N": NEAR, "F": FAR}, window=0.5, linear=0.5, use="balanced"
    ),
    "redundant pair": Case(
        {"N": "good", "F": "dead"}, 0.0, {"N": NEAR, "F": NEAR}, window=0.5, linear=0.5, use="redundant"
    ),
}
EXACT = 0.002
"""Of the whole: how far a softmax of hand-set weights is from a look-up."""


def audited(case: Case) -> tuple[RunAudit, Any]:
    model, windows = build(case.maps), texts(case.share_of_f, distances=case.distances)
    run, table, _ = audit_model(model, windows, RunNote("planted", 0, 0, 0.0), batch_size=64, resamples=500)
    return run, table


def holds(value: Estimate, truth: float, slack: float = EXACT) -> bool:
    return value.ci95[0] - slack <= truth <= value.ci95[1] + slack


@pytest.mark.parametrize("name", CASES)
def test_attribution_and_use_of_planted_models(name: str) -> None:
    case = CASES[name]
    run, table = audited(case)
    score = {state: sums.sum() / table.weights.sum() for state, sums in table.sums.items()}
    assert score[DONOR] > -0.01  # the donor answers everything
    assert score["both"] > -0.05
    assert score["none"] < -3  # a guess among all tokens
    assert run.verdict.use == case.use
    total = score["both"] - score["none"]
    for reading in ("renormalised", "literal"):
        shares = run.attribution[reading]
        assert holds(shares.linear_share, case.linear)
        assert holds(shares.window, case.window * total, EXACT * total)
        assert holds(shares.linear, case.linear * total, EXACT * total)
        width = shares.linear_share.ci95[1] - shares.linear_share.ci95[0]
        assert width < 0.3  # it says something
        assert (width > 0.02) == (name == "both carry half")  # only there do documents differ


# ---- the same planted in tables of scores


# NLL of each state in nats per token: donor, both, window, linear, window renormalised, linear renormalised
TABLES: dict[str, tuple[float, ...]] = {
    "linear branch is zero": (2.0, 2.0, 2.0, 4.0, 2.0, 4.0),
    "window branch is zero": (2.0, 2.0, 4.0, 2.0, 4.0, 2.0),
    "both carry half": (2.0, 2.0, 3.0, 3.0, 3.0, 3.0),
    "redundant pair": (2.0, 2.0, 2.0, 2.0, 2.0, 2.0),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CASES)
def test_attribution_and_use_of_planted_tables(name: str, seed: int) -> None:
    """Documents of uneven length and difficulty, with noise in every state; no attention is at 4 nats."""
    case, rng = CASES[name], np.random.default_rng(seed)
    tokens = np.exp(rng.normal(6, 0.8, 128))
    difficulty = rng.normal(0, 0.5, 128)
    donor, both, window, linear, window_1, linear_1 = TABLES[name]
    levels = {
        "softmax": donor, "both": both, "window": window, "linear": linear, "none": 4.0, "sinks": 4.0,
        "window_renormalised": window_1, "linear_renormalised": linear_1,
    }  # fmt: skip
    nll = {s: tokens * (level + difficulty + rng.normal(0, 0.02, 128)) for s, level in levels.items()}
    draws = bootstrap(ScoreTable.from_nll(nll, tokens), resamples=500)
    verdict = judge(gather(draws), has_window=True, has_linear=True, benefit_reason="no text beyond reach")
    assert verdict.use == case.use
    for reading in ("renormalised", "literal"):
        shares = attribute(draws, reading)
        assert holds(shares.linear_share, case.linear, 0.006)  # 20 tests of 2 shares at 95% each
        assert holds(shares.window, 2 * case.window, 0.012)


# ---- taken apart by layer and head


def taken_apart(name: str, **settings: Any) -> tuple[Depth, float]:
    """A planted model under `attribute_depth`, and what attention is worth to it in all."""
    case = CASES[name]
    windows = texts(case.share_of_f, distances=case.distances, documents=12)
    chosen = DepthSettings(resamples=100, **settings)
    depth = attribute_depth(build(case.maps), likelihood(windows, batch_size=64), chosen)
    return depth, depth.states["both"].value - depth.states["none"].value


@pytest.mark.slow
def test_each_half_is_found_in_its_layer_and_head() -> None:
    """Window in layer 0, head 0; linear branch in layer 1, head 1; each half of the questions."""
    depth, total = taken_apart("both carry half", games=("window", "linear", "all"))
    halves = {Unit(0, "window"): 0.5, Unit(1, "linear"): 0.5}
    heads = {Unit(0, "window", 0): 0.5, Unit(1, "linear", 1): 0.5}
    for effects, planted in ((depth.layers, halves), (depth.heads, heads)):
        assert sum(effect.unit in planted for effect in effects) == 4  # two readings each
        for effect in effects:
            share = planted.get(effect.unit, 0.0)
            assert holds(effect.cost, share * total, EXACT * total)
            assert holds(effect.gain, share * total, EXACT * total)
    for game in depth.shapley:
        for player, value in zip(game.players, game.values, strict=True):
            assert holds(value, halves.get(player, 0.0) * total, EXACT * total)


@pytest.mark.slow
def test_a_redundant_pair_is_shared_out_where_both_play() -> None:
    """In its own game each branch is worth nothing, since the other does all the work."""
    depth, total = taken_apart("redundant pair", games=("window", "linear", "all"), heads=False)
    for game in depth.shapley:
        for player, value in zip(game.players, game.values, strict=True):
            planted = 0.5 if game.game == "all" and player.layer == 0 else 0.0
            assert value.value == pytest.approx(planted * total, abs=EXACT * total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "answer"), [("linear branch is zero", "less"), ("window branch is zero", "more")]
)
def test_random_layers_cost_more_than_a_dead_branch_and_less_than_the_one_that_works(
    name: str, answer: str
) -> None:
    opposite = {"less": "more", "more": "less"}
    depth, total = taken_apart(name, games=(), heads=False)
    for control in depth.control:
        assert control.answer == (answer if control.branch == "linear" else opposite[answer])
        # of four pairs of pieces, one of each branch or both of a layer, two hold the piece that works
        assert control.excess is not None
        assert abs(control.excess.value) == pytest.approx(total / 2, rel=0.01)


@pytest.mark.slow
def test_accuracy_as_the_score_tells_the_same() -> None:
    case = CASES["both carry half"]
    windows = texts(case.share_of_f, distances=case.distances, documents=12)
    documents = sorted({window.document for window in windows})

    def accuracy(model: Any) -> tuple[np.ndarray, np.ndarray]:
        right, asked = np.zeros(len(documents)), np.zeros(len(documents))
        ids = torch.stack([window.input_ids for window in windows])
        with torch.no_grad():
            answers = model(ids[:, :-1], use_cache=False).logits[:, -1]
        for window, answer in zip(windows, answers, strict=True):
            known = bool(answer.max() > 0.1)  # dead maps leave a trace of 1e-6 of the answer
            right[window.document] += known and int(answer.argmax()) == int(window.input_ids[-1])
            asked[window.document] += 1
        return right, asked

    settings = DepthSettings(metric="accuracy", unit="share of questions", resamples=100)
    depth = attribute_depth(build(case.maps), accuracy, settings)
    assert depth.states["both"].value == 1
    assert depth.states["none"].value == 0
    share_of_f = np.mean([window.input_ids[-2] == ASK["F"] for window in windows])
    found = {effect.unit: effect.cost.value for effect in depth.heads if effect.reading == "literal"}
    assert found[Unit(1, "linear", 1)] == pytest.approx(share_of_f)
    assert found[Unit(0, "window", 0)] == pytest.approx(1 - share_of_f)
    assert sum(found.values()) == pytest.approx(1)
