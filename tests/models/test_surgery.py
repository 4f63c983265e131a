"""Converting and reverting: which layers, what is refused, what stays untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from equipoise import ConversionError, HybridConfig, branches, hybridize, revert
from equipoise.layers.interface import mixers_of
from equipoise.models.families import check_family
from equipoise.models.layout import report_layers
from equipoise.registry import UnknownNameError
from support import random_tokens, tiny_model

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 20)


def test_chosen_layers_only(logits: Logits) -> None:
    model = tiny_model(num_hidden_layers=4)
    expected = logits(model, TOKENS)
    hybridize(model, HybridConfig(window=5, layers=(1, 3)))
    report = report_layers(model)
    assert (report.converted, report.local, report.softmax) == ((1, 3), (), (0, 2))
    assert [m.layer_idx for m in mixers_of(model)] == [1, 3]
    assert not torch.allclose(logits(model, TOKENS), expected)
    # with layers that keep every key the cache still decodes exactly
    with torch.no_grad():
        first = model(TOKENS[:, :9])
        rest = model(TOKENS[:, 9:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), logits(model, TOKENS), rtol=0, atol=1e-4)


def test_local_layers_stay_unless_all_are_asked_for() -> None:
    assert report_layers(hybridize(tiny_model("gemma3_text"), HybridConfig(window=5))).local == (0,)
    report = report_layers(hybridize(tiny_model("gemma3_text"), HybridConfig(window=5, layers="all")))
    assert (report.converted, report.local) == ((0, 1, 2), ())


def test_a_model_of_local_layers_only_says_how_to_convert_it() -> None:
    model = tiny_model("mistral", sliding_window=6)
    with pytest.raises(
        ConversionError, match=r"all 2 layers of this mistral are local.*window 6.*layers='all'"
    ):
        hybridize(model, HybridConfig(window=5))
    hybridize(model, HybridConfig(window=5, layers="all"))
    assert report_layers(model).converted == (0, 1)


@pytest.mark.parametrize("layers", [(2,), (-1,), ()])
def test_layers_that_are_not_there(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConversionError, match="expected layers between 0 and 1, got"):
        hybridize(tiny_model(), HybridConfig(window=5, layers=layers))


def test_a_window_over_the_whole_context_is_refused() -> None:
    for window in (32, 33):
        with pytest.raises(ConversionError, match="shorter than the donor's context of 32 tokens"):
            hybridize(tiny_model(max_position_embeddings=32), HybridConfig(window=window))
    hybridize(tiny_model(max_position_embeddings=32), HybridConfig(window=31))


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"attention dropout 0, got 0.1"):
        hybridize(tiny_model(attention_dropout=0.1), HybridConfig(window=5))


def test_attention_dropout_under_gpt2s_name_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"attention dropout 0, got 0.1: load .* attn_pdrop=0.0"):
        hybridize(tiny_model("gpt2", attn_pdrop=0.1), HybridConfig(window=5))


@pytest.mark.parametrize(
    ("family", "setting", "reason"),
    [
        ("gpt2", "add_cross_attention", "attends to an encoder too"),
        ("gemma", "use_bidirectional_attention", "looks ahead"),
    ],
)
def test_settings_that_change_what_attention_sees_are_refused(family: str, setting: str, reason: str) -> None:
    model = tiny_model(family, **{setting: True})
    with pytest.raises(ConversionError, match=rf"cannot convert this {family}: it {reason}.*{setting}"):
        hybridize(model, HybridConfig(window=5))


def test_converting_twice_is_refused() -> None:
    model = hybridize(tiny_model(), HybridConfig(window=5))
    with pytest.raises(ConversionError, match="converted already; call revert"):
        hybridize(model, HybridConfig(window=4))
    hybridize(revert(model), HybridConfig(window=4))
    assert mixers_of(model)[0].config.window == 4


def test_reverting_a_donor_is_refused() -> None:
    with pytest.raises(ConversionError, match="expected a converted model, got model type 'llama'"):
        revert(tiny_model())


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_only_causal_language_models_convert(kind: Any) -> None:
    model = kind.from_config(tiny_model().config)
    before = type(model)
    with pytest.raises(
        ConversionError, match=r"expected a causal language model .LlamaForCausalLM., got a Llama"
    ):
        hybridize(model, HybridConfig(window=5))
    assert type(model) is before


TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "n_layer": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_head": 4, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "reason", "extra"),
    [
        ("falcon", "ignores transformers' attention interface", {}),
        ("bloom", "ALiBi", {}),
        ("gptj", "ignores transformers' attention interface", {"n_embd": 32, "rotary_dim": 4}),
        ("diffllama", "differential attention", {}),
        ("jamba", "hybrid already", {"num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4}),
        (
            "deepseek_v2",
            "multi-head latent attention",
            {
                "n_routed_experts": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 1,
                "n_group": 1, "topk_group": 1,
            },
        ),
        ("opt", "not among those tested here .*llama", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)  # fmt: skip
def test_families_that_do_not_convert(model_type: str, reason: str, extra: dict[str, Any]) -> None:
    model = tiny_like(model_type, extra)
    before = type(model)
    with pytest.raises(ConversionError, match=rf"cannot convert '{model_type}': .*{reason}"):
        hybridize(model, HybridConfig(window=5))
    assert type(model) is before


def tiny_like(model_type: str, extra: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**TINY, **extra})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["mamba2", "deepseek_v3", "minicpm3", "gpt_bigcode", "jetmoe"])
def test_refused_by_name(name: str) -> None:
    with pytest.raises(ConversionError, match=f"cannot convert '{name}': it "):
        check_family(name)


def assert_untouched(model: Any, reference: Any, logits: Logits) -> None:
    assert type(model) is type(reference)
    assert model.config.model_type == reference.config.model_type
    assert model.config._attn_implementation == reference.config._attn_implementation
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not mixers_of(model)
    assert torch.equal(logits(model, TOKENS), logits(reference, TOKENS))


def test_a_failed_self_test_gives_the_donor_back(monkeypatch: pytest.MonkeyPatch, logits: Logits) -> None:
    from equipoise.layers import interface

    right = interface.donor_attention
    monkeypatch.setattr(interface, "donor_attention", lambda inputs: right(inputs) * 1.1)
    model = tiny_model()
    with pytest.raises(
        ConversionError, match=r"parity self-test failed for EquipoiseLlama.*differs from the donor"
    ):
        hybridize(model, HybridConfig(window=5))
    assert_untouched(model, tiny_model(), logits)


@pytest.mark.parametrize("bad", [{"feature_map": "hedgehod"}, {"mixing": "convx"}])
def test_a_misspelt_name_gives_the_donor_back(bad: dict[str, str], logits: Logits) -> None:
    model = tiny_model()
    with pytest.raises(UnknownNameError, match="Did you mean"):
        hybridize(model, HybridConfig(window=5, **bad))
    assert_untouched(model, tiny_model(), logits)


def test_a_shared_configuration_is_not_touched() -> None:
    one = tiny_model()
    config = one.config
    other = type(one)(config).eval()
    before = config.to_dict()
    hybridize(one, HybridConfig(window=5))
    assert other.config is config
    assert config.to_dict() == before
    assert type(config).__name__ == "LlamaConfig"
    assert config._attn_implementation == "sdpa"
    assert one.config is not config
    assert all(
        m.config is one.config for m in one.modules() if hasattr(m, "config") and not hasattr(m, "phi_q")
    )


def test_donors_with_eager_attention_get_it_back() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    revert(hybridize(model, HybridConfig(window=5)))
    assert model.config._attn_implementation == "eager"


def test_a_deep_copy_is_a_model_of_its_own(logits: Logits) -> None:
    donor = tiny_model()
    expected_donor = logits(donor, TOKENS)
    model = hybridize(donor, HybridConfig(window=5))
    expected = logits(model, TOKENS)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, TOKENS), expected)
    with branches(twin, "none"):
        assert torch.equal(logits(model, TOKENS), expected)
        assert not torch.equal(logits(twin, TOKENS), expected)
    revert(twin)
    assert torch.equal(logits(twin, TOKENS), expected_donor)
    assert torch.equal(logits(model, TOKENS), expected)
    cache = model.make_cache()
    with torch.no_grad():
        split = [model(part, past_key_values=cache).logits for part in TOKENS.split(10, 1)]
    torch.testing.assert_close(torch.cat(split, 1), expected, rtol=0, atol=1e-4)


def test_seeds_differ() -> None:
    weights = [
        mixers_of(hybridize(tiny_model(), HybridConfig(window=5), seed=s))[0].phi_q.weight for s in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_mixers_are_float32_under_a_bfloat16_donor() -> None:
    model = hybridize(tiny_model(dtype=torch.bfloat16), HybridConfig(window=5, gate="per_head"))
    assert {p.dtype for m in mixers_of(model) for p in m.parameters()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if ".hybrid." not in n} == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = hybridize(tiny_model(), HybridConfig(window=5, gate="per_head"))
        model.train()
        if checkpointing:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable()
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append([p.grad for m in mixers_of(model) for p in m.parameters()])
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)
