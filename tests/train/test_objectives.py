"""Transfer objectives against formulas written out for one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.config import ConfigError, HybridConfig
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.ops import Branches
from equipoise.registry import UnknownNameError
from equipoise.train.objectives import OBJECTIVES, LayerTarget, weighted_sum
from equipoise.train.stages import transfer
from support import attention_inputs

LENGTH = 11


def target(*, key_mask: Tensor | None = None, **config: Any) -> LayerTarget:
    """A layer of 4 query and 2 key heads of 6 in float64, and its donor's output."""
    q, k, v = attention_inputs(LENGTH, value=6)
    mixer = HybridMixer(HybridConfig(window=3, **config), heads=4, kv_heads=2, head_dim=6, layer_idx=0)
    inputs = LayerInputs(q, k, v, scale=0.4, key_mask=key_mask)
    return LayerTarget(mixer.double(), inputs, softmax_weights(inputs) @ v.repeat_interleave(2, 1))


def visible(inputs: LayerInputs) -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    return mask if inputs.key_mask is None else mask & inputs.key_mask[:, None, None]


def softmax_weights(inputs: LayerInputs) -> Tensor:
    scores = inputs.q @ inputs.k.repeat_interleave(2, 1).mT * inputs.scale
    return scores.masked_fill(~visible(inputs), -torch.inf).softmax(-1).nan_to_num(0)


def linear_weights(layer: LayerTarget) -> Tensor:
    phi_q, phi_k = layer.features
    products = (phi_q @ phi_k.repeat_interleave(4 // phi_k.shape[1], 1).mT) * visible(layer.inputs)
    return products / products.sum(-1, keepdim=True).clamp_min(1e-300)


def test_the_delta_rule_has_no_weights() -> None:
    layer = target(feature_map="unit", state_update="delta", linear_heads=(1, 2))
    with pytest.raises(ConfigError, match="no weights on keys to compare; take output"):
        OBJECTIVES["weights"](layer)
    assert OBJECTIVES["output"](layer).isfinite()


@pytest.mark.parametrize("map_heads", ["query", "key_value"])
def test_weights_is_the_cross_entropy(map_heads: str) -> None:
    layer = target(map_heads=map_heads)
    a = linear_weights(layer).clamp_min(1e-300)
    expected = -(softmax_weights(layer.inputs) * a.log()).sum(-1).mean()
    torch.testing.assert_close(OBJECTIVES["weights"](layer), expected)


def test_rows_count_by_what_a_learned_sink_leaves_of_them() -> None:
    """The donor's own weights, which sum to less than one, also where its output is the target."""
    layer = target(gate_value=0.3)
    sink_logits = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    column = sink_logits[None, :, None, None].expand(2, 4, LENGTH, 1)
    scores = layer.inputs.q @ layer.inputs.k.repeat_interleave(2, 1).mT * layer.inputs.scale
    scores = scores.masked_fill(~visible(layer.inputs), -torch.inf)
    p = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    layer = replace(layer, inputs=replace(layer.inputs, sink_logits=sink_logits))
    expected = -(p * linear_weights(layer).clamp_min(1e-300).log()).sum(-1).mean()
    torch.testing.assert_close(OBJECTIVES["weights"](layer), expected)
    near = scores.masked_fill(torch.ones(LENGTH, LENGTH).tril(-3).bool(), -torch.inf)
    windowed = torch.cat([near, column], -1).softmax(-1)[..., :-1]
    mixed = (0.3 * windowed + 0.7 * linear_weights(layer)) @ layer.inputs.v.repeat_interleave(2, 1)
    expected = (mixed - layer.output).square().mean()
    torch.testing.assert_close(OBJECTIVES["hybrid-output"](layer), expected)


@pytest.mark.parametrize("map_heads", ["query", "key_value"])
@pytest.mark.parametrize("overlap", [True, False])
def test_output_compares_linear_attention_alone_over_all_keys(overlap: bool, map_heads: str) -> None:
    layer = target(overlap=overlap, map_heads=map_heads)
    alone = linear_weights(layer) @ layer.inputs.v.repeat_interleave(2, 1)
    expected = (alone - layer.output).square().mean()
    torch.testing.assert_close(OBJECTIVES["output"](layer), expected)


def test_hybrid_output_compares_the_mixture() -> None:
    layer = target(gate_value=0.3)
    near = visible(layer.inputs) & ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3)
    windowed = softmax_weights(layer.inputs) * near
    windowed = windowed / windowed.sum(-1, keepdim=True)
    mixed = (0.3 * windowed + 0.7 * linear_weights(layer)) @ layer.inputs.v.repeat_interleave(2, 1)
    expected = (mixed - layer.output).square().mean()
    torch.testing.assert_close(OBJECTIVES["hybrid-output"](layer), expected)


def test_hybrid_output_is_that_of_the_layer_itself() -> None:
    layer = target(mixing="shared", overlap=False, gate="per_head", gate_value=0.1)
    assert torch.equal(layer.hybrid(Branches()), layer.mixer.hybrid(layer.inputs)[0])


@pytest.mark.parametrize("name", ["weights", "output", "hybrid-output"])
def test_padding_counts_nothing(name: str) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 7:] = False
    padded = target(key_mask=mask)
    # what stands at padding does not matter, and the mean is over real tokens
    loss = OBJECTIVES[name](padded)
    padded.inputs.v[1, :, 7:] = 1e3
    padded.output[1, :, 7:] = -1e3
    torch.testing.assert_close(OBJECTIVES[name](padded), loss)
    whole = target()
    per_row = []
    for row, length in ((0, LENGTH), (1, 7)):
        cut = (slice(row, row + 1), slice(None), slice(0, length))
        inputs = LayerInputs(whole.inputs.q[cut], whole.inputs.k[cut], whole.inputs.v[cut], scale=0.4)
        per_row.append((length, OBJECTIVES[name](LayerTarget(whole.mixer, inputs, whole.output[cut]))))
    expected = sum(n * value for n, value in per_row) / sum(n for n, _ in per_row)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["weights", "output", "hybrid-output"])
