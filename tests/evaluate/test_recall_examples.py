"""Texts with needles: what is stated where, how far away it is, and what cannot be asked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from equipoise.evaluate.recall_examples import Example, Item, Question, build_examples, spread
from equipoise.evaluate.recall_tasks import TASKS, VALUES, RecallSettings
from equipoise.evaluate.recall_text import Haystack, RecallError, encode, insert, word_tokens
from equipoise.registry import UnknownNameError
from support import tiny_tokenizer

LENGTH = 700


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def haystack(tokenizer: PreTrainedTokenizerFast) -> Haystack:
    texts = [f"def size{i}(window):\n    return the quick brown fox\n" * 30 for i in range(5)]
    return Haystack.of([*texts, ""], tokenizer, 300)


def build(
    tokenizer: PreTrainedTokenizerFast, haystack: Haystack, task: str, *, count: int = 12, seed: int = 0,
    length: int = LENGTH, settings: RecallSettings | None = None,
) -> list[Example]:  # fmt: skip
    return build_examples(
        task, length=length, count=count, seed=seed, tokenizer=tokenizer, haystack=haystack,
        settings=settings or RecallSettings(needles=4),
    )  # fmt: skip


def all_items(examples: list[Example]) -> Iterator[tuple[Example, Question, Item]]:
    for example in examples:
        for question in example.questions:
            for item in question.items:
                yield example, question, item


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_answer_stands_where_the_distance_says(
    task: str, tokenizer: PreTrainedTokenizerFast, haystack: Haystack
) -> None:
    examples = build(tokenizer, haystack, task)
    for example, question, item in all_items(examples):
        whole = [*example.tokens.tolist(), *question.tokens]
        predicting = len(whole) - 1
        last = predicting - item.distance
        assert tuple(whole[last - len(item.answer) + 1 : last + 1]) == item.answer
        assert item.stop == last + 1
        assert item.span == predicting + question.budget - 1 - item.start
        assert whole[item.start : item.start + 1] == [*encode(tokenizer, "\n")]  # on a line of its own
        assert len(whole) + question.budget <= LENGTH
        assert item.answer not in item.others
        assert tokenizer.decode(whole).count(tokenizer.decode(list(item.answer))) >= 1
    assert {question.budget for _, question, _ in all_items(examples)} == {
        VALUES * (3 + 2) if task == "multivalue" else 3
    }
    asked = {"mqar": 4, "multivalue": VALUES}.get(task, 1)
    assert len(list(all_items(examples))) == asked * len(examples)


def test_distances_cover_near_and_far(tokenizer: PreTrainedTokenizerFast, haystack: Haystack) -> None:
    distances = [item.distance for *_, item in all_items(build(tokenizer, haystack, "passkey", count=40))]
    assert min(distances) < 40
    assert max(distances) > LENGTH - 60
    assert sum(d > LENGTH / 2 for d in distances) >= 10
    assert sum(d < 150 for d in distances) >= 10


def test_seeded(tokenizer: PreTrainedTokenizerFast, haystack: Haystack) -> None:
    first, again, other = (build(tokenizer, haystack, "multikey", seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert [a.questions for a in first] == [b.questions for b in again]
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


def test_a_chain_is_in_order_and_asked_at_its_end(
    tokenizer: PreTrainedTokenizerFast, haystack: Haystack
) -> None:
    settings = RecallSettings(needles=6, answer_words=2)
    for example, question, item in all_items(build(tokenizer, haystack, "tracking", settings=settings)):
        lines = [tuple(line) for line in _lines(example, tokenizer)]
        links, values = _statements(lines, tokenizer)
        key = question.tokens[-1 - len(encode(tokenizer, " is"))]
        for _ in range(2):
            assert key in links
            place, before = links[key]
            assert all(later > place for k, (later, _) in links.items() if links[k][1] == key)
            key = before
        assert values[key][1] == item.answer
        assert values[key][0] < min(place for place, before in links.values() if before == key)


def _lines(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    newline, lines = encode(tokenizer, "\n")[0], [[]]
    for token in example.tokens.tolist():
        if token == newline:
            lines.append([])
        lines[-1].append(token)
    return lines


def _statements(
    lines: list[tuple[int, ...]], tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[int, tuple[int, int]], dict[int, tuple[int, tuple[int, ...]]]]:
    """key -> (line, key before), key -> (line, value), read from the text."""
    start, equals, link = (encode(tokenizer, t) for t in ("\nVariable", " equals", " equals variable"))
    links: dict[int, tuple[int, int]] = {}
    values: dict[int, tuple[int, tuple[int, ...]]] = {}
    for place, line in enumerate(lines):
        if line[: len(start)] != start:
            continue
        key, rest = line[len(start)], line[len(start) + 1 :]
        if rest[: len(link)] == link:
            links[key] = (place, rest[len(link)])
        else:
            values[key] = (place, rest[len(equals) : len(equals) + 2])
    return links, values


def test_options_come_in_every_rotation(tokenizer: PreTrainedTokenizerFast, haystack: Haystack) -> None:
    settings = RecallSettings(needles=4, answer_words=2, options=3)
    examples = build(tokenizer, haystack, "multikey", count=4, settings=settings)
    for example in examples:
        places: list[int] = []
        for question in example.questions:
            (item,) = question.items
            assert item.guess == pytest.approx(1 / 3)
            spots = [i for i in range(len(question.tokens)) if question.tokens[i : i + 2] == item.answer]
            places.append(spots[0])
            assert sum(question.tokens.count(other[0]) > 0 for other in item.others) >= 2
        assert len(example.questions) == 3
        assert len(set(places)) == 3
        assert len({len(question.tokens) for question in example.questions}) == 1


def test_blind_guess_is_one_over_the_number_of_answers(
    tokenizer: PreTrainedTokenizerFast, haystack: Haystack
) -> None:
    words = word_tokens(tokenizer, 300)
    (example,) = build(tokenizer, haystack, "multikey", count=1)
    assert example.questions[0].items[0].guess == pytest.approx((len(words) - 4) ** -3.0)


def test_text_that_is_too_short_repeats_and_clusters_are_documents(
    tokenizer: PreTrainedTokenizerFast, haystack: Haystack
) -> None:
    assert len(haystack.documents) == 5  # the empty one is gone
    examples = build(tokenizer, haystack, "passkey", length=6000, count=7)
    assert [example.cluster for example in examples] == [0, 1, 2, 3, 4, 0, 1]
    assert all(5950 < len(example.tokens) < 6000 for example in examples)


def test_a_tokenizer_that_starts_texts_starts_these(haystack: Haystack) -> None:
    from tokenizers.processors import TemplateProcessing

    starting = tiny_tokenizer()
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    for example, _, item in all_items(build(starting, haystack, "multikey")):
        assert example.tokens[0] == 1
        assert (example.tokens[1:] != 1).all()
        assert tuple(example.tokens[item.stop - 3 : item.stop]) == item.answer


@pytest.mark.parametrize("task", sorted(TASKS))
def test_too_short_a_length_says_how_much_is_needed(
    task: str, tokenizer: PreTrainedTokenizerFast, haystack: Haystack
) -> None:
    with pytest.raises(RecallError, match=r"length of at least (\d+) tokens") as error:
        build(tokenizer, haystack, task, length=20, count=1)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    build(tokenizer, haystack, task, length=needed, count=1)
    with pytest.raises(RecallError):
        build(tokenizer, haystack, task, length=needed - 1, count=1)


def test_what_cannot_be_asked(tokenizer: PreTrainedTokenizerFast, haystack: Haystack) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'passkey'"):
        build(tokenizer, haystack, "passkeys")
    with pytest.raises(RecallError, match="several answers at once"):
        build(tokenizer, haystack, "multivalue", settings=RecallSettings(options=2))
    with pytest.raises(RecallError, match="bare pairs"):
        build(tokenizer, haystack, "tracking", settings=RecallSettings(wording="pairs"))
    with pytest.raises(RecallError, match="options need"):
        RecallSettings(options=2, wording="pairs")
    with pytest.raises(RecallError, match="at least 2 needles"):
        RecallSettings(needles=1)
    with pytest.raises(RecallError, match="fewer needles"):
        build(tokenizer, haystack, "mqar", settings=RecallSettings(needles=500))
    with pytest.raises(RecallError, match="got none"):
        Haystack.of([""], tokenizer, 300)
    with pytest.raises(RecallError, match="not this model's"):
        Haystack.of(["the quick brown fox"], tokenizer, 100)


def test_pieces_go_in_where_they_should() -> None:
    whole, starts = insert(np.arange(6), [(4, (90, 91)), (0, (80,)), (4, (70,))])
    assert whole.tolist() == [80, 0, 1, 2, 3, 90, 91, 70, 4, 5]
    assert starts == (5, 0, 7)


def test_spread_is_even_or_even_in_the_logarithm() -> None:
    assert [spread(share, True, (10, 1000)) for share in (0.0, 0.5, 1.0)] == [10, 505, 1000]
    assert [spread(share, False, (10, 1000)) for share in (0.0, 0.5, 1.0)] == [10, 100, 1000]


def test_keys_can_have_words_of_their_own_and_some_pairs_are_kept(
    tokenizer: PreTrainedTokenizerFast, haystack: Haystack
) -> None:
    pool = word_tokens(tokenizer, 300)
    keys, words = pool[:16], pool[16:]
    settings = RecallSettings(needles=4, key_words=2, answer_words=2, wording="pairs")
    examples = build_examples(
        "mqar", length=300, count=6, seed=0, tokenizer=tokenizer, haystack=haystack, words=words, keys=keys,
        settings=settings, accept=lambda key, answer: sum(key + answer) % 2 == 0,
    )  # fmt: skip
    for _, question, item in all_items(examples):
        assert set(question.tokens[-2:]) <= set(keys)
        assert set(item.answer) <= set(words)
        assert sum((*question.tokens[-2:], *item.answer)) % 2 == 0
        assert item.guess == pytest.approx(len(words) ** -2.0)
    with pytest.raises(RecallError, match="new and accepted"):
        build_examples(
            "mqar", length=300, count=1, seed=0, tokenizer=tokenizer, haystack=haystack,
            settings=settings, accept=lambda _, __: False,
        )  # fmt: skip
