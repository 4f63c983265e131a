"""Packed rows made while training asks for them, in memory that does not grow with the data.

Shapes: T context length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from equipoise.data.encoding import EncodedDocument, encode_batches
from equipoise.data.layouts import DataError, Record
from equipoise.data.packing import check_ids, packed_row
from equipoise.data.shards import Position, ShardedDocuments

_BATCH_SIZE = 64
_REMEMBERED = 4096
"""Rows behind the newest whose position is still known: more than a step's and those prefetched."""


@dataclass(frozen=True, kw_only=True)
class RowPosition:
    """Where a row begins.

    Attributes:
        place: the document that its first token is of.
        offset: tokens of that document in rows before.
    """

    place: Position = field(default_factory=Position)
    offset: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"place": self.place.to_dict(), "offset": self.offset}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RowPosition:
        """The inverse of `to_dict`."""
        return cls(place=Position(**values["place"]), offset=values["offset"])


class StreamedRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows as those of `PackedDataset`, by index, each made when it is asked for.

    Row i is always the same, whoever asks and in which order, so that samplers, ranks and resumed runs need
    know nothing of the stream; asked for in ascending order they cost one pass. A rank that takes every
    second row makes the others too. Going back costs reading from the nearest row whose position is known:
    the first, one given by `seek`, or one of the last few thousand.

    Args:
        documents: in a seeded order; they begin again where they end.
        tokenizer: must have an EOS token, which ends each document.
        context_length: T, tokens in a row.
        count: number of rows.
        separate: whether documents of a row are segments of their own (see `PackedDataset`).
        responses_only: train only on assistant turns and completions, where there are any.
        vocab_size: the model's; where given, token ids are checked against it.

    Raises:
        DataError: no row asked for; while reading, documents that cannot be used, or too few for a row.
    """

    def __init__(
        self,
        documents: ShardedDocuments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int,
        count: int,
        separate: bool = True,
        responses_only: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        if context_length < 2:
            raise DataError(f"expected a context_length of at least 2 tokens, got {context_length}; raise it")
        if count < 1:
            raise DataError(
                f"expected max_tokens of at least {context_length} tokens, one row, got fewer; raise "
                "max_tokens, or lower context_length"
            )
        self.documents, self.tokenizer, self.context_length = documents, tokenizer, context_length
        self.count, self.separate = count, separate
        self.responses_only, self.vocab_size = responses_only, vocab_size
        self._known: dict[int, RowPosition] = {0: RowPosition()}
        self._next, self._reader = 0, self._rows(RowPosition())
        self._last: tuple[int, dict[str, Tensor]] | None = None
        self._sought: int | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(self.count)[index]
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        self._reach(index)
        row = self._advance()
        self._last = index, row
        return row

    def position(self, index: int) -> RowPosition:
        """Where row `index` begins; for a checkpoint, so that a resumed run need not read what is before."""
        if index not in self._known:
            self._reach(index)
        return self._known[index]

    def seek(self, index: int, position: RowPosition) -> None:
        """Take the word of a checkpoint for where row `index` begins."""
        self._known[index] = position
        self._sought, self._last = index, None

    def _reach(self, index: int) -> None:
        """Bring the reader to where row `index` begins, from the nearest position known before it."""
        if self._next == index:
            return
        nearest = max(known for known in self._known if known <= index)
        if not nearest <= self._next <= index:
            self._next, self._reader = nearest, self._rows(self._known[nearest])
        while self._next < index:
            self._advance()

    def _advance(self) -> dict[str, Tensor]:
        row, after = next(self._reader)
        self._next += 1
        self._known[self._next] = after
        forgotten = self._next - _REMEMBERED
        if forgotten not in (0, self._sought):
            self._known.pop(forgotten, None)
        return row

    def _rows(self, start: RowPosition) -> Iterator[tuple[dict[str, Tensor], RowPosition]]:
        """Rows from a position on, each with where the next one begins; rows without a label are left out."""
        length, offset = self.context_length, start.offset
        ids, trained, starts = list[int](), list[bool](), list[int]()
        turn = start.place.turn
        for place, document in self._encoded(start.place):
            if place.turn > turn + 1:
                raise DataError(
                    f"expected a row of {length} tokens with something to predict in a whole pass over "
                    f"{self.documents.source!r}, got none; give more data, lower context_length, or check "
                    "that conversations have assistant turns"
                )
            size = len(document.input_ids)
            while offset < size:
                taken = slice(offset, offset + length - len(ids))
                starts.append(len(ids))
                ids += document.input_ids[taken]
                trained += document.trained[taken]
                offset = min(taken.stop, size)
                if len(ids) < length:
                    continue
                row = packed_row(ids, trained, starts, separate=self.separate)
                ids, trained, starts = [], [], []
                if row is not None:
                    turn = place.turn
                    yield row, RowPosition(place=place, offset=offset)
            offset = 0

    def _encoded(self, start: Position) -> Iterator[tuple[Position, EncodedDocument]]:
        places: list[Position] = []

        def batches() -> Iterator[Mapping[str, list[Any]]]:
            batch: list[Record] = []
            for place, record in self.documents.read(start):
                places.append(place)
                batch.append(record)
                if len(batch) == _BATCH_SIZE:
                    yield {name: [row[name] for row in batch] for name in batch[0]}
                    batch = []

        encoded = encode_batches(
            batches(), self.documents.layout, self.tokenizer, responses_only=self.responses_only
        )
        for document in encoded:
            check_ids(max(document.input_ids, default=0), self.vocab_size)
            yield places.pop(0), document
