"""Mixers of every hybrid in transformers: found where the table says, taken out exactly, put back exactly."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from equipoise.audit.native_ablation import (
    MeanOutputs,
    Place,
    ablated,
    decoder_layers,
    find_mixers,
    intercepted,
    undisturbed,
)
from equipoise.audit.native_types import NATIVE_TYPES, ROLES, native_type, supported
from equipoise.config import HybridConfig
from equipoise.models.families import ConversionError
from equipoise.models.surgery import hybridize
from native_models import HOLDS, NATIVE, native_model, output_projection, silence
from support import random_tokens, tiny_model

IDS = random_tokens(2, 19)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def places(model: Any, *roles: str) -> list[Place]:
    return [mixer.place for mixer in find_mixers(model)[1] if mixer.place.role in (roles or ROLES)]


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class TestTable:
    def test_every_type_is_tested_here(self) -> None:
        assert sorted(NATIVE) == sorted(NATIVE_TYPES) == supported().split(", ")

    @pytest.mark.parametrize("model_type", NATIVE)
    def test_layers_hold_what_the_table_says(self, model_type: str) -> None:
        model = native_model(model_type)
        kind, mixers = find_mixers(model)
        assert kind is NATIVE_TYPES[model_type]
        held = tuple("".join(sorted(m.place.role[0] for m in mixers if m.place.layer == i)) for i in range(9))
        assert held[: len(HOLDS[model_type])] == HOLDS[model_type]
        assert not any(held[len(HOLDS[model_type]) :])
        for mixer in mixers:
            assert type(mixer.module).__name__ == kind.of(mixer.place.role).name
            assert model.get_submodule(mixer.path) is mixer.module

    @pytest.mark.parametrize("model_type", NATIVE)
    def test_configuration_agrees_on_the_layers(self, model_type: str) -> None:
        """The layer types of the configuration are a second source, which the search does not read."""
        model = native_model(model_type)
        written = model.config.get_text_config(decoder=True).layer_types
        roles = {
            "linear_attention": "l", "conv": "l", "full_attention": "a", "sliding_attention": "a",
            "hybrid": "al",
        }  # fmt: skip
        assert tuple(roles.get(kind, "") for kind in written) == HOLDS[model_type]

    @pytest.mark.parametrize("model_type", NATIVE)
    def test_outputs_are_of_the_shape_stated(self, model_type: str) -> None:
        model = native_model(model_type)
        kind, mixers = find_mixers(model)
        seen: dict[Place, tuple[int, ...]] = {}

        def look(place: Place, output: Tensor) -> Tensor:
            seen[place] = tuple(output.shape)
            return output

        with intercepted(model, kind, mixers, look):
            logits(model)
        assert seen == dict.fromkeys(places(model), (2, 19, 32))

    @pytest.mark.parametrize("model_type", NATIVE)
    def test_classes_are_transformers_own(self, model_type: str) -> None:
        module = importlib.import_module(type(native_model(model_type)).__module__)
        for role in ROLES:
            assert hasattr(module, NATIVE_TYPES[model_type].of(role).name)

    def test_multimodal_checkpoints_are_their_text_type(self) -> None:
        assert native_type(AutoConfig.for_model("qwen3_5")) is NATIVE_TYPES["qwen3_5_text"]
        assert native_type(AutoConfig.for_model("qwen3_5_moe")) is NATIVE_TYPES["qwen3_5_moe_text"]


class TestRefusals:
    def test_unknown_hybrid_is_told_what_is_known(self) -> None:
        config = AutoConfig.for_model("llama")
        config.layer_types = ["linear_attention", "full_attention"]
        with pytest.raises(ConversionError, match=r"falcon_h1.*got 'llama', with layers of type linear_att"):
            native_type(config)

    @pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
    def test_softmax_models_are_not_hybrids(self, model_type: str) -> None:
        model = tiny_model(model_type)
        assert native_type(model.config) is None
        with pytest.raises(ConversionError, match=r"qwen3_next.*got .*ForCausalLM"):
            find_mixers(model)

    def test_conversions_of_ours_are_not_native(self) -> None:
        assert native_type(hybridize(tiny_model(), HybridConfig(window=4)).config) is None

    def test_layers_unlike_the_table(self) -> None:
        model = native_model("bamba")
        decoder_layers(model)[0].mamba = torch.nn.Identity()
        with pytest.raises(ConversionError, match=r"layer 0 \(BambaDecoderLayer\) holds 0 .* and 0 "):
            find_mixers(model)

    def test_one_kind_of_mixer_only(self) -> None:
        model = native_model("bamba", attn_layer_indices=[])
        with pytest.raises(ConversionError, match="bamba without any BambaAttention"):
            find_mixers(model)

    def test_output_unlike_the_table(self) -> None:
        model = native_model("bamba")
        kind, mixers = find_mixers(model)
        mixers[0].module.forward = lambda **_: (torch.zeros(2, 19, 32), None)
        ablation = ablated(model, [mixers[0].place])
        with pytest.raises(ConversionError, match="BambaMixer to return a tensor, got tuple"), ablation:
            logits(model)
        assert hooks(model) == 0

    def test_place_without_a_mixer(self) -> None:
        ablation = ablated(native_model("bamba"), [Place(1, "linear")])
        with pytest.raises(ValueError, match=r"got .*layer=1, role='linear'"), ablation:
            pass


class TestZeros:
    @pytest.mark.parametrize("model_type", NATIVE)
    @pytest.mark.parametrize(
        "roles", [("linear",), ("attention",), ROLES], ids=["linear", "attention", "all"]
    )
    def test_equal_a_model_whose_output_projections_are_zero(
        self, model_type: str, roles: tuple[str, ...]
    ) -> None:
        model, by_hand = native_model(model_type), native_model(model_type)
        for mixer in find_mixers(by_hand)[1]:
            if mixer.place.role in roles:
                silence(mixer.module)
        with ablated(model, places(model, *roles)):
            got = logits(model)
        torch.testing.assert_close(got, logits(by_hand), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, logits(model), atol=1e-3)

    @pytest.mark.parametrize("model_type", ["falcon_h1", "qwen3_next"])
    def test_one_layer_is_that_layer(self, model_type: str) -> None:
        for place in places(native_model(model_type)):
            model, by_hand = native_model(model_type), native_model(model_type)
            silence(next(m.module for m in find_mixers(by_hand)[1] if m.place == place))
            with ablated(model, [place]):
                torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
    def test_attention_alone_is_none_where_it_only_feeds(self, model_type: str) -> None:
        model = native_model(model_type)
        with ablated(model, places(model, "linear")):
            attention = logits(model)
        with ablated(model, places(model)):
            torch.testing.assert_close(attention, logits(model), rtol=0, atol=0)

    def test_module_shared_by_layers_is_told_apart(self) -> None:
        """Layers 2 and 4 run one attention module; taking out one layer's leaves the other's."""
        model, plain = native_model("zamba"), native_model("zamba")
        layers = decoder_layers(model)
        layers[4].shared_transf = layers[2].shared_transf
        assert len({id(mixer.module) for mixer in find_mixers(model)[1]}) == 7
        torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
        results = []
        for layer in (2, 4):
            with ablated(model, [Place(layer, "attention")]):
                results.append(logits(model))
            by_hand = native_model("zamba")
            silence(decoder_layers(by_hand)[layer].shared_transf.self_attn)
            torch.testing.assert_close(results[-1], logits(by_hand), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(*results, atol=1e-3)


class TestMeans:
    def test_are_the_mean_over_tokens_of_the_intact_model(self) -> None:
        model = native_model("qwen3_next")
        kind, mixers = find_mixers(model)
        outputs: dict[Place, list[Tensor]] = {mixer.place: [] for mixer in mixers}
        handles = [
            mixer.module.register_forward_hook(
                lambda _module, _inputs, output, place=mixer.place: outputs[place].append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
            for mixer in mixers
        ]
        seen = MeanOutputs()
        texts = [random_tokens(2, 19), random_tokens(1, 7, seed=1)]
        with torch.no_grad(), intercepted(model, kind, mixers, seen.observe):
            for ids in texts:
                torch.testing.assert_close(logits(model, ids), logits(native_model("qwen3_next"), ids))
        for handle in handles:
            handle.remove()
        for place, means in seen.means().items():
            tokens = torch.cat([output.reshape(-1, 32) for output in outputs[place]])
            assert tokens.shape == (2 * 19 + 7, 32)
            torch.testing.assert_close(means, tokens.double().mean(0))
        assert seen.means().keys() == outputs.keys()

    def test_stand_in_at_every_token(self) -> None:
        """RecurrentGemma's projections have biases: a silenced one with the mean as its bias is the same."""
        model, by_hand = native_model("recurrent_gemma"), native_model("recurrent_gemma")
        means = {place: torch.randn(32, dtype=torch.float64) for place in places(model)}
        for mixer in find_mixers(by_hand)[1]:
            silence(mixer.module)
            with torch.no_grad():
                output_projection(mixer.module).bias.copy_(means[mixer.place])
        with ablated(model, places(model), means):
            torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-5, atol=1e-5)