def test_every_parameter_learns(name: str) -> None:
    layer = target(gate="per_head")
    OBJECTIVES[name](layer).backward()
    for parameter in (layer.mixer.phi_q.weight, layer.mixer.phi_k.weight):  # type: ignore[union-attr]
        assert parameter.grad.abs().max() > 0
    gate = layer.mixer.gate_logit
    assert gate is not None
    assert (gate.grad is not None and bool(gate.grad.any())) == (name == "hybrid-output")


def test_far_output_counts_tokens_by_their_weight() -> None:
    astray = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 7:] = False
    layer = replace(target(key_mask=mask, feature_map="hedgehog"), astray=astray)
    alone = layer.mixer.hybrid(layer.inputs, branches=Branches(window=False, reading="renormalised"))[0]
    errors = (alone - layer.output).square().mean((1, 3))
    weight = astray.square() * mask
    # every row counts alike, so that a row's share does not depend on what is beside it in a micro batch
    expected = ((weight * errors).sum(1) / weight.sum(1)).mean()
    together = (weight * errors).sum() / weight.sum()
    assert expected.item() != pytest.approx(together.item(), rel=1e-4)
    torch.testing.assert_close(OBJECTIVES["far-output"](layer), expected)
    whole = target(feature_map="hedgehog")
    even = replace(whole, astray=torch.full_like(astray, 0.3))
    torch.testing.assert_close(OBJECTIVES["far-output"](even), OBJECTIVES["output"](whole))
    nothing = OBJECTIVES["far-output"](replace(layer, astray=torch.zeros_like(astray)))
    assert nothing == 0  # windows are enough everywhere
    # a row where windows lose 0.001 nats everywhere has nothing to look up: it weighs a hundredth of one
    little = torch.full_like(astray, 1e-3)
    assert OBJECTIVES["far-output"](replace(whole, astray=little)).item() == pytest.approx(
        OBJECTIVES["output"](whole).item() / 100
    )
    assert weighted_sum({"far-output": 1.0, "output": 1.0}).is_far
    assert not weighted_sum({"output": 1.0}).is_far


def test_sum_weights_its_terms() -> None:
    layer = target()
    expected = 2 * OBJECTIVES["weights"](layer) + 1000 * OBJECTIVES["hybrid-output"](layer)
    torch.testing.assert_close(weighted_sum({"weights": 2.0, "hybrid-output": 1000.0})(layer), expected)


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"objective 'wieghts'\. Did you mean 'weights'\?"):
        weighted_sum({"wieghts": 1.0})


@pytest.fixture
def pull_to_zero() -> Iterator[str]:
    name = "pull-to-zero"

    @OBJECTIVES.register(name)
    def objective(layer: LayerTarget) -> Tensor:
        return torch.stack([p.square().sum() for p in layer.mixer.parameters()]).sum()

    assert objective is OBJECTIVES[name]
    yield name
    del OBJECTIVES._entries[name]


def test_new_objective_is_one_function(
    pull_to_zero: str, recipe: Any, hybrid: Any, rows: Any, tmp_path: Any
) -> None:
    """The design's acceptance test: registered here, it works by name in a whole stage."""
    run = recipe(transfer={"objectives": {pull_to_zero: 1.0}, "max_steps": 2, "batch_size": 4})
    model = hybrid(run)
    before = sum(float(p.detach().square().sum()) for n, p in model.named_parameters() if ".hybrid." in n)
    result = transfer(model, run, rows, tmp_path)
    after = sum(float(p.square().sum()) for n, p in model.named_parameters() if ".hybrid." in n)
    assert after < before
    assert result.history[0]["loss"] == pytest.approx(before / 2, rel=1e-5)  # mean over the two layers
