"""transformers' own generation cases, re-expressed: a hybrid answers each as it does without a cache."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from equipoise import HybridCache, HybridConfig, branches, hybridize
from equipoise.layers.cache import CacheError, HybridCacheLayer
from equipoise.ops import native_step
from support import random_tokens, tiny_model, tiny_tokenizer

FAMILIES = ("llama", "mistral", "qwen3", "gemma3_text")
CONFIG = HybridConfig(window=5, gate="per_head", gate_value=0.3)
PROMPT, MASK = random_tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
MASK[0, :5] = 0
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "attention_mask": MASK}


def made(family: str = "llama", **overrides: Any) -> Any:
    return hybridize(tiny_model(family, dtype=torch.float64, **overrides), CONFIG)


def generated(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(PROMPT, **{**OPTIONS, **options})


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "minimum probability": {"do_sample": True, "min_p": 0.05, "typical_p": 0.9, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams drawn": {"do_sample": True, "num_beams": 3},
    "beams that may end": {"do_sample": False, "num_beams": 3, "eos_token_id": 44, "early_stopping": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    "constraints": {
        "do_sample": False, "bad_words_ids": [[5], [9, 11]], "suppress_tokens": [44],
        "forced_eos_token_id": 7, "min_new_tokens": 3, "eos_token_id": 12,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_equals_the_same_without_a_cache(family: str, way: str) -> None:
    model, options = made(family), WAYS[way]
    cached = generated(model, **options)
    assert torch.equal(cached, generated(model, **options, use_cache=False))
    rows = options.get("num_return_sequences", 1) * 2
    assert cached.shape[0] == rows
    assert torch.equal(cached[:: rows // 2, :14], PROMPT)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_and_chunks_equal_each_prompt_alone(family: str) -> None:
    model = made(family)
    batch = generated(model, do_sample=False)
    alone = [model.generate(PROMPT[:1, 5:], max_new_tokens=6, do_sample=False)]
    alone.append(model.generate(PROMPT[1:], max_new_tokens=6, do_sample=False))
    assert torch.equal(batch[0, 14:], alone[0][0, 9:])
    assert torch.equal(batch[1], alone[1][0])
    for size in (1, 5, 14, 99):
        assert torch.equal(generated(model, do_sample=False, prefill_chunk_size=size), batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_returned_beside_the_tokens(family: str) -> None:
    model = made(family)
    wanted = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states"), True)
    cached, whole = (
        generated(model, do_sample=False, return_dict_in_generate=True, use_cache=use, **wanted)
        for use in (True, False)
    )
    assert isinstance(cached.past_key_values, HybridCache)
    assert cached.past_key_values.get_seq_length() == 14 + 6 - 1
    assert len(cached.scores) == len(cached.logits) == len(cached.hidden_states) == 6
    for ours, right in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)  # transformers hands float32 out
    layers = model.config.num_hidden_layers + 1
    assert [len(step) for step in cached.hidden_states] == [layers] * 6
    assert [step[0].shape[1] for step in cached.hidden_states] == [14, 1, 1, 1, 1, 1]
    for ours, right in zip(cached.hidden_states[-1], whole.hidden_states[-1], strict=True):
        torch.testing.assert_close(ours[:, -1], right[:, -1], rtol=0, atol=1e-10)


def test_transition_scores_of_beams() -> None:
    model = made()
    out = generated(
        model,
        do_sample=False,
        num_beams=3,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=1.0,
    )
    scores = model.compute_transition_scores(
        out.sequences, out.scores, out.beam_indices, normalize_logits=False
    )
    torch.testing.assert_close(scores.sum(1) / 6, out.sequences_scores, rtol=0, atol=1e-4)


def test_attention_weights_are_none_as_with_sdpa() -> None:
    out = generated(made(), do_sample=False, return_dict_in_generate=True, output_attentions=True)
    assert {weights for step in out.attentions for weights in step or (None,)} == {None}


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_place_of_tokens(family: str) -> None:
    model = made(family)
    embeddings = model.get_input_embeddings()(PROMPT)
    from_tokens = generated(model, do_sample=False)[:, 14:]
    from_embeddings = model.generate(inputs_embeds=embeddings, **OPTIONS, do_sample=False)
    assert torch.equal(from_embeddings, from_tokens)
    beams = {**OPTIONS, "do_sample": False, "num_beams": 2}
    assert torch.equal(
        model.generate(inputs_embeds=embeddings, **beams),
        generated(model, do_sample=False, num_beams=2)[:, 14:],
    )


def test_from_the_first_token_alone() -> None:
    model = made()
    cached = model.generate(max_new_tokens=5, do_sample=False)
    assert cached.shape == (1, 6)
    assert torch.equal(cached, model.generate(max_new_tokens=5, do_sample=False, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_from_a_cache(family: str) -> None:
    model = made(family)
    whole = generated(model, do_sample=False, max_new_tokens=8)
    first = generated(model, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    mask = torch.cat([MASK, torch.ones(2, 3, dtype=torch.long)], 1)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    for _ in range(2):  # a copy serves as often as one likes
        cache = copy.deepcopy(first.past_key_values)
        rest = model.generate(first.sequences, **options, past_key_values=cache)
        assert torch.equal(rest, whole)
    # only the new tokens, beside a mask of all of them
    rest = model.generate(first.sequences[:, -1:], **options, past_key_values=first.past_key_values)
    assert torch.equal(rest[:, 1:], whole[:, 17:])


def test_many_continuations_of_one_prompt() -> None:
    model = made()
    prompt, questions = PROMPT[1:], random_tokens(3, 4, seed=8)
    cache = model.make_cache()
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    tokens = torch.cat([prompt.expand(3, -1), questions], 1)
    together = model.generate(tokens, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert torch.equal(together, model.generate(tokens, max_new_tokens=5, do_sample=False))
    cache.batch_select_indices(torch.tensor([2]))
    go_on = {"max_new_tokens": 4, "do_sample": False}
    rest = model.generate(together[2:], **go_on, past_key_values=cache)
    assert torch.equal(rest, model.generate(together[2:], **go_on))


def test_streamers_hear_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = made(vocab_size=300), tiny_tokenizer()
    prompt = tokenizer("def window", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False}
    text = str(tokenizer.decode(model.generate(prompt, **options)[0, prompt.shape[1] :]))
    model.generate(prompt, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))  # pyright: ignore
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)  # pyright: ignore
    worker = threading.Thread(target=model.generate, args=(prompt,), kwargs={**options, "streamer": streamer})
    worker.start()
    heard = "".join(streamer)
    worker.join()
    assert heard == text


class After(StoppingCriteria):
    """Stops each row at a length of its own."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= length for length in (16, 18)])


