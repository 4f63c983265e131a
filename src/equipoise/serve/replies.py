"""What clients get: the objects of OpenAI's API, built from the pieces of a job."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from equipoise.serve.jobs import Piece
from equipoise.serve.sampling import TokenLogprob


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """What has come of one choice."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    reason: str | None = None


class Reply:
    """One answer, whole or in chunks.

    Args:
        model: the name it was asked under.
        tokenizer: for the words of log-probabilities.
        chat: of which endpoint.
        prompt_tokens: of all prompts.
        choices: how many.
        logprobs: whether they were asked for.
    """

    def __init__(
        self, model: str, tokenizer: Any, *, chat: bool, prompt_tokens: int, choices: int, logprobs: bool
    ) -> None:
        self.model, self.tokenizer, self.chat, self.reports = model, tokenizer, chat, logprobs
        self.prompt_tokens = prompt_tokens
        self.choices = [Choice() for _ in range(choices)]
        self.made = int(time.time())
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.reason is not None for choice in self.choices)

    def add(self, piece: Piece) -> None:
        """Note a piece."""
        choice = self.choices[piece.index]
        choice.text += piece.text
        choice.tokens += piece.tokens
        choice.logprobs += piece.logprobs
        choice.reason = piece.reason

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        choices = list[dict[str, Any]]()
        for index, choice in enumerate(self.choices):
            content = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self.chat
                else {"text": choice.text}
            )
            found = {"index": index, **content, "logprobs": self._logprobs(choice.logprobs, 0)}
            choices.append({**found, "finish_reason": choice.reason})
        return {**self._head(""), "choices": choices, "usage": self.usage()}

    def chunk(self, piece: Piece, *, first: bool = False) -> dict[str, Any]:
        """A part of the answer; the first of each choice says whose turn it is."""
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if piece.text or first:
                delta["content"] = piece.text
            content = {"delta": delta}
        else:
            content = {"text": piece.text}
        offset = len(self.choices[piece.index].text) - len(piece.text)
        choice = {
            "index": piece.index, **content, "logprobs": self._logprobs(piece.logprobs, offset),
            "finish_reason": piece.reason,
        }  # fmt: skip
        return {**self._head(".chunk"), "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream, where it was asked for."""
        return {**self._head(".chunk"), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        written = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }  # fmt: skip

    def _head(self, part: str) -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.made, "model": self.model}

    def _logprobs(self, tokens: Iterable[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self.reports:
            return None
        if self.chat:
            content = [
                {**self._entry(t.token, t.logprob), "top_logprobs": [self._entry(*each) for each in t.top]}
                for t in tokens
            ]
            return {"content": content, "refusal": None}
        words = [self._word(t.token) for t in tokens]
        starts = [offset + sum(map(len, words[:index])) for index in range(len(words))]
        return {
            "tokens": words, "token_logprobs": [t.logprob for t in tokens], "text_offset": starts,
            "top_logprobs": [{self._word(token): each for token, each in t.top} for t in tokens],
        }  # fmt: skip

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._word(token)
        return {"token": word, "logprob": max(logprob, -9999.0), "bytes": list(word.encode())}

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])
