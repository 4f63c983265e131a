"""Drafts: assisted decoding and prompt lookup give the tokens that plain decoding gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from equipoise import HybridConfig, branches, hybridize
from equipoise.layers.cache import CacheError, HybridCacheLayer
from support import random_tokens, tiny_model

CONVEX = HybridConfig(window=5, gate="per_head", gate_value=0.3)
SHARED = HybridConfig(window=5, mixing="shared", overlap=False, sinks=2, layout="terraced", layers="all")
PROMPT = random_tokens(1, 11).repeat(1, 3)  # repeats itself, so that looking up finds something
OPTIONS: dict[str, Any] = {"max_new_tokens": 13, "do_sample": False}

# transformers' own way of calling the draft model
pytestmark = pytest.mark.filterwarnings("ignore:Passing `generation_config` together with")


def softmax(family: str = "llama", **overrides: Any) -> Any:
    """A donor in float64, drafting four tokens at a time."""
    model = tiny_model(family, dtype=torch.float64, **overrides)
    model.generation_config.num_assistant_tokens = 4
    return model


def made(family: str = "llama", config: HybridConfig = CONVEX, **overrides: Any) -> Any:
    return hybridize(softmax(family, **overrides), config)


def crops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that converted layers are asked to take back, from here on."""
    seen: list[int] = []
    right = HybridCacheLayer.crop

    def crop(self: HybridCacheLayer, tokens_to_remove: int) -> None:
        seen.append(-tokens_to_remove)
        right(self, tokens_to_remove)

    monkeypatch.setattr(HybridCacheLayer, "crop", crop)
    return seen


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", SHARED),
        ("gemma3_text", CONVEX),
        ("gpt_oss", CONVEX),
        pytest.param("llama", CONVEX, marks=pytest.mark.slow),
        pytest.param("mistral", CONVEX, marks=pytest.mark.slow),
        pytest.param("qwen3", CONVEX, marks=pytest.mark.slow),
        pytest.param("gemma3_text", SHARED, marks=pytest.mark.slow),
    ],
)
def test_assisted_equals_greedy(family: str, config: HybridConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    donor, model = softmax(family), made(family, config)
    greedy, donors = model.generate(PROMPT, **OPTIONS), donor.generate(PROMPT, **OPTIONS)
    # the donor drafts for the hybrid, and the hybrid for its donor
    assert torch.equal(model.generate(PROMPT, **OPTIONS, assistant_model=donor), greedy)
    assert torch.equal(donor.generate(PROMPT, **OPTIONS, assistant_model=model), donors)
    assert torch.equal(model.generate(PROMPT, **OPTIONS, prompt_lookup_num_tokens=4), greedy)
    other, taken_back = made(family, config, seed=7), crops(monkeypatch)
    assert torch.equal(model.generate(PROMPT, **OPTIONS, assistant_model=other), greedy)
    assert sum(taken_back) > 0


def test_a_draft_that_is_always_right_costs_few_passes() -> None:
    """The hybrid drafts for itself: every token is accepted, so the target runs once a draft."""
    model = made()
    twin, passes = made(), list[int]()
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    twin.generation_config.num_assistant_tokens = 6
    twin.generation_config.assistant_confidence_threshold = 0.0
    drafted = model.generate(PROMPT, **OPTIONS, assistant_model=twin)
    hook.remove()
    assert torch.equal(drafted, model.generate(PROMPT, **OPTIONS))
    assert len(passes) == 2  # 13 tokens: drafts of 6 and one more each, but for the last


def test_the_hybrid_drafts_for_its_donor_with_the_same_weights_in_memory() -> None:
    donor = softmax()
    shared = {id(p): p for p in (*donor.parameters(), *donor.buffers())}
    model = hybridize(copy.deepcopy(donor, shared), CONVEX)
    own = {p.data_ptr() for n, p in model.named_parameters() if ".hybrid." not in n}
    assert own == {p.data_ptr() for p in donor.parameters()}
    expected = donor.generate(PROMPT, **OPTIONS)
    assert torch.equal(donor.generate(PROMPT, **OPTIONS, assistant_model=model), expected)


def test_the_end_of_text_ends_a_draft() -> None:
    model, donor = made(), softmax()
    greedy = model.generate(PROMPT, **OPTIONS)
    end = int(greedy[0, PROMPT.shape[1] + 9])
    stopped = model.generate(PROMPT, **OPTIONS, eos_token_id=end, pad_token_id=0)
    assert stopped.shape[1] < greedy.shape[1]
    options = {**OPTIONS, "eos_token_id": end, "pad_token_id": 0}
    assert torch.equal(model.generate(PROMPT, **options, assistant_model=donor), stopped)
    assert torch.equal(model.generate(PROMPT, **options, prompt_lookup_num_tokens=3), stopped)


def test_a_cache_of_an_assisted_run_goes_on_as_any_other() -> None:
    model, donor = made(), softmax()
    whole = model.generate(PROMPT, **{**OPTIONS, "max_new_tokens": 25})
    first = model.generate(PROMPT, **OPTIONS, assistant_model=donor, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    rest = model.generate(first.sequences, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert torch.equal(rest, whole)


def test_a_cache_of_ones_own_serves_drafts_while_it_is_empty() -> None:
    model = made()
    greedy = model.generate(PROMPT, **OPTIONS)
    for cache in (model.make_cache(), DynamicCache(config=model.config)):
        options = {**OPTIONS, "past_key_values": cache, "prompt_lookup_num_tokens": 4}
        assert torch.equal(model.generate(PROMPT, **options), greedy)
        # transformers reads the prompt again on top of what is there, for any model
        with pytest.raises(CacheError, match=r"empty cache to decode with drafts, got one with 45 tokens"):
            model.generate(greedy, **options)


def test_drafts_in_a_branch_state() -> None:
    model, donor = made(), softmax()
    with branches(model, "linear", reading="renormalised"):
        greedy = model.generate(PROMPT, **OPTIONS)
        assert torch.equal(model.generate(PROMPT, **OPTIONS, assistant_model=donor), greedy)
    with branches(model, "softmax"):
        assert torch.equal(
            model.generate(PROMPT, **OPTIONS, prompt_lookup_num_tokens=4), donor.generate(PROMPT, **OPTIONS)
        )


def test_sampling_with_a_draft_draws_from_the_target() -> None:
    """Of a target all but certain of one token, sampling gives it whatever the draft says."""
    model, other = made(), made(seed=7)
    greedy = model.generate(PROMPT, **OPTIONS)
    options = {**OPTIONS, "do_sample": True, "temperature": 1e-4, "top_k": 0}
    assert torch.equal(model.generate(PROMPT, **options, assistant_model=other), greedy)


def test_drafting_for_several_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size = 1"):
        made().generate(PROMPT.repeat(2, 1), **OPTIONS, prompt_lookup_num_tokens=3)


def test_branches_switched_under_a_draft_are_noticed() -> None:
    model = made()
    cache = model.make_cache()
    with branches(model, "window"), pytest.raises(CacheError, match="branches were switched"):
        model.generate(PROMPT, **OPTIONS, past_key_values=cache, prompt_lookup_num_tokens=3)
