"""Tokens to text as they come: whole characters only, and nothing that may be the start of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

CONTEXT = 6
"""Tokens of the prompt that are decoded along: some tokenizers drop the space before a text's first word."""


class TextStream:
    """The text of one sequence.

    Args:
        tokenizer: the model's (transformers', backed by the tokenizers library).
        prompt: ids before the first new token.
        stops: strings that end the text; they are not part of it.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops, self.stopped = tokenizer, tuple(stops), False
        self.context = list(prompt[-CONTEXT:])
        self.tokens: list[int] = []
        self.decoder = DecodeStream(ids=self.context, skip_special_tokens=True)
        self.decoded = ""
        self.sent = 0

    def push(self, token: int) -> str:
        """The text that may be sent after one more token; often none."""
        self.tokens.append(token)
        self.decoded += self.decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        return self._send(holding=True)

    def finish(self) -> str:
        """What is left at the end, characters that were never completed included."""
        if not self.stopped:
            before = self.tokenizer.decode(self.context, skip_special_tokens=True)
            whole = self.tokenizer.decode(self.context + self.tokens, skip_special_tokens=True)
            if whole.startswith(before + self.decoded):
                self.decoded = whole[len(before) :]
        return self._send(holding=False)

    def _send(self, *, holding: bool) -> str:
        if self.stopped:
            return ""
        end = len(self.decoded)
        found = [at for stop in self.stops if (at := self.decoded.find(stop, self._from(stop))) >= 0]
        if found:
            end, self.stopped = min(found), True
        elif holding:
            end -= max((_overlap(self.decoded, stop) for stop in self.stops), default=0)
        end = max(end, self.sent)
        part, self.sent = self.decoded[self.sent : end], end
        return part

    def _from(self, stop: str) -> int:
        """Where a stop string could begin: nothing that was sent is part of one."""
        return max(0, self.sent - len(stop) + 1)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that the stop string begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