def test_rows_stop_by_themselves() -> None:
    model = made()
    plain = generated(model, do_sample=False)
    stopped = generated(model, do_sample=False, stopping_criteria=[After()], eos_token_id=63, pad_token_id=0)
    assert stopped.shape == (2, 18)
    assert torch.equal(stopped[0, :16], plain[0, :16])
    assert stopped[0, 16:].tolist() == [0, 0]
    assert torch.equal(stopped[1], plain[1, :18])


def test_a_generation_config_of_ones_own() -> None:
    model = made()
    config = GenerationConfig(max_new_tokens=6, num_beams=2, do_sample=False, pad_token_id=0)
    given = model.generate(PROMPT, attention_mask=MASK, generation_config=config)
    assert torch.equal(given, generated(model, num_beams=2, do_sample=False))


@pytest.mark.parametrize("state", ["window", "linear", "none", "softmax"])
def test_branch_states_generate(state: str) -> None:
    model = made()
    with branches(model, state, reading="renormalised"):
        cached = generated(model, do_sample=False)
        assert torch.equal(cached, generated(model, do_sample=False, use_cache=False))
        assert torch.equal(
            generated(model, do_sample=False, num_beams=2),
            generated(model, do_sample=False, num_beams=2, use_cache=False),
        )


# ---- where the state waits


def test_offloading_changes_nothing_and_keeps_states_away() -> None:
    model = made()
    expected = generated(model, do_sample=False, num_beams=2)
    out = generated(
        model, do_sample=False, num_beams=2, cache_implementation="offloaded", return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, expected)
    assert all(layer.offloaded for layer in out.past_key_values.layers)


