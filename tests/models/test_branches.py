"""Branch states, packed rows, and watching: through a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise import BRANCH_STATES, Branches, ConversionError, HybridConfig, branches, capture, hybridize
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.models.branches import keeps_branches, observe, rivals
from equipoise.models.surgery import attention_modules
from equipoise.registry import UnknownNameError
from support import random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 24)


@pytest.fixture
def model() -> Any:
    return hybridize(tiny_model(dtype=torch.float64), HybridConfig(window=5, overlap=False))


def test_all_states_differ(model: Any, logits: Logits) -> None:
    results: dict[str, Tensor] = {}
    for state in BRANCH_STATES:
        for reading in ("literal", "renormalised") if state in ("window", "linear") else ("literal",):
            with branches(model, state, reading=reading):
                results[f"{state}-{reading}"] = logits(model, TOKENS)
    # without adapters the two softmax states are one
    assert torch.equal(results.pop("softmax_lora-literal"), results["softmax-literal"])
    names = list(results)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert (results[one] - results[other]).abs().max() > 1e-3, (one, other)
    assert all(mixer.mode.same_as(AttentionMode()) for mixer in mixers_of(model))


def test_softmax_is_the_donor(model: Any, logits: Logits) -> None:
    with branches(model, "softmax"):
        taught = logits(model, TOKENS)
    torch.testing.assert_close(taught, logits(tiny_model(dtype=torch.float64), TOKENS), rtol=0, atol=1e-10)


def test_none_is_zero_attention(model: Any, logits: Logits) -> None:
    with branches(model, "none"):
        silent = logits(model, TOKENS)
    donor = tiny_model(dtype=torch.float64)
    for module in attention_modules(donor):
        module.o_proj.weight.data.zero_()
    torch.testing.assert_close(silent, logits(donor, TOKENS), rtol=0, atol=1e-12)


def test_states_by_row(model: Any, logits: Logits) -> None:
    rows = torch.tensor([True, False])
    with branches(model, Branches(rows, ~rows, "renormalised")):
        mixed = logits(model, TOKENS)
    for row, state in ((0, "window"), (1, "linear")):
        with branches(model, state, reading="renormalised"):
            torch.testing.assert_close(mixed[row], logits(model, TOKENS)[row], rtol=0, atol=1e-12)


def test_a_whole_mode(model: Any, logits: Logits) -> None:
    with branches(model, AttentionMode("swa", window=23, sinks=0)):
        narrow = logits(model, TOKENS)
    with branches(model, AttentionMode("swa", window=24)):
        full = logits(model, TOKENS)
    with branches(model, "softmax"):
        torch.testing.assert_close(full, logits(model, TOKENS), rtol=0, atol=1e-10)
    assert torch.allclose(narrow[:, :23], full[:, :23])
    assert not torch.allclose(narrow[:, 23], full[:, 23])


def test_modes_are_restored_after_an_error(model: Any) -> None:
    def fail() -> None:
        with branches(model, "window"), branches(model, "none"):
            assert mixers_of(model)[0].mode.kind == "none"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert mixers_of(model)[0].mode.same_as(AttentionMode())


def test_unknown_state(model: Any) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown branch state 'windows'. Did you mean 'window'\?"):
        branches(model, "windows").__enter__()


def test_unconverted_models_have_no_branches() -> None:
    with pytest.raises(ConversionError, match="got a LlamaForCausalLM without hybrid layers: call hybridize"):
        branches(tiny_model(), "window").__enter__()


class Wrapper(nn.Module):
    """As DDP: no config of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrapped_models(model: Any, logits: Logits) -> None:
    wrapped = Wrapper(model)
    with branches(wrapped, "none"):
        assert mixers_of(model)[0].mode.kind == "none"
    model.config.equipoise = {**model.config.equipoise, "merged": True}
    for target in (model, wrapped):
        with pytest.raises(ConversionError, match="adapters of this checkpoint are merged"):
            branches(target, "softmax").__enter__()
        with branches(target, "softmax_lora"):
            pass


def test_packed_rows_equal_each_part_alone(model: Any, logits: Logits) -> None:
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    parts = [logits(model, part) for part in (TOKENS[:, :9], TOKENS[:, 9:])]
    expected = torch.cat(parts, 1)
    ids = torch.tensor([0] * 9 + [1] * 15)[None]
    for extra in (
        {"position_ids": positions.expand(2, -1)},
        {"position_ids": positions},  # one row for all
        {"position_ids": positions, "segment_ids": ids.expand(2, -1)},
        {"position_ids": positions, "attention_mask": torch.ones_like(TOKENS)},  # hides nothing
    ):
        torch.testing.assert_close(logits(model, TOKENS, **extra), expected, rtol=0, atol=1e-12)
    packed = {"position_ids": positions}
    for cached in ({"use_cache": True}, {"use_cache": True, "past_key_values": model.make_cache()}):
        torch.testing.assert_close(logits(model, TOKENS, **packed, **cached), expected, rtol=0, atol=1e-12)
    for state in ("softmax", "window", "linear"):
        with branches(model, state):
            expected = torch.cat([logits(model, part) for part in (TOKENS[:, :9], TOKENS[:, 9:])], 1)
            torch.testing.assert_close(logits(model, TOKENS, **packed), expected, rtol=0, atol=1e-10)


