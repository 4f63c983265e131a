"""The donor of the recall demo, and the text it is trained on: pairs of key and value embedded in code.

The demo's donor is continued on such text until its softmax attention recalls values from anywhere in 512
tokens. Keys and values are words that code does not have, each a token of its own. Pairs kept for the
questions are never trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from transformers import (
    AutoConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from equipoise import __version__
from equipoise.data.packing import collate
from equipoise.data.sources import load_documents
from equipoise.data.token_cache import default_cache_dir
from equipoise.demo_donor import DonorSettings, MuonAndAdamW, cached_donor
from equipoise.evaluate.recall_examples import spread
from equipoise.evaluate.recall_tasks import PAIR, Draw, RecallSettings
from equipoise.evaluate.recall_text import Haystack, Ids, insert
from equipoise.files import move_directory
from equipoise.models.load import load_tokenizer
from equipoise.train.progress import ProgressReport

CONTEXT = 512
WORDS = 32
"""Keys, and values, added to the vocabulary. With words of the text itself hardly any hybrid recalled
anything (LOG.md)."""
PAIRS = RecallSettings(needles=10, answer_words=1, key_words=1, wording="pairs")


@dataclass(frozen=True)
class RecallDonorSettings:
    """How the demo's donor is continued.

    Attributes:
        base: the donor it starts from.
        repeat_steps: steps on text whose pieces come twice: where attention learns to look things up. (The
            base donor cannot: its loss on repeated tokens is that on new ones.)
        pair_steps: steps on text with pairs.
        answer_weight: of the mean loss on values shown before, beside the mean loss on text. First showings,
            which nothing foretells, do not count.
        batch_size: rows of 512 tokens a step.
        learning_rate, embedding_learning_rate: of the matrices and of the rest.
        rope_theta: slower rotation than the base's 1e4, for the longer context.
        seed: of the data.
    """

    base: DonorSettings = field(default_factory=DonorSettings)
    repeat_steps: int = 110
    pair_steps: int = 170
    answer_weight: float = 0.5
    batch_size: int = 8
    learning_rate: float = 1e-2
    embedding_learning_rate: float = 4e-3
    rope_theta: float = 1e5
    seed: int = 0


# ---- text with pairs


def held_out(key: Ids, answer: Ids) -> bool:
    """Whether a pair is kept for the questions: one in four, by a hash."""
    return zlib.crc32(repr((key, answer)).encode()) % 4 == 0


def not_held_out(key: Ids, answer: Ids) -> bool:
    """Whether it may be trained on."""
    return not held_out(key, answer)


@dataclass
class PairText:
    """Draws texts with embedded pairs; any index gives the same text for the same seed.

    Attributes:
        tokenizer, haystack: of the donor.
        keys, words: what keys and answers are made of.
        seed: of the texts.
        length: tokens of a text.
        shown_once, shown_often: how many pairs a text has, from and to; those of a half of the texts are
            shown once and asked once, those of the others are repeated.
    """

    tokenizer: PreTrainedTokenizerBase
    haystack: Haystack
    keys: Ids
    words: Ids
    seed: int
    length: int = CONTEXT
    shown_once: tuple[int, int] = (PAIRS.needles, PAIRS.needles)
    shown_often: tuple[int, int] = (5, 8)
    pieces: dict[str, Ids] = field(default_factory=dict[str, Ids])

    def pairs(self, index: int, length: int | None = None) -> NDArray[np.int64]:
        """Text with pairs, each shown once and asked once; or fewer pairs, repeated several times."""
        length = self.length if length is None else length
        rng = random.Random(f"pairs {self.seed} {index}")
        draw = Draw(self.tokenizer, self.words, PAIRS, rng, self.keys, not_held_out, self.pieces)
        once = rng.random() < 0.5
        least, most = self.shown_once if once else self.shown_often
        count = least if least == most else rng.randint(least, most)
        times = 2 if once else rng.randint(4, 6)
        keys, answers, _ = draw.keys_and_answers(count, count)
        stated = [draw.fill(PAIR, key=k, value=a)[0] for k, a in zip(keys, answers, strict=True)]
        room = length - times * sum(map(len, stated))
        text = self.haystack.stretch(rng.randrange(len(self.haystack.documents)), room, rng)
        inserts: list[tuple[int, Ids]] = []
        for piece in stated:
            shares = [rng.random() for _ in range(times)]
            if once:
                distance = spread(rng.random(), rng.random() < 0.5, (len(piece), length - 2 * len(piece)))
                first = rng.random() * (length - distance) / length
                shares = [first, first + distance / length]
            inserts += [(self.haystack.snap(text, int(share * room)), piece) for share in shares]
        return insert(text, inserts)[0]

    def repeated(self, index: int) -> NDArray[np.int64]:
        """Two stretches of text, each followed by its own pieces of 12 to 32 tokens in another order."""
        length = self.length
        rng, rows = random.Random(f"repeated {self.seed} {index}"), list[NDArray[np.int64]]()
        for _ in range(2):
            half = self.haystack.stretch(rng.randrange(len(self.haystack.documents)), length // 4, rng)
            cuts = [0]
            while cuts[-1] < len(half):
                cuts.append(min(len(half), cuts[-1] + rng.randint(12, 32)))
            parts = [half[low:high] for low, high in pairwise(cuts)]
            rng.shuffle(parts)
            rows += [half, *parts]
        return np.concatenate(rows)

    def document(self, index: int) -> str:
        """Text with pairs that is one token short of a row when it is read again: its end is the last."""
        untyped: Any = self.tokenizer
        text = str(untyped.decode(self.pairs(index, self.length + 8).tolist()))
        encoded = untyped(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        return text[: offsets[min(len(offsets), self.length - 1) - 1][1]]


def pair_text(
    donor: Path, *, split: str, seed: int, source: str = "stdlib", words: int = WORDS, **shape: Any
) -> PairText:
    """Texts of a split of the standard library, or of another source, in the donor's tokens.

    ``words`` is how many keys and values there are, ``shape`` what else `PairText` takes.
    """
    tokenizer = load_tokenizer(str(donor))
    keys, values = add_words(tokenizer, words)
    haystack = Haystack.of(load_documents(source, split=split)["text"], tokenizer, len(tokenizer))
    return PairText(tokenizer, haystack, keys, values, seed, **shape)


def add_words(tokenizer: PreTrainedTokenizerBase, count: int = WORDS) -> tuple[Ids, Ids]:
    """Ids of keys and of values; both are added where the tokenizer does not have them."""
    keys, values = ([f"<{kind}{index}>" for index in range(count)] for kind in ("key", "value"))
    tokenizer.add_tokens([*keys, *values])
    untyped: Any = tokenizer
    return tuple(untyped.convert_tokens_to_ids(keys)), tuple(untyped.convert_tokens_to_ids(values))


def write_documents(texts: PairText, path: Path, count: int) -> None:
    """The training data of the conversions, one text a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for index in range(count):
            file.write(json.dumps({"text": texts.document(index)}) + "\n")


