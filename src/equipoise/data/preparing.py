"""The rows of a run: to train on, held out, and set aside, in memory or streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from equipoise.config import DataConfig, RunConfig
from equipoise.data.packing import PackedDataset, check_tokenizer, pack_documents
from equipoise.data.shards import ShardedDocuments, Side
from equipoise.data.sources import load_documents
from equipoise.data.streaming import StreamedRows

HELD_OUT_ROWS = 32
_HELD_OUT_DOCUMENTS = 4 * HELD_OUT_ROWS
"""Documents streamed for them at a time."""


@dataclass(frozen=True)
class TrainingData:
    """Packed rows of a run.

    Attributes:
        rows: to train on.
        held_out: to report losses of.
        aside: training data that early stopping looks at and neither stage trains on; None where nothing
            does. Not the held-out rows: choosing the weights on what is reported would flatter them.
    """

    rows: Dataset[Any]
    held_out: PackedDataset
    aside: Dataset[Any] | None = None


def prepare_data(
    run: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> TrainingData:
    """Read, tokenise and pack training and held-out rows, no longer than the donor's context.

    Where the recipe streams, training rows are made as they are asked for, and of the held-out split only
    the beginning is read.

    Raises:
        DataError: data that cannot be read, or a tokenizer that does not fit the model.
    """
    text: Any = model.config.get_text_config(decoder=True)
    check_tokenizer(tokenizer, text.vocab_size)
    length = min(run.data.context_length, text.max_position_embeddings or run.data.context_length)
    packing = _Packing(run.data, tokenizer, length, text.vocab_size)
    stops_early = run.finetune is not None and run.finetune.early_stopping is not None
    if run.data.streaming:
        return TrainingData(
            packing.streamed(_rows_needed(run, length), seed, "rest" if stops_early else "train"),
            packing.beginning("validation"),
            packing.beginning("aside") if stops_early else None,
        )  # fmt: skip
    rows = packing.whole("train", run.data.max_tokens, seed)
    # the same held-out rows whatever the seed, or losses of two seeds could not be compared
    held_out = packing.whole("validation", HELD_OUT_ROWS * length, 0)
    if not stops_early:
        return TrainingData(rows, held_out)
    kept = len(rows) - min(HELD_OUT_ROWS, max(1, len(rows) // 10))
    return TrainingData(Subset(rows, range(kept)), held_out, Subset(rows, range(kept, len(rows))))


def _rows_needed(run: RunConfig, length: int) -> int:
    """Rows of an epoch: those of max_tokens, else as many as the longer stage takes."""
    if run.data.max_tokens is not None:
        return run.data.max_tokens // length
    stages = [stage for stage in (run.transfer, run.finetune) if stage is not None]
    return max((stage.max_steps or 0) * stage.batch_size for stage in stages)


@dataclass(frozen=True)
class _Packing:
    """How a run packs rows."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    length: int
    vocab_size: int

    def whole(self, split: str, max_tokens: int | None, order: int) -> PackedDataset:
        """All documents of a split, in memory."""
        data = self.data
        documents = load_documents(data.source, split=split, text_column=data.text_column, subset=data.subset)
        return pack_documents(
            documents, self.tokenizer, context_length=self.length, seed=order, max_tokens=max_tokens,
            vocab_size=self.vocab_size, separate=data.separate_documents,
        )  # fmt: skip

    def streamed(self, count: int, seed: int, side: Side) -> StreamedRows:
        """Rows to train on, as they are asked for."""
        return StreamedRows(
            self._documents(side, seed), self.tokenizer, context_length=self.length, count=count,
            separate=self.data.separate_documents, vocab_size=self.vocab_size,
        )  # fmt: skip

    def beginning(self, side: Side) -> PackedDataset:
        """The first rows of a side: as many documents as they take."""
        documents, wanted = self._documents(side, None), HELD_OUT_ROWS * self.length
        count = _HELD_OUT_DOCUMENTS
        while True:
            table = documents.first(count)
            rows = pack_documents(
                table, self.tokenizer, context_length=self.length, seed=0, max_tokens=wanted,
                vocab_size=self.vocab_size, separate=self.data.separate_documents,
            )  # fmt: skip
            if rows.statistics.tokens >= wanted or len(table) < count:
                return rows
            count *= 4

    def _documents(self, side: Side, seed: int | None) -> ShardedDocuments:
        data = self.data
        return ShardedDocuments(
            data.source, side=side, text_column=data.text_column, subset=data.subset, seed=seed,
            buffer=data.shuffle_buffer,
        )  # fmt: skip
