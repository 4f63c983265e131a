"""Text as it comes: whole characters, no start of a stop string, nothing lost at the end."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from equipoise.serve.text import TextStream

TEXT = "wörld €uro the quick brown fox"


def run(tokenizer: Any, text: str, stops: list[str]) -> tuple[list[str], str, bool]:
    """The pieces of a text after a prompt, the rest, and whether it was stopped."""
    stream = TextStream(tokenizer, tokenizer("hello ").input_ids, stops)
    pieces = list[str]()
    for token in tokenizer(text).input_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return pieces, stream.finish(), stream.stopped


def test_pieces_are_whole_characters(tokenizer: Any) -> None:
    pieces, rest, stopped = run(tokenizer, TEXT, [])
    assert "".join(pieces) + rest == TEXT
    assert all(piece.isprintable() for piece in pieces)
    assert "" in pieces  # half of a character
    assert not stopped


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["brown"], "wörld €uro the quick "),
        (["quick brown fox jumps"], TEXT),
        (["fox", "the"], "wörld €uro "),
        (["€u"], "wörld "),
        (["w"], ""),
        (["rown fo", "brown f"], "wörld €uro the quick "),
    ],
)
def test_stop_strings(tokenizer: Any, stops: list[str], expected: str) -> None:
    pieces, rest, stopped = run(tokenizer, TEXT, stops)
    assert "".join(pieces) + rest == expected
    assert stopped == (expected != TEXT)


def test_nothing_is_sent_that_may_belong_to_a_stop_string(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], ["fox trot"])
    sent = "".join(stream.push(token) for token in tokenizer("the fox").input_ids)
    assert sent == "the "
    assert stream.finish() == "fox"


def test_characters_that_are_never_completed(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, tokenizer("hello").input_ids)
    assert [stream.push(token) for token in tokenizer("€").input_ids[:-1]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_the_space_before_the_first_word_is_kept() -> None:
    """Tokenizers with a mark for spaces drop it at the start of what they decode."""
    words = Tokenizer(models.WordLevel({"▁a": 0, "▁fox": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert TextStream(tokenizer, [0]).push(1) == " fox"
