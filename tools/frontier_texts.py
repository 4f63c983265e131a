"""What hybrids and their rivals are asked, and how answers are scored: of tools/frontier.py."""

from __future__ import annotations

import hashlib
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from transformers import AutoConfig, PreTrainedModel

from equipoise.data.layouts import to_dataset
from equipoise.data.sources import load_documents
from equipoise.evaluate.recall_text import Haystack
from equipoise.recall_donor import (
    CONTEXT,
    PairText,
    RecallDonorSettings,
    loss_weights,
    pair_text,
    recall_donor,
)
from research_donors import DONORS, donor_text, research_donor, source_of

Split = Literal["train", "search", "test"]
SEEDS = {"search": 99, "test": 2026}
"""Of the texts that are scored."""
TEXTS, SETTLED = 48, 64
"""Texts of 512 tokens that are scored, half as many of twice the length; tokens at a text's start whose
likelihood does not count."""
MORE_PAIRS = 40
"""Four times the pairs that are shown once in what hybrids are tuned on."""


@dataclass(frozen=True)
class Setting:
    """One donor, the length of its texts, and the budget.

    Attributes:
        name: ``demo`` for the recall demo's donor, or one of `research_donors.DONORS`.
        length: tokens of a text, searched on and scored.
        tokens: budget, as tokens of K and V in every key/value head and layer.
        tuned: tokens of a text that is trained on, where that is another length.
    """

    name: str = "demo"
    length: int = CONTEXT
    tokens: int = 36
    tuned: int | None = None

    @property
    def tuning(self) -> Setting:
        """The same with the texts that are trained on."""
        return replace(self, length=self.tuned or self.length, tuned=None)

    @cached_property
    def donor(self) -> Path:
        """Where the donor is, trained on the spot if it must be."""
        console = Console(stderr=True)
        if self.name == "demo":
            return recall_donor(RecallDonorSettings(), console)
        return research_donor(self.name, console)

    @cached_property
    def digest(self) -> str:
        """Of the donor's weights. Training is not the same bit for bit on every processor, so that machines
        which train it anew have donors of one name and about one quality, but not one donor."""
        return hashlib.sha256((self.donor / "model.safetensors").read_bytes()).hexdigest()[:12]

    @cached_property
    def config(self) -> Any:
        """transformers' configuration of the donor."""
        return AutoConfig.from_pretrained(self.donor)

    @property
    def layers(self) -> int:
        """L."""
        return int(self.config.num_hidden_layers)

    @property
    def kv_heads(self) -> int:
        """N."""
        return int(self.config.num_key_value_heads)

    @property
    def heads(self) -> int:
        """H."""
        return int(self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.config.hidden_size) // self.heads

    @property
    def token_bytes(self) -> int:
        """Of one token of K and V in every head and layer, at 2 bytes a number."""
        return self.layers * self.kv_heads * self.head_dim * 4

    @property
    def rows(self) -> int:
        """Rows of an optimiser step: 2,048 tokens, however long a row is."""
        return max(1, 4 * CONTEXT // self.length)

    @property
    def texts(self) -> int:
        """Texts that are scored."""
        return max(16, TEXTS * CONTEXT // self.length)

    def draw(self, split: Split, seed: int | None = None) -> PairText:
        """Texts of one split: `train`; `search`, files held out; `test`, others that neither training nor
        search has seen."""
        seed = SEEDS.get(split, 0) if seed is None else seed
        part = "train" if split == "train" else "validation"
        if self.name == "demo":
            drawn = pair_text(self.donor, split=part, seed=seed, length=self.length)
        else:
            drawn = donor_text(self.name, self.donor, split=part, seed=seed, length=self.length)
        if split == "train":
            return drawn
        source = "stdlib" if self.name == "demo" else DONORS[self.name].text
        if source == "stdlib":
            return drawn if split == "search" else replace(drawn, haystack=_of_tests(drawn))
        return replace(drawn, haystack=_half(drawn, source_of(self.name), first=split == "search"))


def _of_tests(texts: PairText) -> Haystack:
    """Files of Python's own test suite: other code than any that was trained on."""
    root = Path(sysconfig.get_path("stdlib")) / "test"
    files = [path for path in sorted(root.glob("test_*.py")) if path.stat().st_size < 100_000]
    if not files:
        raise typer.BadParameter(f"{root} has no tests: this Python came without its test suite.")
    chosen = [path for path in files if _digit(path.name, 5) == 0]
    documents = to_dataset(
        ({"text": path.read_text(encoding="utf-8", errors="ignore")} for path in chosen), "text"
    )
    return Haystack.of(documents["text"], texts.tokenizer, len(texts.tokenizer))


def _half(texts: PairText, source: str, *, first: bool) -> Haystack:
    """One half of the documents that are held out, by their hash."""
    held_out = load_documents(source, split="validation")["text"]
    chosen = [text for text in held_out if (_digit(text, 2) == 0) == first]
    return Haystack.of(chosen, texts.tokenizer, len(texts.tokenizer))


def _digit(text: str, base: int) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % base


def with_more_pairs(texts: PairText) -> PairText:
    """The same with four times the pairs."""
    return replace(texts, shown_once=(MORE_PAIRS, MORE_PAIRS), shown_often=(MORE_PAIRS // 2, MORE_PAIRS // 2))


def rows_of(texts: PairText, count: int, first: int = 0) -> NDArray[np.int64]:
    """Texts with pairs [count, T]."""
    return np.stack([texts.pairs(first + index) for index in range(count)])


def asked(row: NDArray[np.int64], words: tuple[int, ...]) -> list[tuple[int, int]]:
    """(position of a value shown before, distance to where its key was shown last)."""
    seen: dict[int, int] = {}
    found: list[tuple[int, int]] = []
    for place in np.flatnonzero(np.isin(row, words)):
        key = int(row[place - 1])
        if key in seen:
            found.append((int(place), int(place) - seen[key]))
        seen[key] = int(place)
    return found


@torch.no_grad()
def scored(
    model: PreTrainedModel,
    texts: PairText,
    count: int,
    state: AbstractContextManager[None] | None = None,
) -> dict[str, Any]:
    """Likelihood of text (nats per token, by text) and answers (distance, right; by text)."""
    rows, nll, answers = rows_of(texts, count), list[float](), list[list[tuple[int, int]]]()
    at_once = max(1, 8 * CONTEXT // texts.length)
    with nullcontext() if state is None else state:
        for start in range(0, count, at_once):
            part = rows[start : start + at_once]
            inputs = torch.from_numpy(part).to(model.device)
            logits = model(input_ids=inputs, use_cache=False).logits.log_softmax(-1).cpu()
            for row, own in zip(part, logits, strict=True):
                text = loss_weights(row, texts.words, 0.0) > 0
                text[:SETTLED] = False
                text[np.flatnonzero(np.isin(row, texts.words)) - 1] = False  # keys are no text either
                places = np.flatnonzero(text)
                nll.append(-float(own[places - 1, torch.from_numpy(row[places])].mean()))
                answers.append(
                    [(far, int(int(own[at - 1].argmax()) == row[at])) for at, far in asked(row, texts.words)]
                )
    return {"nll": nll, "answers": answers}
