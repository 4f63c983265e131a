"""Text that hides needles: a pool of one-token words, and a haystack of natural text to cut from.

Everything is token ids of the model's own tokenizer, so every position, distance and answer is exact.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from equipoise.config import ConfigError

Ids = tuple[int, ...]

LEAST_WORDS = 24
MOST_WORDS = 1000
"""Words with the lowest ids, which byte-pair encodings learn first: the most frequent ones."""
_WORD = re.compile(r"[\u0120\u2581][a-z]{3,}")  # the marks of a leading space: byte-level, SentencePiece
_LETTERS = re.compile(r"[\u0120\u2581]?[A-Za-z]+")
_LINE, _SPACE = ("\u010a", "\n", "<0x0A>"), ("\u0120", "\u2581", " ")
NEAR_LINE, NEAR_WORD = 24, 8
"""How many tokens a needle may move, to stand on a line of its own or at least not inside a word."""


class RecallError(ConfigError):
    """A recall evaluation that cannot be run as asked; the message says what was expected and what came."""


def word_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Ids:
    """Ids of tokens that are whole words with their leading space, most frequent first.

    Keys and answers are made of them: a word is one token wherever it stands, so an answer of n words has n
    tokens and a known number of alternatives. Where a tokenizer has fewer than 24 such words (tiny ones,
    characters), any token of letters counts as one.

    Raises:
        RecallError: fewer than 24 even so.
    """
    untyped: Any = tokenizer
    vocabulary: dict[str, int] = untyped.get_vocab()
    special = set(untyped.all_special_ids)
    known = sorted((i, t) for t, i in vocabulary.items() if i < vocab_size and i not in special)
    words = [(i, "x " + token[1:]) for i, token in known if _WORD.fullmatch(token)]
    if words:
        encoded = untyped([text for _, text in words], add_special_tokens=False).input_ids
        words = [(i, "") for (i, _), ids in zip(words, encoded, strict=True) if ids[-1] == i]
    if len(words) < LEAST_WORDS:
        words = [(i, "") for i, token in known if _LETTERS.fullmatch(token)]
    if len(words) < LEAST_WORDS:
        raise RecallError(
            f"expected a tokenizer with at least {LEAST_WORDS} tokens made of letters to build keys and "
            f"answers from, got {len(words)}; this evaluation does not suit it"
        )
    return tuple(i for i, _ in words[:MOST_WORDS])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """A piece of text as ids, without special tokens."""
    untyped: Any = tokenizer
    return tuple(untyped(text, add_special_tokens=False, verbose=False).input_ids)


def opening(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """What the tokenizer puts before every text: its start token, or nothing."""
    untyped: Any = tokenizer
    start, first = untyped.bos_token_id, untyped("x", verbose=False).input_ids[:1]
    return (start,) if start is not None and first == [start] else ()


@dataclass(frozen=True)
class Haystack:
    """Documents as tokens, to cut stretches of any length from.

    Attributes:
        documents: token ids of each.
        cuts: by token id, 2 where a token starts a line, 1 where it starts a word, 0 elsewhere.
    """

    documents: Sequence[NDArray[np.int64]]
    cuts: NDArray[np.int8]

    @classmethod
    def of(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Haystack:
        """Tokenise texts; empty ones are left out.

        Raises:
            RecallError: no text at all, or ids past the model's vocabulary.
        """
        documents = [np.array(encode(tokenizer, text), dtype=np.int64) for text in texts]
        documents = [tokens for tokens in documents if len(tokens)]
        if not documents:
            raise RecallError("expected text to hide needles in, got none; choose another --data")
        highest = max(int(tokens.max()) for tokens in documents)
        if highest >= vocab_size:
            raise RecallError(
                f"expected token ids below the model's vocabulary size {vocab_size}, got {highest}: the "
                "tokenizer is not this model's"
            )
        untyped: Any = tokenizer
        pieces = untyped.convert_ids_to_tokens(list(range(min(vocab_size, len(untyped)))))
        cuts = np.zeros(vocab_size, dtype=np.int8)
        for index, piece in enumerate(pieces):
            cuts[index] = 2 if str(piece).startswith(_LINE) else 1 if str(piece).startswith(_SPACE) else 0
        return cls(documents, cuts)

    def stretch(self, document: int, length: int, rng: random.Random) -> NDArray[np.int64]:
        """`length` tokens that begin in a document and go on in those after it, round and round."""
        tokens = self.documents[document]
        start = rng.randrange(len(tokens) - length + 1) if len(tokens) > length else 0
        parts = [tokens[start : start + length]]
        while (missing := length - sum(map(len, parts))) > 0:
            document = (document + 1) % len(self.documents)
            parts.append(self.documents[document][:missing])
        return np.concatenate(parts)

    def snap(self, text: NDArray[np.int64], position: int) -> int:
        """The nearest index at which a line starts, else a word, else `position`."""
        for kind, near in ((2, NEAR_LINE), (1, NEAR_WORD)):
            low, high = max(1, position - near), min(len(text), position + near + 1)
            found = np.flatnonzero(self.cuts[text[low:high]] >= kind) + low
            if len(found):
                return int(found[np.abs(found - position).argmin()])
        return position


def insert(
    text: NDArray[np.int64], inserts: Sequence[tuple[int, Ids]]
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Put pieces into a text before the tokens of these indices; equal indices keep the order given.

    Returns:
        The whole, and where each piece starts in it, in the order given.
    """
    order = sorted(range(len(inserts)), key=lambda i: inserts[i][0])
    parts: list[NDArray[np.int64]] = []
    starts = [0] * len(inserts)
    done = total = 0
    for index in order:
        position, piece = inserts[index]
        parts.append(text[done:position])
        total, done = total + position - done, position
        starts[index] = total
        parts.append(np.array(piece, dtype=np.int64))
        total += len(piece)
    parts.append(text[done:])
    return np.concatenate(parts), tuple(starts)