@pytest.mark.gpu
def test_offloaded_states_wait_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("runs with CUDA only")
    model = made().to("cuda")
    cache = model.make_cache(offload=True)
    with torch.no_grad():
        model(PROMPT.cuda(), past_key_values=cache)
        tensors = [t for layer in cache.layers for t in layer.tensors()]
        assert {t.device.type for t in tensors} == {"cpu"}
        offloaded = model(PROMPT[:, :1].cuda(), past_key_values=cache).logits
        kept = model.make_cache()
        model(PROMPT.cuda(), past_key_values=kept)
        expected = model(PROMPT[:, :1].cuda(), past_key_values=kept).logits
    assert torch.equal(offloaded, expected)


# ---- what is refused, and why


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("quantized", "sums held in less than float32 lose tokens"),
        ("offloaded_static", "constant in size, whatever is read"),
        ("sliding_window", "constant in size, whatever is read"),
    ],
)
def test_cache_implementations_that_do_not_apply(kind: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=f"cache_implementation='{kind}' does not apply to a hybrid: .*{reason}"
    ):
        generated(made(), do_sample=False, cache_implementation=kind)


class QuantizedCache(Cache):
    """Stands for transformers' own, which needs a package that is not installed here."""

    def __init__(self) -> None:
        super().__init__(layers=[])


def test_caches_of_other_kinds_handed_in() -> None:
    model = made()
    static = StaticCache(config=tiny_model().config, max_cache_len=64)
    with pytest.raises(CacheError, match=r"got a StaticCache: it allocates.*past_key_values=None"):
        generated(model, do_sample=False, past_key_values=static)
    with torch.no_grad(), pytest.raises(CacheError, match="got a StaticCache"):
        model(PROMPT, past_key_values=static)
    offloading = DynamicCache(config=model.config)
    offloading.offloading = True
    with pytest.raises(CacheError, match=r"got an offloading DynamicCache: .*make_cache\(offload=True\)"):
        generated(model, do_sample=False, past_key_values=offloading)
    with pytest.raises(CacheError, match=r"got a QuantizedCache: it rounds keys and values"):
        generated(model, do_sample=False, past_key_values=QuantizedCache())
    own = generated(model, do_sample=False, past_key_values=DynamicCache(config=model.config))
    assert torch.equal(own, generated(model, do_sample=False))


def test_continuous_batching_is_refused() -> None:
    model = made()
    with pytest.raises(NotImplementedError, match="nothing to page"):
        model.generate_batch([[3, 4, 5]])
    with pytest.raises(NotImplementedError, match="nothing to page"):
        model.init_continuous_batching()
    with (
        pytest.raises(NotImplementedError, match="nothing to page"),
        model.continuous_batching_context_manager(),
    ):
        pass
    with pytest.raises(NotImplementedError, match="nothing to page"):
        generated(model, do_sample=False, cache_implementation="paged")
    with torch.no_grad(), pytest.raises(ValueError, match="pages; a hybrid's state has none"):
        model(PROMPT, cache=object())


def test_masks_of_four_dimensions_are_refused() -> None:
    square = torch.ones(2, 1, 14, 14, dtype=torch.bool).tril()
    with torch.no_grad(), pytest.raises(ValueError, match="expected a 2D padding mask"):
        made()(PROMPT, attention_mask=square)


def test_contrastive_search_lives_on_the_hub() -> None:
    with pytest.raises((ValueError, OSError), match=r"custom_generate|trust_remote_code|contrastive"):
        generated(made(), do_sample=False, penalty_alpha=0.6, top_k=4)


def test_layers_of_the_cache_are_the_hybrids() -> None:
    out = generated(made("gemma3_text"), do_sample=False, return_dict_in_generate=True)
    kinds = [isinstance(layer, HybridCacheLayer) for layer in out.past_key_values.layers]
    assert kinds == [False, True, True]


@pytest.mark.skipif(native_step.NATIVE is None, reason="the C extension was not built: no compiler")
def test_decoding_runs_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a model are views of its projections; the step must not fall back because of that."""
    used: list[bool] = []
    run = native_step.run
    monkeypatch.setattr(native_step, "run", lambda call: (used.append(True), run(call))[1])
    model: Any = hybridize(tiny_model(), CONFIG)
    for prompt in (PROMPT[1:], PROMPT[1:, :1], PROMPT[:, :9]):
        used.clear()
        model.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
        assert len(used) == 2 * 5  # both layers, every token but the prompt's
