"""Rotary embedding taken off again: every family's own, and what linear branches then know of positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from equipoise import HybridConfig, hybridize
from equipoise.config import ConfigError
from equipoise.layers.inputs import LayerInputs
from equipoise.layers.mixer import HybridMixer
from equipoise.layers.rotary import RotaryLayout, Rotation
from equipoise.layers.softmax import donor_attention
from equipoise.models.branches import capture
from equipoise.models.families import SUPPORTED
from equipoise.ops import Branches
from equipoise.train import scores
from equipoise.train.objectives import LayerTarget
from support import normal, random_tokens, tiny_model

DELTA = HybridConfig(
    window=5, feature_map="trilinear", state_update="delta", gate="quadratic", write_gate="quadratic",
    rotary="undone", layers="all",
)  # fmt: skip


def seen(model: Any, tokens: torch.Tensor, **extra: Any) -> dict[int, LayerInputs]:
    """What each converted layer received."""
    found = dict[int, LayerInputs]()

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: torch.Tensor) -> None:
        found[mixer.layer_idx] = inputs

    with torch.no_grad(), capture(model, observer):
        model(tokens, use_cache=False, **extra)
    return found


@pytest.mark.parametrize("family", SUPPORTED)
def test_what_maps_see_of_a_token_is_the_same_wherever_it_stands(family: str) -> None:
    model = hybridize(tiny_model(family, dtype=torch.float64), DELTA)
    tokens = random_tokens(2, 20)
    early, late = (seen(model, tokens, position_ids=torch.arange(20)[None] + start)[0] for start in (0, 300))
    if family != "gpt2":  # whose positions are learned, and part of the token
        for name in "qk":
            got, expected = (getattr(of.before_rotary(), name) for of in (late, early))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        if early.rotation is not None:
            assert (late.k - early.k).abs().max() > 1e-2
            at_start = early.before_rotary().k[:, :, 0]
            torch.testing.assert_close(at_start, early.k[:, :, 0] / scale_of(early), rtol=0, atol=1e-9)
    without = [layer for layer, inputs in seen(model, tokens).items() if inputs.rotation is None]
    assert without == {"gpt2": [0, 1], "smollm3": [1], "cohere2": [1, 2]}.get(family, [])


def scale_of(inputs: LayerInputs) -> float:
    """What YaRN multiplies cosines and sines by."""
    assert inputs.rotation is not None
    return float(inputs.rotation.cos[0, 0, 0])


@pytest.mark.parametrize("angles", ["single", "doubled", "repeated"])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_the_inverse_is_exact_with_rounded_angles_and_a_factor(pairs: Any, angles: Any) -> None:
    turn = normal(1, 7, 3).bfloat16()  # as models in 16 bits have them: cos^2 + sin^2 is not 1
    cos, sin = (1.3 * turn.cos()).double(), (1.3 * turn.sin()).double()
    x = normal(2, 4, 7, 10)
    first, second = (x[..., :3], x[..., 3:6]) if pairs == "halves" else (x[..., 0:6:2], x[..., 1:6:2])
    parts = first * cos - second * sin, second * cos + first * sin
    turned = torch.cat(parts, -1) if pairs == "halves" else torch.stack(parts, -1).flatten(-2)
    handed = [
        {"single": of, "doubled": torch.cat([of, of], -1), "repeated": of.repeat_interleave(2, -1)}[angles]
        for of in (cos, sin)
    ]
    rotation = Rotation(handed[0], handed[1], RotaryLayout(pairs, angles))
    got = rotation.undone(torch.cat([turned, x[..., 6:]], -1))
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)


MEANS = HybridConfig(
    window=5, feature_map="constant", feature_dim=1, mixing="calibrated", gate="per_token",
    write_gate="per_token", rotary="undone",
)  # fmt: skip
HEDGEHOG = HybridConfig(window=5, gate="per_token", rotary="undone")


def with_gates(config: HybridConfig, dtype: torch.dtype = torch.float64) -> tuple[Any, HybridMixer]:
    """A hybrid whose gates see something, and its first mixer."""
    model: Any = hybridize(tiny_model("llama", dtype=dtype), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("gate_weight", "gate_squares", "write_weight")):
                weight.copy_(normal(*weight.shape))
    return model, model.get_decoder().layers[0].self_attn.hybrid


@pytest.mark.parametrize("config", [DELTA, MEANS, HEDGEHOG], ids=["delta", "means", "hedgehog"])
def test_a_hybrid_reads_the_same_at_any_place_and_another_one_does_not(config: HybridConfig) -> None:
    tokens = random_tokens(2, 20)
    for rotary, equal in (("undone", True), ("kept", False)):
        model = with_gates(config.model_copy(update={"rotary": rotary}))[0]
        with torch.no_grad():
            logits = [
                model(tokens, use_cache=False, position_ids=torch.arange(20)[None] + start).logits
                for start in (0, 300)
            ]
        moved = float((logits[0] - logits[1]).abs().max())  # angles are of float32
        assert moved < 1e-3 if equal else moved > 0.1


def test_what_is_read_again_is_turned_back_as_it_was() -> None:
    model: Any = hybridize(tiny_model("llama", dtype=torch.float64), DELTA)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache = model.make_cache()
        cache.activate_past_recording()
        model(tokens[:, :14], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))  # one row of positions stands for both
        model(random_tokens(2, 5, seed=3), past_key_values=cache)
        cache.crop(-8)  # the draft, and three tokens of the call before
        rest = model(tokens.flip(0)[:, 11:], past_key_values=cache).logits
    torch.testing.assert_close(rest.flip(0), whole[:, 11:], rtol=0, atol=1e-9)


def test_states_that_lag_behind_are_refused() -> None:
    with pytest.raises(ConfigError, match="rotary undone needs overlap true"):
        HybridConfig(rotary="undone", overlap=False)
    # a layer of the same model with its window only
    HybridConfig(rotary="undone", overlap=False, feature_map=None)


def test_other_inputs_have_nothing_to_undo() -> None:
    inputs = LayerInputs(normal(1, 2, 3, 4), normal(1, 2, 3, 4), normal(1, 2, 3, 4), 0.5)
    assert inputs.before_rotary() is inputs


@pytest.mark.parametrize("config", [DELTA, MEANS, HEDGEHOG], ids=["delta", "means", "hedgehog"])
def test_stage_1_learns_from_what_the_hybrid_sees(config: HybridConfig) -> None:
    model, mixer = with_gates(config)
    inputs = seen(model, random_tokens(2, 20))[0]
    target = LayerTarget(mixer, inputs.detach(), donor_attention(inputs))
    # features at hand, or computed inside
    torch.testing.assert_close(target.hybrid(Branches()), mixer.hybrid(inputs)[0], rtol=0, atol=1e-12)
    without = mixer.hybrid(replace(inputs, rotation=None))[0]
    assert (target.hybrid(Branches()) - without).abs().max() > 1e-2


def test_scores_are_fitted_to_what_gates_see() -> None:
    model, mixer = with_gates(MEANS)
    inputs, found = seen(model, random_tokens(2, 20))[0], scores.Seen()
    scores._look(mixer, inputs, found)
    beyond = inputs.before_rotary().q[:, :, 5:]  # of tokens that have something beyond the window
    torch.testing.assert_close(torch.stack(found.q), beyond, rtol=0, atol=1e-12)
    assert (beyond - inputs.q[:, :, 5:]).abs().max() > 0.1


def test_in_16_bits_rotation_is_undone_in_the_precision_of_sums() -> None:
    turned = seen(with_gates(DELTA, torch.bfloat16)[0], random_tokens(2, 20))[0]
    wide = replace(turned, q=turned.q.float(), k=turned.k.float())
    assert torch.equal(turned.before_rotary().q, wide.before_rotary().q)