# ---- the donor


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Repeated text first, then text with pairs, in this order."""

    def __init__(self, texts: PairText, settings: RecallDonorSettings) -> None:
        self.texts, self.repeats = texts, settings.repeat_steps * settings.batch_size
        self.length = self.repeats + settings.pair_steps * settings.batch_size
        self.answer_weight = settings.answer_weight

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.texts.repeated(index) if index < self.repeats else self.texts.pairs(index)
        weights = loss_weights(row, self.texts.words, self.answer_weight)
        return {"input_ids": torch.from_numpy(row), "weights": torch.from_numpy(weights)}


def loss_weights(row: NDArray[np.int64], values: Ids, answer_weight: float) -> NDArray[np.float32]:
    """What each token's loss counts: text 1 in all, values shown before `answer_weight`, others nothing.

    Args:
        row: [T] tokens; a value's key stands before it.
        values: tokens that are values.
        answer_weight: see `RecallDonorSettings`.
    """
    at = np.flatnonzero(np.isin(row, values))
    _, first = np.unique(row[at - 1], return_index=True)
    again = np.delete(at, first)
    weights = np.full(len(row), 1 / (len(row) - len(at)), dtype=np.float32)
    weights[at] = 0
    weights[again] = answer_weight / max(1, len(again))
    return weights


class WeightedTrainer(Trainer):
    """Trainer that does not shuffle, since the order of the rows is the curriculum, and weighs tokens."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Weighted cross entropy in nats, a mean over rows."""
        logits, targets = model(input_ids=inputs["input_ids"]).logits[:, :-1], inputs["input_ids"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        return (losses * inputs["weights"][:, 1:]).sum(-1).mean()


def recall_donor(settings: RecallDonorSettings, console: Console) -> Path:
    """Directory of the continued donor, trained if it is not in the cache yet."""
    base = cached_donor(settings.base, console)
    known = [
        asdict(settings),
        asdict(PAIRS),
        *(tuple(f"<{kind}{index}>" for index in range(WORDS)) for kind in ("key", "value")),
        CONTEXT,
        base.name,
        torch.__version__,
        __version__,
    ]
    place = base.parent / ("recall-" + hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16])
    if (place / "config.json").is_file():
        console.print(f"recall donor: {place} (cached)", soft_wrap=True)
        return place
    model, texts = continue_donor(base, settings, console), pair_text(base, split="train", seed=settings.seed)
    staging = place.with_name(place.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    texts.tokenizer.save_pretrained(staging)
    move_directory(staging, place)
    return place


def continue_donor(base: Path, settings: RecallDonorSettings, console: Console) -> LlamaForCausalLM:
    """Train the base donor on, with transformers' Trainer."""
    set_seed(settings.seed)
    config: Any = AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_theta": settings.rope_theta, "rope_type": "default"}
    model = LlamaForCausalLM.from_pretrained(base, config=config)
    texts = pair_text(base, split="train", seed=settings.seed)
    model.resize_token_embeddings(len(texts.tokenizer), mean_resizing=False)
    rates = DonorSettings(
        learning_rate=settings.learning_rate, embedding_learning_rate=settings.embedding_learning_rate
    )
    return train_in_order(
        model, _Rows(texts, settings), rates, console, name="recall donor",
        steps=settings.repeat_steps + settings.pair_steps, batch_size=settings.batch_size, seed=settings.seed,
    )  # fmt: skip


def train_in_order(
    model: LlamaForCausalLM,
    rows: torch.utils.data.Dataset[dict[str, torch.Tensor]],
    rates: DonorSettings,
    console: Console,
    *,
    name: str,
    steps: int,
    batch_size: int,
    seed: int,
    collator: Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]] = collate,
) -> LlamaForCausalLM:
    """Train on rows with weights, in their order, with transformers' Trainer.

    Args:
        model: to train, in place.
        rows: items with ``input_ids`` and ``weights``, see `loss_weights`.
        rates: the learning rates of these count.
        console: where progress goes, under ``name``.
        steps, batch_size, seed: of the training.
        collator: makes a batch of items.
    """
    arguments = TrainingArguments(
        output_dir=str(default_cache_dir() / "donors" / "trainer"), max_steps=steps,
        per_device_train_batch_size=batch_size, learning_rate=rates.learning_rate,
        lr_scheduler_type="warmup_stable_decay", warmup_steps=10,
        lr_scheduler_kwargs={"num_decay_steps": max(1, steps // 2)}, max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(), seed=seed, remove_unused_columns=False, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_steps=10, dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks: list[TrainerCallback] = [ProgressReport(console, name)]
    trainer = WeightedTrainer(
        model, arguments, train_dataset=rows, data_collator=collator, callbacks=callbacks,
        optimizers=(MuonAndAdamW(model, rates), None),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()
