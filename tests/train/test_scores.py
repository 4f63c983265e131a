"""Where scores start: at the donor's attention beyond windows, masks counted by hand in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.config import HybridConfig
from equipoise.data.packing import collate
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.branches import capture
from equipoise.models.surgery import hybridize
from equipoise.ops.reference import visible_keys
from equipoise.train import scores
from equipoise.train.scores import fit_scores, logistic
from equipoise.train.stages import transfer
from support import normal, padding_mask, random_tokens, segments_of, tiny_model

T = 40
MEANS: dict[str, Any] = {
    "mixing": "calibrated", "feature_map": "constant", "feature_dim": 1, "write_gate": "per_token",
    "linear_heads": (0, 1, 2, 3),
}  # fmt: skip
COMPETING: dict[str, Any] = {"mixing": "competing", "linear_heads": (1, 2)}
SETTINGS: dict[str, Any] = {"window": 6, "sinks": 2, "gate": "per_token", "head_windows": (6, 3)}


def converted(**more: Any) -> Any:
    """A tiny Llama whose attention is so sharp that scores of a start at 0 would have no weight."""
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
    return hybridize(model, HybridConfig(**{**SETTINGS, **more}))


def inputs(kind: str) -> dict[str, Tensor]:
    """Three rows: plain, padded left, or packed."""
    tokens, masked = {"input_ids": random_tokens(3, T)}, padding_mask("left", T, batch=3)
    assert masked is not None
    if kind == "left":
        return {**tokens, "attention_mask": masked.long()}
    if kind == "packed":
        return {**tokens, "segment_ids": segments_of(T, batch=3)}
    return tokens


def shares(model: Any, given: dict[str, Tensor], kind: str) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """By layer: the donor's share beyond windows, the linear branch's, both [H, n], and q [H, n, D]."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def observer(mixer: HybridMixer, seen: LayerInputs, output: Tensor) -> None:
        score = mixer.gate(seen.q)
        assert isinstance(score, Tensor)
        real = given.get("attention_mask", torch.ones(3, T)).bool()
        segments = given.get("segment_ids", torch.zeros(3, T, dtype=torch.int64))
        rows = list[tuple[Tensor, Tensor, Tensor]]()
        for row in range(3):
            inside, outside, count = (torch.empty(4, T, dtype=torch.float64) for _ in range(3))
            for head in range(4):
                whole, near = visible_keys(
                    T, window=mixer.windows[head], layout="sliding", sinks=2, valid=real[row].tolist(),
                    segments=segments[row].tolist(),
                )  # fmt: skip
                s = seen.q[row, head] @ seen.k[row, head // 2].mT * seen.scale
                inside[head] = s.masked_fill(~near, -torch.inf).logsumexp(-1)
                outside[head] = s.masked_fill(~(whole & ~near), -torch.inf).logsumexp(-1)
                count[head] = whole.sum(-1)
            weight = score[row]
            if mixer.config.mixing == "calibrated":
                weight = weight + count.log()  # every key counts 1 before training
            kept = torch.isfinite(outside).any(0) & real[row]
            donor, ours = ((x - inside).sigmoid()[:, kept] for x in (outside, weight))
            rows.append((donor, ours, seen.q[row][:, kept]))
        donor, ours, q = (torch.cat(of, 1) for of in zip(*rows, strict=True))
        found[mixer.layer_idx] = donor, ours, q

    with capture(model, observer), torch.no_grad():
        model(**given, use_cache=False)
    return found


@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
@pytest.mark.parametrize("own", [MEANS, COMPETING], ids=["calibrated", "competing"])
def test_shares_are_the_donors_as_far_as_q_tells(own: dict[str, Any], kind: str) -> None:
    """The cross entropy's gradient is 0: what is off has nothing to do with q, but for the ridge."""
    model, given = converted(**own), inputs(kind)
    before = shares(model, given, kind)
    errors = fit_scores(model, given, batch_size=2)
    after = shares(model, given, kind)
    assert sorted(errors) == [0, 1]
    heads = own["linear_heads"]
    for layer, mixer in enumerate(mixers_of(model)):
        for head in heads:
            donor, ours, q = (of[head] for of in after[layer])
            assert float((donor - ours).abs().mean()) == pytest.approx(float(errors[layer][head]), abs=1e-6)
            if kind == "plain":  # cross entropy is what is least, not this
                then = before[layer]
                assert (donor - ours).abs().mean() < (then[0][head] - then[1][head]).abs().mean()
            weight, bias = mixer.gate_weight, mixer.gate_logit
            assert weight is not None
            assert bias is not None
            ridge = scores.RIDGE * len(q)
            torch.testing.assert_close(q.T @ (donor - ours), ridge * weight[head].data, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close((donor - ours).sum(), ridge * bias[head, 0].data, rtol=1e-3, atol=1e-3)


def test_squares_of_q_are_fitted_too() -> None:
    """The gradient by their weights is 0 as well, and what is left to explain is less."""
    given = inputs("plain")
    linear, squared = (converted(**{**MEANS, "gate": gate}) for gate in ("per_token", "quadratic"))
    errors = [fit_scores(model, given, batch_size=2) for model in (linear, squared)]
    assert sum(float(of.mean()) for of in errors[1].values()) < sum(
        float(of.mean()) for of in errors[0].values()
    )
    after = shares(squared, given, "plain")
    for layer, mixer in enumerate(mixers_of(squared)):
        for head in MEANS["linear_heads"]:
            donor, ours, q = (of[head] for of in after[layer])
            assert mixer.gate_squares is not None
            ridge = scores.RIDGE * len(q) * mixer.gate_squares[head].data
            torch.testing.assert_close(q.square().T @ (donor - ours), ridge, rtol=1e-3, atol=1e-3)


def test_layers_without_scores_are_left_alone() -> None:
    plain: dict[str, Any] = {"mixing": "convex", "linear_heads": (0,)}
    model = converted(**plain, per_layer={0: MEANS})
    before = [mixer.gate_logit.clone() for mixer in mixers_of(model) if mixer.gate_logit is not None]
    assert list(fit_scores(model, inputs("plain"))) == [0]
    after = [mixer.gate_logit for mixer in mixers_of(model)]
    assert not torch.equal(before[0], after[0])  # pyright: ignore[reportArgumentType]
    assert torch.equal(before[1], after[1])  # pyright: ignore[reportArgumentType]
    assert fit_scores(converted(**plain), inputs("plain")) == {}


def test_one_score_for_a_head() -> None:
    model = converted(**{**MEANS, "gate": "per_head"})
    errors = fit_scores(model, inputs("plain"))
    assert all(mixer.gate_weight is None for mixer in mixers_of(model))
    assert max(float(of.max()) for of in errors.values()) < 0.5


def test_texts_within_the_window_change_nothing() -> None:
    model = converted(**MEANS)
    before = [parameter.clone() for mixer in mixers_of(model) for parameter in mixer.parameters()]
    short = {"input_ids": random_tokens(2, 3)}
    errors = fit_scores(model, short)
    assert all(float(of.abs().max()) == 0 for of in errors.values())
    after = [parameter for mixer in mixers_of(model) for parameter in mixer.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_long_texts_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = converted(**MEANS), converted(**MEANS)
    fit_scores(whole, inputs("plain"))
    monkeypatch.setattr(scores, "QUERIES", 13)
    fit_scores(part, inputs("plain"))
    one, other = (next(iter(mixers_of(of))).gate_logit for of in (whole, part))
    assert one is not None
    assert other is not None
    assert not torch.equal(one, other)


@pytest.mark.parametrize("fits", [True, False])
def test_stage_1_begins_there(fits: bool, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
    """At a learning rate that moves nothing."""
    own = {**MEANS, "window": 4, "gate": "per_token", "state_update": "additive"}
    objectives = {"hybrid-output": 1.0}
    stage = {
        "batch_size": 2, "max_steps": 1, "learning_rate": 1e-12, "objectives": objectives, "fit_scores": fits,
    }  # fmt: skip
    run = recipe(hybrid=own, transfer=stage)
    trained, untouched = hybrid(run), hybrid(run)
    transfer(trained, run, rows, tmp_path)
    if fits:
        first = collate([rows[index] for index in range(scores.ROWS)])
        fit_scores(untouched, {name: tensor for name, tensor in first.items() if name != "labels"})
    for ours, theirs in zip(mixers_of(trained), mixers_of(untouched), strict=True):
        assert ours.gate_weight is not None
        assert theirs.gate_weight is not None
        torch.testing.assert_close(ours.gate_weight, theirs.gate_weight, rtol=1e-4, atol=1e-5)
        assert bool(ours.gate_weight.abs().max() > 1e-3) == fits


@pytest.mark.parametrize("what", ["softcap", "sliding_window", "sink_logits"])
def test_what_donors_do_to_scores_counts(what: str) -> None:
    """Scores that are capped, windows of the donor's own, and learned sinks, which are no part of the far."""
    settings: dict[str, Any] = {**MEANS, "linear_heads": None, "window": 4, "sinks": 1}
    mixer = HybridMixer(HybridConfig(**settings), heads=2, kv_heads=1, head_dim=8, layer_idx=0).double()
    q, k, v = (2 * normal(1, heads, T, 8, seed=seed) for seed, heads in enumerate((2, 1, 1)))
    more: dict[str, Any] = {
        "softcap": 3.0, "sliding_window": 9, "sink_logits": torch.tensor([5.0, -5.0]).double(),
    }  # fmt: skip
    seen = scores.Seen()
    scores._look(mixer, LayerInputs(q, k, v, 0.5, **{what: more[what]}), seen)
    s = q[0] @ k[0, 0].mT * 0.5
    if what == "softcap":
        s = 3 * torch.tanh(s / 3)
    back = torch.arange(T)[:, None] - torch.arange(T)
    whole = (back >= 0) & (back < (9 if what == "sliding_window" else T))
    weights = s.exp() * whole
    beyond = (back >= 4) & (torch.arange(T) > 0)
    far, near = ((weights * part).sum(-1) for part in (beyond, ~beyond))
    others = torch.tensor([5.0, -5.0]).double().exp()[:, None] if what == "sink_logits" else 0.0
    kept = slice(5, None)  # the first token beyond a window of 4 and a sink
    near = near + others
    torch.testing.assert_close(seen.far[0], (far / (far + near))[:, kept])
    counted = torch.arange(1, T + 1).double().log()  # sums are of all keys, whatever the donor sees
    torch.testing.assert_close(seen.offset[0], (counted - near.log())[:, kept])


class TestLogistic:
    def test_it_finds_the_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shares that are a logistic function of x, behind offsets of dozens of nats."""
        x = torch.cat([normal(2, 400, 3, seed=1), torch.ones(2, 400, 1, dtype=torch.float64)], -1)
        wanted = torch.tensor([[1.0, -2.0, 0.5, 40.0], [0.2, 0.0, 3.0, 90.0]]).double()
        offset = normal(2, 400, seed=2) - wanted[:, 3:]
        target = (torch.einsum("hnd,hd->hn", x, wanted) + offset).sigmoid()
        monkeypatch.setattr(scores, "RIDGE", 1e-7)
        torch.testing.assert_close(logistic(x, target, offset), wanted, rtol=1e-2, atol=1e-2)

    def test_shares_of_0_and_1_are_no_trouble(self) -> None:
        x, target = normal(1, 50, 3, seed=1), (normal(1, 50, seed=3) > 0).double()
        found = logistic(x, target, torch.zeros(1, 50, dtype=torch.float64) - 90)
        assert torch.isfinite(found).all()
