"""Diagnostics of attention against the T x T matrices they avoid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equipoise.audit import measures
from equipoise.audit.measures import MEASURES, Measure, measure
from equipoise.config import HybridConfig
from equipoise.data.packing import EvaluationWindow
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import LayerInputs
from equipoise.models.adapters import add_lora
from equipoise.models.auto import merge_adapters
from equipoise.models.branches import branches, capture, observe
from equipoise.models.surgery import hybridize
from equipoise.ops import Branches
from equipoise.ops.reference import visible_keys
from support import random_tokens, tiny_model

LENGTHS = (30, 17, 23)


def texts() -> list[EvaluationWindow]:
    made = []
    for index, length in enumerate(LENGTHS):
        ids = random_tokens(length, seed=index)
        made.append(EvaluationWindow(document=index, start=0, input_ids=ids, labels=ids.clone()))
    return made


def measured(model: Any, **options: Any) -> dict[str, Measure]:
    found, missing = measure(model, texts(), batch_size=2, resamples=20, **options)
    assert missing is None
    return {one.name: one for one in found}


def seen(model: Any, text: EvaluationWindow, *, donor: bool) -> dict[int, LayerInputs]:
    """What each layer's attention receives for one text, without padding."""
    kept: dict[int, LayerInputs] = {}

    def keep(mixer: Any, inputs: LayerInputs, output: Any) -> None:
        kept[mixer.layer_idx] = inputs

    with torch.no_grad(), capture(model, keep) if donor else observe(model, keep):
        model(text.input_ids[None], use_cache=False)
    return kept


