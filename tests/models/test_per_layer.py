"""Layers with settings of their own, heads without a linear branch, gated writing: through a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise import HybridConfig, branches, hybridize, reach, state_bytes
from equipoise.audit.measures import measure
from equipoise.config import ConfigError
from equipoise.data.packing import EvaluationWindow
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode, HybridMixer
from equipoise.layers.write_gates import WriteGate, WriteStrength
from equipoise.models.families import ConversionError
from support import normal, random_tokens, tiny_model

SETTINGS: dict[str, Any] = {
    "window": 6, "gate": "per_token", "write_gate": "per_token",
    "per_layer": {0: {"window": 4, "sinks": 2, "feature_map": None}, 1: {"linear_heads": (1, 3)}},
}  # fmt: skip
BY_HEAD: dict[str, Any] = {
    0: {"window": 4, "head_windows": (2, 4), "sinks": 2, "feature_map": None},
    1: {"linear_heads": (1, 3), "head_windows": (6, 2)},
}
"""Windows of single heads too."""
DELTA: dict[int, Any] = {
    i: {**own, "state_update": "delta", **({"feature_map": "unit"} if "linear_heads" in own else {})}
    for i, own in BY_HEAD.items()
}
MEANS: dict[int, Any] = {
    0: {
        "window": 4, "head_windows": (2, 4), "sinks": 2, "linear_heads": (0, 1, 2, 3), "mixing": "calibrated",
        "feature_map": "constant", "feature_dim": 1,
    },
    1: {**DELTA[1], "mixing": "competing", "feature_map": "dpfp", "write_gate": "quadratic"},
}  # fmt: skip
"""States of one feature, as the recipe equipoise has them beside the delta rule."""
SHARED: dict[int, Any] = {
    0: {**MEANS[0], "map_heads": "key_value"},
    1: {**MEANS[1], "map_heads": "key_value", "linear_heads": (2, 3)},
}
"""One state for the query heads that share a key/value head."""
SHARED_SUMS: dict[int, Any] = {
    0: {"window": 4, "sinks": 2, "map_heads": "key_value", "linear_heads": (0, 1)},
    1: {"map_heads": "key_value", "linear_heads": (0, 1, 2, 3), "head_windows": (6, 2)},
}
NARROW: dict[int, Any] = {
    0: {**DELTA[1], "value_divisor": 2},
    1: {**SHARED[1], "value_divisor": 4, "linear_heads": (0, 1, 2, 3)},
}
"""States that keep 4 and 2 of the 8 numbers of a value, of heads with windows of different lengths."""
WAYS = pytest.mark.parametrize(
    "own", [SETTINGS["per_layer"], BY_HEAD, DELTA, MEANS, SHARED, SHARED_SUMS, NARROW],
    ids=["layers", "heads", "delta", "means", "shared", "shared-sums", "narrow"],
)  # fmt: skip
TOKENS = random_tokens(2, 40)


def converted(dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    model = hybridize(tiny_model(dtype=dtype), HybridConfig(**{**SETTINGS, **more}))
    for mixer in mixers_of(model):
        for index, parameter in enumerate(mixer.parameters()):
            parameter.data += 0.1 * normal(*parameter.shape, seed=index).to(parameter.dtype)
    return model


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def test_layers_differ_as_told() -> None:
    first, second, *_ = mixers_of(converted())
    assert (first.config.window, first.config.sinks, first.phi_q) == (4, 2, None)
    assert not first.has_both
    assert second.config.window == 6
    assert second.phi_q is not None
    assert second.phi_q.weight.shape[0] == 2  # maps of two heads only
    assert reach(converted()) == 3 + 5


@WAYS
def test_it_survives_saving(own: dict[int, Any], tmp_path: Path) -> None:
    model = converted(torch.float32, per_layer=own)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(again))
    assert again.config.equipoise == model.config.equipoise


@WAYS
@pytest.mark.parametrize("state", ["both", "linear", "window"])
def test_decoding_gives_what_one_pass_gives(state: str, own: dict[int, Any]) -> None:
    model = converted(per_layer=own)
    with branches(model, state, reading="renormalised"), torch.no_grad():
        cache, parts = model.make_cache(), list[Tensor]()
        for start, stop in ((0, 17), (17, 18), (18, 40)):
            parts.append(model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), logits(model), rtol=1e-8, atol=1e-9)


def test_state_bytes_are_those_of_the_cache() -> None:
    """Beside masks and positions, and one token less of the window than is counted."""
    model = converted(torch.float32)
    with torch.no_grad():
        cache = model(TOKENS[:1], use_cache=True).past_key_values
    second = cache.layers[1].state
    heads, features, size = 2, 2 * 8, 8
    assert second.linear_state.shape == (1, heads, features, size)
    whole = state_bytes(converted(torch.float32, per_layer={0: SETTINGS["per_layer"][0]}))
    assert whole - state_bytes(model) == 2 * features * (size + 1) * 4


def test_windows_of_heads_hold_what_is_counted() -> None:
    model = converted(torch.float32, per_layer=BY_HEAD)
    with torch.no_grad():
        cache = model(TOKENS[:1], use_cache=True).past_key_values
    states = [state for layer in cache.layers for state in (layer.state, *layer.state.others)]
    assert [state.keys.shape[1:3] for state in states] == [(1, 3), (1, 1), (1, 5), (1, 1)]
    kept = sum(state.keys.numel() + state.values.numel() for state in states)
    sinks, features = 4 * 2 * 8, 2 * 8
    counted = 2 * (kept + 4 * 2 * 8 + sinks * 2 // 2) + 2 * features * 9 * 4
    assert state_bytes(model) == counted
    assert reach(model) == 3 + 5


def test_a_mean_of_the_past_is_one_feature() -> None:
    by_head, means = (converted(torch.float32, per_layer=own) for own in (DELTA, MEANS))
    assert state_bytes(means) - state_bytes(by_head) == 4 * 1 * (8 + 1) * 4
    with torch.no_grad():
        cache = means(TOKENS[:1], use_cache=True).past_key_values
    states = [cache.layers[0].state, *cache.layers[0].state.others]
    assert [state.linear_state.shape for state in states] == [(1, 2, 1, 8)] * 2
    padded = torch.cat([torch.zeros_like(TOKENS[:, :5]), TOKENS], 1)
    mask = (torch.arange(45) >= 5).long().expand(2, -1)
    model = converted(per_layer=MEANS)
    with torch.no_grad():
        left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(left[:, 5:], logits(model), rtol=1e-8, atol=1e-9)


def test_the_delta_rule_has_no_normaliser() -> None:
    by_head, delta = (converted(torch.float32, per_layer=own) for own in (BY_HEAD, DELTA))
    assert state_bytes(by_head) - state_bytes(delta) == 2 * 2 * 8 * 4
    with torch.no_grad():
        cache = delta(TOKENS[:1], use_cache=True).past_key_values
    states = [cache.layers[1].state, *cache.layers[1].state.others]
    assert [state.linear_state.shape for state in states] == [(1, 1, 16, 8)] * 2
    assert all(state.linear_normalizer is None for state in states)


def test_narrow_values_take_fewer_bytes() -> None:
    own = {i: {**of, "head_windows": None} for i, of in NARROW.items()}
    whole = {i: {**of, "value_divisor": 1} for i, of in own.items()}
    model = converted(torch.float32, per_layer=own)
    saved = 2 * 16 * (8 - 4) * 4 + 2 * 16 * (8 - 2) * 4  # states, features, numbers less, bytes
    assert state_bytes(converted(torch.float32, per_layer=whole)) - state_bytes(model) == saved
    with torch.no_grad():
        cache = model(TOKENS[:1], use_cache=True).past_key_values
    shapes = [tuple(layer.state.linear_state.shape) for layer in cache.layers]
    assert shapes == [(1, 2, 16, 4), (1, 2, 16, 2)]


def test_narrow_values_start_as_a_projection() -> None:
    """vAB of a value in A's span is the value, and others lose what is outside of it."""
    for mixer in mixers_of(hybridize(tiny_model(), HybridConfig(**{**SETTINGS, "per_layer": NARROW}))):
        assert mixer.phi_v is not None
        down, up = mixer.phi_v.maps
        down = down.repeat_interleave(up.shape[0] // down.shape[0], 0)
        torch.testing.assert_close(up @ down, torch.eye(up.shape[1]).expand(len(up), -1, -1))
        torch.testing.assert_close(down @ up, (down @ up).mT)


@pytest.mark.parametrize("own", [{0: {"head_windows": (6, 6)}, 1: {"head_windows": (6, 6)}}, {}])
def test_windows_of_heads_that_are_all_alike(own: dict[int, Any]) -> None:
    """They change nothing: no number, no byte."""
    linear = {i: {"linear_heads": (1, 3), **own.get(i, {})} for i in (0, 1)}
    alike, plain = (
        converted(per_layer=linear),
        converted(per_layer={i: {"linear_heads": (1, 3)} for i in (0, 1)}),
    )
    assert torch.equal(logits(alike), logits(plain))
    assert state_bytes(alike) == state_bytes(plain)


def test_a_window_from_outside_is_for_all_heads() -> None:
    alike = converted(per_layer={**BY_HEAD, 1: {"linear_heads": (1, 3), "window": 3}})
    mode, by_head = AttentionMode("hybrid", window=3), converted(per_layer=BY_HEAD)
    with branches(by_head, mode), branches(alike, mode):
        assert torch.equal(logits(by_head), logits(alike))


def test_measures_know_each_heads_window() -> None:
    windows = [
        EvaluationWindow(document=i, start=0, input_ids=row, labels=row) for i, row in enumerate(TOKENS)
    ]

    def outside(own: dict[int, Any]) -> list[list[float]]:
        found, _ = measure(converted(per_layer=own), windows, resamples=20)
        values = {one.name: one for one in found}["donor_mass_outside"].values
        return [[estimate.value for estimate in row] for row in values]

    by_head = outside(BY_HEAD)
    layers = outside(SETTINGS["per_layer"])[1]
    assert by_head[1][:2] == layers[:2]  # of the longer window
    assert all(one > other for one, other in zip(by_head[1][2:], layers[2:], strict=True))


def test_ablations_leave_what_has_no_alternative() -> None:
    model = converted()
    with branches(model, "linear", reading="renormalised"):
        first, second = (mixer.mode for mixer in mixers_of(model))
        assert (first.branches.window, first.branches.linear) == (True, True)
        assert (second.branches.window, second.branches.linear) == (False, True)
        assert (logits(model) - logits(converted())).abs().max() > 1e-3
    both = logits(model)
    with branches(model, "window", reading="renormalised"):
        assert (logits(model) - both).abs().max() > 1e-3


def test_measures_are_undefined_where_there_is_no_linear_branch() -> None:
    windows = [
        EvaluationWindow(document=i, start=0, input_ids=row, labels=row) for i, row in enumerate(TOKENS)
    ]
    found, _ = measure(converted(), windows, resamples=20)
    by_name = {one.name: one for one in found}
    entropy = by_name["linear_entropy"]
    known = [[estimate.value == estimate.value for estimate in row] for row in entropy.values]
    assert known == [[False] * 4, [False, True, False, True]]


def test_the_gate_starts_open_and_scales_what_is_written() -> None:
    phi = FEATURE_MAPS["hedgehog"](4, 8, 16).double()
    phi.reset_parameters(torch.Generator().manual_seed(0))
    gated = WriteGate(phi)
    keys = normal(2, 2, 11, 8)
    assert torch.equal(gated(keys), phi(keys))
    gated.write_weight.data = normal(4, 8, seed=3)
    factor = gated(keys) / phi(keys)
    expected = (keys.repeat_interleave(2, 1) * gated.write_weight[:, None]).sum(-1).clamp(-8, 8).exp()
    torch.testing.assert_close(factor, expected[..., None].expand_as(factor))
    torch.testing.assert_close(
        gated(100 * keys).max() / phi(100 * keys).max(),
        torch.e**8 * torch.ones(()).double(),
        rtol=0.5,
        atol=0,
    )


def test_write_strength() -> None:
    phi = FEATURE_MAPS["unit"](4, 8, 8).double().for_keys()
    phi.reset_parameters(torch.Generator().manual_seed(0))
    gated = WriteStrength(phi).double()
    keys = normal(2, 2, 11, 8)
    torch.testing.assert_close(
        gated(keys).norm(dim=-1), torch.full((2, 4, 11), -4.0).double().sigmoid(), rtol=1e-9, atol=0
    )
    assert gated.write_squares is None
    gated.write_weight.data = normal(4, 8, seed=3)
    gated.write_bias.data = normal(4, 1, seed=4)
    exponent = (keys.repeat_interleave(2, 1) * gated.write_weight[:, None]).sum(-1) + gated.write_bias
    torch.testing.assert_close(gated(keys), phi(keys) * exponent.sigmoid()[..., None])
    queries = FEATURE_MAPS["unit"](2, 8, 8).double()
    queries.reset_parameters(torch.Generator().manual_seed(0))
    queries.log_scale.data.fill_(1.5)
    torch.testing.assert_close(queries(keys).norm(dim=-1), torch.full((2, 2, 11), 1.5).double().exp())


@pytest.mark.parametrize("gate", [WriteGate, WriteStrength])
def test_quadratic_gates_see_how_long_keys_are(gate: type[WriteGate]) -> None:
    phi = FEATURE_MAPS["unit"](4, 8, 8).double().for_keys()
    phi.reset_parameters(torch.Generator().manual_seed(0))
    gated, plain = gate(phi, squares=True).double(), gate(phi).double()
    keys = normal(2, 2, 11, 8)
    assert torch.equal(gated(keys), plain(keys))  # which all start as
    assert gated.write_squares is not None
    gated.write_squares.data = normal(4, 8, seed=5)
    scores = gated.products(keys)
    torch.testing.assert_close(scores, gated.products(-keys))
    torch.testing.assert_close(
        scores, (keys.square().repeat_interleave(2, 1) * gated.write_squares[:, None]).sum(-1)
    )
    assert not torch.equal(gated(2 * keys), gated(keys))  # directions are the same, strengths are not
    gated.reset_parameters(torch.Generator())
    assert not gated.write_squares.any()


def test_a_converted_layer_takes_the_quadratic_gate() -> None:
    config = HybridConfig(window=6, state_update="delta", feature_map="dpfp", write_gate="quadratic")
    mixer = HybridMixer(config, heads=4, kv_heads=2, head_dim=8, layer_idx=0)
    assert isinstance(mixer.phi_k, WriteStrength)
    assert mixer.phi_k.write_squares is not None
    assert mixer.phi_k(normal(1, 1, 3, 8).float()).shape[-1] == 16


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"per_layer": {0: {"layers": "all"}}}, "layers is of the whole model"),
        ({"per_layer": {0: {"windw": 3}}}, "windw"),
        ({"per_layer": {0: {"window": None, "feature_map": None}}}, "at least one branch"),
        ({"linear_heads": (2, 1)}, "in order"),
        ({"linear_heads": ()}, "in order"),
        ({"linear_heads": (0,), "mixing": "shared"}, "mixing convex"),
        ({"linear_heads": (0,), "window": None}, "needs both branches"),
        ({"window": 6, "head_windows": (3, 2), "linear_heads": (0,)}, r"as long as window \(6\), got"),
        ({"window": 6, "head_windows": (6, 0), "linear_heads": (0,)}, "at least 1 token"),
        ({"window": 6, "head_windows": (6, 2), "layout": "terraced"}, "needs layout sliding"),
        ({"window": 6, "head_windows": (6, 2)}, "needs linear_heads"),
        (
            {"state_update": "delta", "mixing": "calibrated", "linear_heads": (0,)},
            "delta needs a window, mixing convex or competing",
        ),
        ({"value_divisor": 2}, "value_divisor 2 needs state_update delta, got additive"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HybridConfig(**wrong)


def test_the_delta_rule_needs_unit_features() -> None:
    with pytest.raises(ConfigError, match="expected a feature map of length 1"):
        hybridize(tiny_model(), HybridConfig(window=6, state_update="delta", linear_heads=(0,)))


def test_the_delta_rule_in_all_heads() -> None:
    own: dict[str, Any] = {"feature_map": "unit", "state_update": "delta"}
    every, none = ({i: {**own, **heads} for i in (0, 1)} for heads in ({"linear_heads": (0, 1, 2, 3)}, {}))
    assert torch.equal(logits(converted(per_layer=every)), logits(converted(per_layer=none)))
    assert state_bytes(converted(per_layer=every)) == state_bytes(converted(per_layer=none))


def test_layers_and_heads_that_are_not_there() -> None:
    with pytest.raises(ConversionError, match=r"per_layer \(\[0, 1\]\), got \[5\]"):
        hybridize(tiny_model(), HybridConfig(per_layer={5: {"window": 3}}))
    with pytest.raises(ConfigError, match="heads between 0 and 3"):
        hybridize(tiny_model(), HybridConfig(linear_heads=(4,)))
    with pytest.raises(ConfigError, match=r"each of 2 key/value heads, got \[6, 6, 2\]"):
        hybridize(
            tiny_model(),
            HybridConfig(window=6, linear_heads=(0,), per_layer={0: {"head_windows": (6, 6, 2)}}),
        )


@pytest.mark.parametrize("own", [SHARED, SHARED_SUMS], ids=["delta", "sums"])
def test_a_shared_state_is_that_of_like_key_maps(own: dict[int, Any]) -> None:
    """A model with a key map for each query head, those of a group the same: as much output, more state."""
    shared = converted(per_layer=own)
    apart = converted(per_layer={i: {**of, "map_heads": "query"} for i, of in own.items()})
    for few, many in zip(mixers_of(shared), mixers_of(apart), strict=True):
        assert few.states * 2 == many.states == few.linear_heads
        theirs = dict(many.named_parameters())
        for name, parameter in few.named_parameters():
            repeats = 2 if name.startswith("phi_k") else 1
            theirs[name].data.copy_(parameter.data.repeat_interleave(repeats, 0))
    torch.testing.assert_close(logits(shared), logits(apart))
    assert state_bytes(shared) < state_bytes(apart)


def test_heads_that_share_a_state_have_it_together() -> None:
    settings = HybridConfig(window=6, map_heads="key_value", linear_heads=(1, 2))
    with pytest.raises(ConfigError, match=r"linear_heads: expected all 2 query heads .* got heads \[1, 2\]"):
        hybridize(tiny_model(), settings)
