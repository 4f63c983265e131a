"""GPT-OSS: learned sink logits in every form of its attention, and the layers that are local already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise import HybridConfig, branches, hybridize
from equipoise.layers import softmax
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode
from equipoise.models.branches import capture, observe
from equipoise.models.layout import report_layers
from equipoise.ops import window_attention
from support import random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 40)


def donor(dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """Sinks that take a good part of every row, more of some heads than of others."""
    model = tiny_model("gpt_oss", dtype=dtype, **overrides)
    for layer in model.model.layers:
        layer.self_attn.sinks.data += torch.tensor([-2.0, 0.0, 1.0, 3.0])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_teacher_is_the_donor_bit_by_bit(dtype: torch.dtype, logits: Logits) -> None:
    """Local and converted layers, padded and not."""
    model, mask = donor(dtype), torch.ones_like(TOKENS)
    mask[0, :9] = 0
    expected, padded = logits(model, TOKENS), logits(model, TOKENS, attention_mask=mask)
    hybridize(model, HybridConfig(window=5))
    with branches(model, "softmax"):
        assert torch.equal(logits(model, TOKENS), expected)
        assert torch.equal(logits(model, TOKENS, attention_mask=mask)[mask.bool()], padded[mask.bool()])


def test_long_prompts_go_by_blocks(monkeypatch: pytest.MonkeyPatch, logits: Logits) -> None:
    model, mask = donor(), torch.ones_like(TOKENS)
    mask[0, :9] = 0
    expected = logits(model, TOKENS, attention_mask=mask)[mask.bool()]
    hybridize(model, HybridConfig(window=5))
    monkeypatch.setattr(softmax, "ROWS", 7)
    with branches(model, "softmax"):
        got = logits(model, TOKENS, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixing", ["convex", "shared"])
def test_a_wide_window_alone_is_the_donor(mixing: str, logits: Logits) -> None:
    """All layers converted: the window's own softmax with its sink, over as many keys as the donor saw."""
    model = donor(layer_types=["full_attention"] * 3)
    expected = logits(model, TOKENS)
    hybridize(model, HybridConfig(window=40, mixing=mixing, layers="all"))
    with branches(model, "window", reading="renormalised"):
        torch.testing.assert_close(logits(model, TOKENS), expected, rtol=0, atol=1e-12)
        for layer in model.model.layers:  # and the sinks do matter
            layer.self_attn.sinks.data -= 50.0
        assert (logits(model, TOKENS) - expected).abs().max() > 1e-2


def test_local_layers_stay_and_keep_their_sinks() -> None:
    model = hybridize(donor(), HybridConfig(window=5))
    assert report_layers(model).local == (0,)
    assert [mixer.layer_idx for mixer in mixers_of(model)] == [1, 2]


def test_branch_states_carry_the_sink(logits: Logits) -> None:
    """What each layer puts out in every state, from what it receives."""
    model = hybridize(donor(layer_types=["full_attention"] * 3), HybridConfig(window=5))
    seen: list[tuple[Any, Any, Tensor]] = []

    def keep(mixer: Any, inputs: Any, output: Tensor) -> None:
        seen.append((mixer, inputs, output))

    def check(window: int, sinks: int) -> None:
        for mixer, x, output in seen:
            logits_of_layer = model.model.layers[mixer.layer_idx].self_attn.sinks
            expected, _ = window_attention(
                x.q, x.k, x.v, window=window, sinks=sinks, scale=x.scale, sink_logits=logits_of_layer
            )
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        assert len(seen) == 3
        seen.clear()

    with torch.no_grad():
        with branches(model, "window", reading="renormalised"), observe(model, keep):
            logits(model, TOKENS)
        check(5, 0)
        with branches(model, "sinks"), observe(model, keep):  # the first eight keys
            logits(model, TOKENS)
        check(0, 8)
        with branches(model, AttentionMode("swa", window=6, sinks=4)), observe(model, keep):
            logits(model, TOKENS)
        check(6, 4)
        with capture(model, keep):
            logits(model, TOKENS)
        check(40, 0)
        with branches(model, "linear", reading="renormalised"):
            before = logits(model, TOKENS)
            for layer in model.model.layers:
                layer.self_attn.sinks.data += 5.0
            assert torch.equal(logits(model, TOKENS), before)


def test_a_model_of_the_linear_branch_alone_has_no_sink(logits: Logits) -> None:
    model = hybridize(donor(), HybridConfig(window=None))
    assert logits(model, TOKENS).isfinite().all()


def test_heads_without_a_linear_branch_keep_their_sinks(logits: Logits) -> None:
    """A wide window at the full weight is the donor, in heads with a linear branch and without one."""
    model = donor(layer_types=["full_attention"] * 3)
    expected = logits(model, TOKENS)
    hybridize(model, HybridConfig(window=40, linear_heads=(1, 3)))
    with branches(model, "window", reading="renormalised"):
        torch.testing.assert_close(logits(model, TOKENS), expected, rtol=0, atol=1e-12)


def test_the_sinks_learn_where_they_may() -> None:
    model: Any = hybridize(donor(torch.float32), HybridConfig(window=5)).train()
    model(TOKENS, labels=TOKENS).loss.backward()
    for layer in model.model.layers[1:]:
        assert layer.self_attn.sinks.grad.abs().max() > 0


def test_going_back_takes_no_sink_along() -> None:
    """What the past remembers is read again without sinks, to the same bits."""
    model: Any = hybridize(donor(torch.float32), HybridConfig(window=5))
    caches = [model.make_cache() for _ in range(2)]
    with torch.no_grad():
        caches[0].activate_past_recording()
        model(TOKENS[:, :20], past_key_values=caches[0])
        model(TOKENS[:, 20:30], past_key_values=caches[0])
        caches[0].crop(-10)
        model(TOKENS[:, :20], past_key_values=caches[1])
        outs = [model(TOKENS[:, 20:22], past_key_values=cache).logits for cache in caches]
    assert torch.equal(*outs)