def expected(model: Any, donor: bool) -> dict[str, torch.Tensor]:
    """Sums and counts of each measure by the definitions [2, layers, heads], from whole matrices."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, layer: int, values: torch.Tensor, count: float) -> None:
        total = sums.setdefault(name, torch.zeros(2, len(mixers_of(model)), 4, dtype=torch.float64))
        total[0, layer] += values.double()
        total[1, layer] += count

    for text in texts():
        for layer, inputs in seen(model, text, donor=donor).items():
            mixer = mixers_of(model)[layer]
            config, length = mixer.config, len(text.input_ids)
            causal, near = visible_keys(
                length, window=config.window, layout=config.layout, sinks=config.sinks,
                valid=[True] * length, segments=[0] * length,
            )  # fmt: skip
            outside = causal & ~near
            eligible = outside.any(-1)
            q, k, v = inputs.q[0].double(), inputs.k[0].double(), inputs.v[0].double()
            scores = q @ k.repeat_interleave(2, 0).mT * inputs.scale
            if donor:
                scores = scores.masked_fill(~causal, -torch.inf)
                weights = scores.softmax(-1)
                add("donor_entropy", layer, torch.special.entr(weights).sum((-1, -2)), length)
                if inputs.sink_logits is not None:
                    column = inputs.sink_logits.double()[:, None, None].expand(4, length, 1)
                    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
                mass = (weights * outside).sum(-1)
                add("donor_mass_outside", layer, mass[:, eligible].sum(-1), int(eligible.sum()))
                continue
            phi_q, phi_k = mixer.phi_q(inputs.q.double())[0], mixer.phi_k(inputs.k.double())[0]
            products = phi_q @ phi_k.repeat_interleave(4 // phi_k.shape[0], 0).mT
            alone = products * causal / (products * causal).sum(-1, keepdim=True)
            add("linear_entropy", layer, torch.special.entr(alone).sum((-1, -2)), length)
            sink = inputs.sink_logits
            add_hybrid(add, layer, mixer, scores, products, causal, near, eligible, sink)
            state = phi_k.mT @ v.repeat_interleave(phi_k.shape[0] // 2, 0)
            for head in range(4):
                singular = torch.linalg.svdvals(state[head * phi_k.shape[0] // 4])
                shares = singular / singular.sum()
                rank = torch.zeros(4).double()
                rank[head] = (-(shares * shares.log()).sum()).exp()
                add("effective_rank", layer, rank, float("nan"))
                rank[head] = (singular**2).sum() / singular.max() ** 2
                add("stable_rank", layer, rank, float("nan"))
            for name, on in (("window", Branches(True, False)), ("linear", Branches(False, True))):
                norms = mixer.hybrid(inputs, branches=on)[0][0].norm(dim=-1)
                add(f"{name}_norm", layer, norms.sum(-1), length)
    for name in ("effective_rank", "stable_rank"):
        if name in sums:
            sums[name][1] = len(LENGTHS)
    return {name: total[0] / total[1] for name, total in sums.items()}


def add_hybrid(
    add: Any, layer: int, mixer: Any, scores: Any, products: Any, causal: Any, near: Any, eligible: Any,
    sink: Any,
) -> None:  # fmt: skip
    config = mixer.config
    far = causal if config.overlap else causal & ~near
    nothing = torch.full((4,), -torch.inf) if sink is None else sink
    nothing = nothing.double()[:, None, None]
    top = torch.maximum(scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True), nothing)
    window, rest = torch.exp(scores - top) * near, torch.exp(nothing - top)
    linear = products * far
    gate = config.gate_value
    if config.mixing == "convex":
        gate = torch.where(far.any(-1, keepdim=True), gate, 1.0)
        total = linear.sum(-1, keepdim=True)
        weights = gate * window / (window.sum(-1, keepdim=True) + rest) + (1 - gate) * torch.where(
            total > 0, linear / total, 0.0
        )
    else:
        weights = (gate * window + linear) / ((gate * window + linear).sum(-1, keepdim=True) + gate * rest)
    if sink is None:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    else:
        assert (weights.sum(-1) < 1).all()
    mass = (weights * (causal & ~near)).sum(-1)
    add("hybrid_mass_outside", layer, mass[:, eligible].sum(-1), int(eligible.sum()))


CONFIGS: dict[str, dict[str, Any]] = {
    "convex": {},
    "convex-disjoint": {"overlap": False, "gate_value": 0.3, "sinks": 2},
    "shared": {"mixing": "shared", "overlap": False, "gate_value": 0.2},
    "terraced": {"mixing": "shared", "overlap": False, "layout": "terraced"},
    "key-value-maps": {"map_heads": "key_value", "feature_multiple": 1},
}


@pytest.mark.parametrize("block", [64, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_whole_matrices(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "BLOCK", block)
    assert_measured(hybridize(tiny_model(), HybridConfig(window=4, **CONFIGS[name])))


@pytest.mark.parametrize("name", ["convex", "shared"])
def test_sink_logits_take_their_part(name: str) -> None:
    donor = tiny_model("gpt_oss", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    for layer in donor.model.layers:
        layer.self_attn.sinks.data += 2.0
    assert_measured(hybridize(donor, HybridConfig(window=4, **CONFIGS[name])))


def assert_measured(model: Any) -> None:
    got = measured(model)
    assert set(got) == set(MEASURES)
    for truth in (expected(model, donor=True), expected(model, donor=False)):
        for measure_name, values in truth.items():
            found = torch.tensor([[cell.value for cell in row] for row in got[measure_name].values])
            torch.testing.assert_close(found.double(), values, rtol=1e-4, atol=1e-5, msg=measure_name)


def test_intervals_and_layers() -> None:
    model = hybridize(tiny_model(num_hidden_layers=3), HybridConfig(window=4, layers=[0, 2]))
    got = measured(model)["donor_entropy"]
    assert list(got.layers) == [0, 2]
    assert all(cell.ci95[0] < cell.value < cell.ci95[1] for row in got.values for cell in row)
    assert all(mixer.observer is None for mixer in mixers_of(model))


def test_what_attention_that_sees_nothing_far_looks_like() -> None:
    """A window that covers the text leaves no mass outside it to measure."""
    got = measured(hybridize(tiny_model(), HybridConfig(window=64)))
    assert not any(cell.value >= 0 for row in got["donor_mass_outside"].values for cell in row)


def test_signed_features_have_no_mass_and_no_entropy() -> None:
    got = measured(hybridize(tiny_model(), HybridConfig(window=4, feature_map="none")))
    for name in ("hybrid_mass_outside", "linear_entropy"):
        assert not any(cell.value >= 0 or cell.value < 0 for row in got[name].values for cell in row)
    assert all(cell.defined for row in got["effective_rank"].values for cell in row)


@pytest.mark.parametrize(
    ("config", "absent"),
    [
        ({"window": None}, {"donor_mass_outside", "hybrid_mass_outside", "window_norm"}),
        (
            {"feature_map": None, "window": 4},
            {"hybrid_mass_outside", "linear_entropy", "effective_rank", "stable_rank", "linear_norm"},
        ),
    ],
)
def test_models_of_one_branch(config: dict[str, Any], absent: set[str]) -> None:
    assert set(measured(hybridize(tiny_model(), HybridConfig(**config)))) == set(MEASURES) - absent


def test_a_donor_that_is_gone_is_said_to_be() -> None:
    model = hybridize(tiny_model(), HybridConfig(window=4))
    add_lora(model, rank=2, alpha=4.0, targets=["q_proj"])
    merge_adapters(model)
    found, missing = measure(model, texts(), batch_size=2, resamples=20)
    assert missing is not None
    assert "merged" in missing
    assert not {one.name for one in found} & {"donor_entropy", "donor_mass_outside"}
    with branches(model, "both"):
        assert {one.name for one in found} >= {"linear_entropy", "effective_rank"}