def test_bounds_of_packed_sequences_are_honoured(model: Any, logits: Logits) -> None:
    """As DataCollatorWithFlattening passes them; positions that restart are not needed to see them."""
    row, positions = TOKENS[:1], torch.cat([torch.arange(9), torch.arange(15)])[None]
    expected = torch.cat([logits(model, part) for part in (row[:, :9], row[:, 9:])], 1)
    bounds = torch.tensor([0, 9, 24], dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 15, "max_length_k": 15}
    found = logits(model, row, position_ids=positions, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    apart = logits(model, row, segment_ids=torch.tensor([[0] * 9 + [1] * 15]))
    torch.testing.assert_close(logits(model, row, **given), apart, rtol=0, atol=0)
    assert not torch.equal(logits(model, row), apart)
    with pytest.raises(ValueError, match="a batch of 2 rows"):
        logits(model, TOKENS, **given)
    with pytest.raises(ValueError, match=r"length, 23, got \[0, 9, 24\]"):
        logits(model, row[:, :23], **given)


def test_packing_on_top_of_a_cache_is_refused(model: Any, logits: Logits) -> None:
    cache = model.make_cache()
    logits(model, TOKENS, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="these position_ids restart"):
        logits(model, TOKENS[:, :4], past_key_values=cache, position_ids=torch.tensor([[24, 25, 0, 1]]))


def test_left_padded_positions_are_not_mistaken_for_packing(model: Any, logits: Logits) -> None:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate() numbers padding
    padded = logits(model, TOKENS, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[0, 6:], logits(model, TOKENS[:1, 6:])[0], rtol=0, atol=1e-12)


def test_four_dimensional_masks_are_refused(model: Any, logits: Logits) -> None:
    with pytest.raises(ValueError, match="2D padding mask"):
        logits(model, TOKENS, attention_mask=torch.zeros(2, 1, 24, 24, dtype=torch.float64))


def test_capture_hands_over_the_donors_view(model: Any, logits: Logits) -> None:
    seen: list[tuple[int, LayerInputs, Tensor]] = []

    def observer(mixer: HybridMixer, inputs: LayerInputs, out: Tensor) -> None:
        seen.append((mixer.layer_idx, inputs, out))

    with capture(model, observer):
        taught = logits(model, TOKENS)
    with branches(model, "softmax"):
        assert torch.equal(taught, logits(model, TOKENS))
    assert [index for index, _, _ in seen] == [0, 1]
    for _, inputs, out in seen:
        k, v = (t.repeat_interleave(2, 1) for t in (inputs.k, inputs.v))
        scores = (inputs.q @ k.mT * inputs.scale).masked_fill(~torch.ones(24, 24).bool().tril(), -torch.inf)
        torch.testing.assert_close(out, scores.softmax(-1) @ v)
        assert not inputs.detach().q.requires_grad
    logits(model, TOKENS)
    assert len(seen) == 2


def test_observers_nest(model: Any, logits: Logits) -> None:
    calls: list[str] = []
    with observe(model, lambda *_: calls.append("outer")):
        with observe(model, lambda *_: calls.append("inner")):
            logits(model, TOKENS)
        logits(model, TOKENS)
    logits(model, TOKENS)
    assert calls == ["inner"] * 2 + ["outer"] * 2


MEANS: dict[str, Any] = {"feature_map": "constant", "feature_dim": 1, "mixing": "calibrated"}
LOOKUPS: dict[str, Any] = {"state_update": "delta", "feature_map": "dpfp", "linear_heads": (1,)}


def of_layers(*layers: dict[str, Any]) -> Any:
    return hybridize(tiny_model("llama"), HybridConfig(window=4, per_layer=dict(enumerate(layers))))


class TestMeansOfThePast:
    @pytest.mark.parametrize(
        ("state", "means", "lookups"),
        [
            ("linear", (True, True), (False, True)),
            ("window", (True, False), (True, False)),
            (Branches(window=False, linear=False), (True, False), (False, False)),
            ("both", (True, True), (True, True)),
        ],
    )
    def test_they_keep_their_window_beside_lookups(
        self, state: Any, means: tuple[bool, bool], lookups: tuple[bool, bool]
    ) -> None:
        model = of_layers(MEANS, LOOKUPS)
        with branches(model, state):
            modes = [mixer.mode.branches for mixer in mixers_of(model)]
        assert [(mode.window, mode.linear) for mode in modes] == [means, lookups]
        assert keeps_branches(model)

    def test_alone_they_are_ablated_like_any(self) -> None:
        model = of_layers(MEANS, MEANS)
        with branches(model, "linear"):
            assert [mixer.mode.branches.window for mixer in mixers_of(model)] == [False, False]
        assert rivals(mixers_of(model)) == mixers_of(model)
        assert not keeps_branches(model)

    def test_heads_without_a_linear_branch_are_kept_too(self) -> None:
        assert keeps_branches(of_layers(LOOKUPS, LOOKUPS))
        assert keeps_branches(of_layers({"feature_map": None}, {}))
        assert not keeps_branches(of_layers({}, {}))
        assert not keeps_branches(of_layers({"feature_map": None}, {"feature_map": None}))
