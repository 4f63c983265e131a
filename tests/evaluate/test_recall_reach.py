"""The reach test: hand-built models that can only relay, asked by the evaluation's own machinery.

Three kinds of dimension of the residual stream: a constant, one per value (the payload), and a flag that
says "there is a payload here". Keys are the flag, queries the constant, so attention averages the payloads in
sight; rotary embedding turns neither, as both stand where its frequency is all but nothing. Values and output
copy payload and flag. Whoever has a payload at the end says it; whoever has none says one fixed word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.config import HybridConfig
from equipoise.evaluate.recall_examples import Example, Item, build_examples
from equipoise.evaluate.recall_results import Group, evaluate_recall, marked, recall_of
from equipoise.evaluate.recall_running import CONTROL
from equipoise.evaluate.recall_tasks import RecallSettings
from equipoise.evaluate.recall_text import Haystack
from equipoise.layers.interface import mixers_of
from equipoise.models.layout import reach
from equipoise.models.surgery import hybridize

VALUES, FILLER, LAYERS, WINDOW, LENGTH = 26, 30, 3, 8, 160
WIDTH = 64
CONSTANT, FLAG, PAYLOAD = 0, 1, 2
"""Dimensions: the constant, the flag, the first of the payload."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: values are words of letters, all else is not."""
    said = ["The", "pass", "key", "is", ".", "Remember", "it."]
    words = [*said, *(f"v{chr(97 + i)}" for i in range(VALUES)), *(str(i) for i in range(FILLER))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", *words])}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


@pytest.fixture(scope="module")
def haystack(tokenizer: PreTrainedTokenizerFast) -> Haystack:
    """Six documents of numbers: no value stands in them by chance."""
    rng = np.random.default_rng(0)
    texts = [" ".join(str(n) for n in rng.integers(0, FILLER, 200)) for _ in range(6)]
    return Haystack.of(texts, tokenizer, len(tokenizer))


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerFast, haystack: Haystack) -> list[Example]:
    return build_examples(
        "passkey", length=LENGTH, count=240, seed=1, tokenizer=tokenizer, haystack=haystack,
        words=tuple(value_tokens(tokenizer)), settings=RecallSettings(answer_words=1),
    )  # fmt: skip


def value_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(f"v{chr(97 + i)}")) for i in range(VALUES)]


def relay(tokenizer: PreTrainedTokenizerFast, **hybrid: Any) -> Any:
    """The hand-built donor, converted."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=1, num_key_value_heads=1, head_dim=WIDTH, max_position_embeddings=512,
        tie_word_embeddings=False, rope_parameters={"rope_theta": 1e30, "rope_type": "default"},
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    slow = WIDTH // 2 - 1  # of a pair (d, d + WIDTH / 2), the last turns least
    values = value_tokens(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        model.model.embed_tokens.weight[:, CONSTANT] = 1.0
        for number, token in enumerate(values):
            model.model.embed_tokens.weight[token, FLAG] = 1.0
            model.model.embed_tokens.weight[token, PAYLOAD + number] = 1.0
            model.lm_head.weight[token, PAYLOAD + number] = 1.0
        model.lm_head.weight[values[0], CONSTANT] = 1e-3  # without a payload, always the same word
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight[slow, CONSTANT] = 40.0
            attention.k_proj.weight[slow, FLAG] = 40.0
            for dimension in range(FLAG, PAYLOAD + VALUES):
                attention.v_proj.weight[dimension, dimension] = 1.0
                attention.o_proj.weight[dimension, dimension] = 1.0
    return hybridize(model.eval(), HybridConfig(window=WINDOW, **hybrid))


def asked(model: Any, examples: list[Example], *states: str) -> Group:
    run = evaluate_recall(model, examples, states, name="relay", seed=0, batch_size=16)
    return Group("relay", examples, [run])


def everything(examples: list[Example]) -> list[Item]:
    return [item for example in examples for question in example.questions for item in question.items]


def numbers(group: Group, state: str) -> tuple[float, float]:
    """Recall within and beyond the state's reach."""
    seen = group.sights[state]
    kept = marked(group.examples, seen.within), marked(group.examples, seen.beyond)
    assert all(keep.sum() >= 20 for keep in kept)
    within, beyond = (recall_of(group, state, keep).estimate.value for keep in kept)
    return within, beyond


def test_windows_alone_recall_within_their_reach_and_guess_beyond(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    model = relay(tokenizer, feature_map=None)
    assert reach(model) == LAYERS * (WINDOW - 1) == 21
    assert {21, 22} <= {item.distance for item in everything(examples)}  # both sides of the line
    group = asked(model, examples, "both", "softmax", "none")
    within, beyond = numbers(group, "both")
    assert within == 1.0
    assert beyond <= 0.15  # one in 26 is right without knowing
    items = everything(examples)
    right = group.runs[0].answers["both"].right
    for item, given in zip(items, right, strict=True):  # to the token
        assert given == (item.distance <= 21 or item.answer == (value_tokens(tokenizer)[0],)), item
    assert recall_of(group, "softmax", np.ones(len(items), bool)).estimate.value == 1.0
    assert recall_of(group, "none", np.ones(len(items), bool)).estimate.value <= 0.15
    chance = group.runs[0].answers["softmax"].by_chance.mean()
    assert chance <= 0.15


def test_a_sink_is_reachable_from_everywhere_and_so_never_beyond(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    model = relay(tokenizer, feature_map=None, sinks=60)
    group = asked(model, examples, "both")
    seen = group.sights["both"]
    assert seen.sinks == 60
    for example in examples:
        for item in example.questions[0].items:
            assert not (item.start < 60 and seen.beyond(item))
    in_sinks = marked(examples, lambda item: item.stop <= 60 and item.distance > 21)
    assert in_sinks.sum() >= 5
    assert recall_of(group, "both", in_sinks).estimate.value == 1.0
    assert numbers(group, "both")[1] <= 0.2


def test_terraces_reach_one_block_more(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> None:
    model = relay(tokenizer, feature_map=None, layout="terraced")
    assert reach(model) == LAYERS * WINDOW + WINDOW - 1
    within, beyond = numbers(asked(model, examples, "both"), "both")
    assert beyond <= 0.15
    assert within >= 0.7  # how far a terrace looks depends on where in its block a token stands


def test_linear_attention_answers_beyond_reach_and_its_window_does_not(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    model = relay(tokenizer, feature_map="hedgehog")
    with torch.no_grad():
        for mixer in mixers_of(model):  # the feature that tells the flag, and nothing else
            for phi in (mixer.phi_q, mixer.phi_k):
                phi.weight.zero_()
                phi.weight[0, WIDTH // 2 - 1, 0] = 40.0
    group = asked(
        model, examples, "both", "linear_renormalised", "window_renormalised", "linear", "window", CONTROL
    )
    for state in ("both", "linear_renormalised", "linear"):
        assert numbers(group, state)[1] == 1.0, state
    for state in ("window_renormalised", "window"):
        within, beyond = numbers(group, state)
        assert (within, beyond <= 0.15) == (1.0, True), state
    control = group.sights[CONTROL]
    assert control.window is not None
    assert control.reach == LAYERS * (control.window - 1) > 21  # its own reach, not the hybrid's