class TestRestoring:
    @pytest.mark.parametrize("model_type", NATIVE)
    def test_model_is_as_before(self, model_type: str) -> None:
        model = native_model(model_type)
        before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
        with ablated(model, places(model)):
            assert hooks(model) > 0
            assert not torch.equal(logits(model), before)
        assert hooks(model) == 0
        assert torch.equal(logits(model), before)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())

    def test_also_after_an_exception(self) -> None:
        model = native_model("falcon_h1").train()
        everything = places(model)
        with pytest.raises(RuntimeError, match="half-way"), undisturbed(model), ablated(model, everything):
            raise RuntimeError("half-way")
        assert hooks(model) == 0
        assert all(module.training for module in model.modules())

    def test_also_after_an_exception_in_the_forward_pass(self) -> None:
        model = native_model("falcon_h1")
        before = logits(model)
        with pytest.raises(IndexError), ablated(model, places(model)):
            logits(model, torch.tensor([[999]]))
        assert hooks(model) == 0
        assert torch.equal(logits(model), before)

    def test_hooks_of_others_stay(self) -> None:
        model, calls = native_model("bamba"), []
        handle = decoder_layers(model)[0].register_forward_hook(lambda *_: calls.append(1))
        with ablated(model, places(model)):
            logits(model)
        assert (hooks(model), calls) == (1, [1])
        handle.remove()

    def test_state_kept_in_modules_is_untouched(self) -> None:
        """RecurrentGemma keeps its recurrent state in the module, and drops it in a pass without a cache."""
        model = native_model("recurrent_gemma")
        model.generate(random_tokens(1, 5), max_new_tokens=3, do_sample=False)
        block = decoder_layers(model)[0].temporal_block
        state, convolution = block.rg_lru.recurrent_states, block.conv1d_state
        assert state is not None
        modes = [module.training for module in model.modules()]
        with undisturbed(model):
            logits(model)
            assert block.conv1d_state is None
            block.new = 1
        assert block.rg_lru.recurrent_states is state
        assert block.conv1d_state is convolution
        assert not hasattr(block, "new")
        assert [module.training for module in model.modules()] == modes
