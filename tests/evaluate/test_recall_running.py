"""Prefill in chunks, greedy answers and grading, on tiny converted models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.config import HybridConfig
from equipoise.evaluate.recall_examples import Example, Item, Question
from equipoise.evaluate.recall_running import (
    CONTROL,
    STATES,
    Sight,
    answer,
    batches,
    check_states,
    fork,
    grade,
    in_state,
    padded,
    prefill,
    run_state,
    sight,
)
from equipoise.evaluate.recall_text import Ids, RecallError
from equipoise.layers.cache import HybridCache
from equipoise.models.layout import reach
from equipoise.models.surgery import hybridize
from equipoise.registry import UnknownNameError
from support import random_tokens, tiny_model

HYBRIDS: dict[str, dict[str, Any]] = {
    "convex": {"window": 6},
    "disjoint": {"window": 6, "mixing": "shared", "overlap": False, "sinks": 2},
    "terraced": {"window": 6, "layout": "terraced", "overlap": False},
}


def hybrid(kind: str = "convex", model_type: str = "llama", **donor: Any) -> Any:
    model = tiny_model(model_type, dtype=torch.float64, **donor)
    return hybridize(model, HybridConfig(**HYBRIDS[kind]))


def item(answer: Ids, *, distance: int = 5, span: int = 9, start: int = 0, others: Any = ()) -> Item:
    return Item(
        answer=answer, others=others, distance=distance, span=span, start=start, stop=start + 3, guess=0.1
    )


def example(length: int, *, seed: int, questions: int = 1, task: str = "passkey") -> Example:
    text = random_tokens(length, seed=seed).numpy()
    asked = tuple(
        Question(tokens=tuple(random_tokens(3, seed=90 + seed + n).tolist()), budget=4,
                 items=(item((1, 2, 3, 4)),)) for n in range(questions)
    )  # fmt: skip
    return Example(task=task, length=64, cluster=seed % 3, tokens=text, questions=asked)


# ---- streamed prefill


@pytest.mark.parametrize("state", ["both", "linear_renormalised", CONTROL, "softmax", "none", "sinks"])
@pytest.mark.parametrize("kind", sorted(HYBRIDS))
def test_chunks_leave_the_same_state_as_one_piece(kind: str, state: str) -> None:
    model, (tokens, mask) = hybrid(kind), padded([random_tokens(n, seed=n).numpy() for n in (61, 50)])
    question = random_tokens(2, 3, seed=5)
    with torch.no_grad(), in_state(model, state):
        whole = model(
            torch.cat([tokens, question], 1),
            attention_mask=torch.nn.functional.pad(mask, (0, 3), value=True).long(),
            position_ids=(torch.nn.functional.pad(mask, (0, 3), value=True).cumsum(1) - 1).clamp_min(0),
            use_cache=False,
        ).logits[:, -1]
        for chunk in (1024, 16, 7):
            cache, _ = prefill(model, tokens, mask, chunk=chunk)
            longer = torch.nn.functional.pad(mask, (0, 3), value=True)
            positions = (longer.cumsum(1) - 1)[:, -3:]
            after = model(
                question, attention_mask=longer.long(), position_ids=positions, past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]  # fmt: skip
            torch.testing.assert_close(after, whole, rtol=1e-7, atol=1e-7)


def test_the_cache_of_a_hybrid_does_not_grow() -> None:
    model = hybrid("disjoint")
    sizes: dict[str, list[int]] = {"both": [], CONTROL: [], "softmax": []}
    for state, found in sizes.items():
        with in_state(model, state):
            for length in (64, 256, 480):
                _, peak = prefill(model, random_tokens(2, length), None, chunk=32)
                found.append(peak)
    assert len(set(sizes["both"])) == 1
    assert len(set(sizes[CONTROL])) == 1
    assert sizes["softmax"][0] < sizes["softmax"][1] < sizes["softmax"][2]  # keeps every key


LONG = """
import resource, sys, torch
import equipoise.models.load
from equipoise.config import HybridConfig
from equipoise.evaluate.recall_examples import build_examples
from equipoise.evaluate.recall_running import run_state
from equipoise.evaluate.recall_text import Haystack
from equipoise.models.surgery import hybridize
from support import tiny_model, tiny_tokenizer
torch.set_num_threads(1)
donor = tiny_model("llama", vocab_size=300, max_position_embeddings=1 << 16)
model, tokenizer = hybridize(donor, HybridConfig(window=16)), tiny_tokenizer()
haystack = Haystack.of(["the quick brown fox jumps\\n" * 2000] * 3, tokenizer, 300)
for length in (8192, 65536):
    (example,) = build_examples(
        "passkey", length=length, count=1, seed=0, tokenizer=tokenizer, haystack=haystack
    )
    found = run_state(model, [example], "both")
    print(len(example.tokens), found.peak_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_65536_tokens_take_no_more_memory_than_8192() -> None:
    """In a process of its own, whose peak is nobody else's; KiB on Linux."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LONG], cwd=tests, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (short, few, before), (long, many, after) = (
        [int(number) for number in line.split()] for line in done.stdout.splitlines()
    )
    assert (short > 8100, long > 65400) == (True, True)
    assert few == many
    assert after - before < 32 * 1024


def test_a_prefill_computes_no_logits_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = hybrid(), []
    monkeypatch.setattr(model, "lm_head", _Spy(model.lm_head, widths))
    prefill(model, random_tokens(1, 100), None, chunk=30)
    assert widths == [1, 1, 1, 1]


class _Spy(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, widths: list[int]) -> None:
        super().__init__()
        self.inner, self.widths = inner, widths

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.widths.append(hidden.shape[1])
        return self.inner(hidden)


# ---- answers


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_answers_are_those_of_generate(model_type: str) -> None:
    model = hybrid(model_type=model_type)
    text, question = random_tokens(1, 40), random_tokens(1, 3, seed=8)
    expected = model.generate(
        torch.cat([text, question], 1), attention_mask=torch.ones(1, 43, dtype=torch.long), max_new_tokens=6,
        do_sample=False,
    )[:, 43:]  # fmt: skip
    cache, _ = prefill(model, text, None, chunk=16)
    assert answer(model, cache, None, question, 6).tolist() == expected.tolist()


@pytest.mark.parametrize("state", ["both", "window", CONTROL, "softmax", "none"])
def test_padding_and_earlier_questions_change_no_answer(state: str) -> None:
    model = hybrid("disjoint")
    examples = [example(length, seed=length, questions=2) for length in (61, 50, 61, 44)]
    together = run_state(model, examples, state, batch_size=4)
    alone = [answer for one in examples for answer in run_state(model, [one], state, batch_size=1).generated]
    assert together.generated == alone
    assert together.generated[0] != together.generated[1]  # two questions, not one asked twice


def test_a_fork_leaves_the_cache_as_it_was() -> None:
    model = hybrid()
    for state in ("both", "softmax"):
        with in_state(model, state):
            cache, _ = prefill(model, random_tokens(1, 30), None)
            first = answer(model, cache, None, random_tokens(1, 3, seed=1), 3)
            assert isinstance(fork(cache), HybridCache)
            assert cache.get_seq_length() == 30
            answer(model, cache, None, random_tokens(1, 3, seed=2), 3)
            assert answer(model, cache, None, random_tokens(1, 3, seed=1), 3).tolist() == first.tolist()


def test_batches_hold_like_with_like_and_the_longest_first() -> None:
    examples = [example(60, seed=i, questions=1 + i % 2) for i in range(5)]
    examples.append(
        Example(task="passkey", length=900, cluster=0, tokens=np.arange(4), questions=examples[0].questions)
    )
    found = batches(examples, 2)
    assert found[0] == [5]
    assert sorted(i for batch in found for i in batch) == list(range(6))
    assert all(len({len(examples[i].questions) for i in batch}) == 1 for batch in found)


# ---- states and sight


def test_every_state_runs_and_knows_its_reach() -> None:
    model = hybrid("disjoint")
    for state in STATES:
        run_state(model, [example(40, seed=1)], state)
    own = sight(model, "both")
    assert own == Sight(reach(model), 2)
    assert own.reach == 10
    assert sight(model, "softmax") == Sight(None)
    assert sight(model, "sinks") == Sight(0, 8)
    control = sight(model, CONTROL)
    assert control.window is not None
    assert (control.reach, control.sinks) == (2 * (control.window - 1), 4)
    check_states(STATES)
    with pytest.raises(UnknownNameError, match="Did you mean 'window_renormalised'"):
        check_states(["window_renormalized"])
    with pytest.raises(RecallError, match="different"):
        check_states(["both", "both"])


def test_within_and_beyond_leave_out_what_straddles() -> None:
    seen = Sight(10, sinks=4)
    near, across, far = (item((1,), distance=d, span=d + 5, start=20) for d in (5, 8, 11))
    assert [(seen.within(i), seen.beyond(i)) for i in (near, across, far)] == [
        (True, False), (False, False), (False, True),
    ]  # fmt: skip
    in_sinks = item((1,), distance=50, span=60, start=1)
    assert (seen.within(in_sinks), seen.beyond(in_sinks)) == (True, False)
    half = item((1,), distance=50, span=60, start=3)
    assert (seen.within(half), seen.beyond(half)) == (False, False)
    assert (Sight(None).within(far), Sight(None).beyond(far)) == (True, False)


# ---- grading


def asked(task: str, *answers: tuple[Ids, Any], together: bool = False) -> Example:
    items = tuple(item(given, others=others) for given, others in answers)
    groups = (items,) if together else tuple((one,) for one in items)
    questions = tuple(Question(tokens=(0,), budget=4, items=group) for group in groups)
    return Example(task=task, length=64, cluster=0, tokens=np.arange(3), questions=questions)


def test_an_answer_is_right_whole_or_not_at_all() -> None:
    examples = [asked("a", ((1, 2), ((3, 4),))), asked("a", ((5, 6), ()))]
    found = grade(examples, [(1, 2), (1, 2)])
    assert found.right.tolist() == [1, 0]
    assert found.by_chance.tolist() == [0, 1]  # the second is what the first was asked
    assert found.confused.tolist() == [0, 0]
    assert grade(examples, [(3, 4), (5, 7)]).confused.tolist() == [1, 0]
    assert grade(examples, [(1, 9), (5, 6)]).right.tolist() == [0, 1]


def test_of_several_answers_each_counts_wherever_it_stands() -> None:
    examples = [asked("m", ((1, 2), ()), ((3, 4), ()), ((5, 6), ()), together=True)]
    found = grade(examples, [(9, 3, 4, 9, 1, 2, 6, 5)])
    assert found.right.tolist() == [1, 1, 0]
