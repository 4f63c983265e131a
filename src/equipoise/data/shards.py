"""Documents read from shards one after another, never all at once, from any position in a seeded order.

A position is a plain dictionary of numbers, so that it can be kept as JSON: which pass over the data, which
shard of that pass's order, how far `datasets` has read it, which block of documents, which document of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError

from equipoise.data.layouts import (
    DataError,
    DocumentLayout,
    Record,
    choose_layout,
    is_empty,
    problem_of,
    project,
    to_dataset,
)
from equipoise.data.sources import (
    HELD_OUT_ONE_IN,
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    content_hash,
    is_local,
    local_files,
    stdlib_records,
)

Side = Literal["train", "validation", "aside", "rest", "whole"]
"""Which documents of a source: those to train on, those held out; of the former those that early stopping
looks at, and the rest; or all."""

_ASIDE = 1  # the remainder of a content's hash that early stopping's documents have; 0 is held out
_READING_ERRORS = (OSError, ValueError, TypeError, KeyError, DatasetsError)  # pyarrow's are ValueErrors


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where reading stands: before document `document` of block `block`.

    Attributes:
        turn: passes over the data completed.
        shard: index in this pass's order of shards, where the block begins.
        source: what `datasets` needs to go on in that shard; None at its start.
        block: index of the block in the pass.
        document: index in the block's order.
    """

    turn: int = 0
    shard: int = 0
    source: dict[str, Any] | None = None
    block: int = 0
    document: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


class ShardedDocuments:
    """Documents of a source, in blocks of consecutive ones of which each is shuffled, endlessly.

    The order is a function of the seed and the source alone: each pass takes the shards in an order of its
    own, and each block of `buffer` documents too. So a position needs no more than the block's beginning,
    whereas a shuffle buffer's contents would have to be kept.

    Args:
        source: as `load_documents` takes it.
        side: which of its documents. The division is by a hash of content, as everywhere; a Hub data set
            with a validation split of its own, and the standard library, hold that out instead.
        text_column, subset: as `load_documents` takes them.
        seed: of the order; None for the source's own.
        buffer: documents of a block.

    Raises:
        DataError: the source is missing, or (while reading) unreadable, malformed, or without documents.
    """

    def __init__(
        self,
        source: str,
        *,
        side: Side = "train",
        text_column: str | None = None,
        subset: str | None = None,
        seed: int | None = None,
        buffer: int = 1000,
    ) -> None:
        self.source, self.text_column = source, text_column
        self.side: Side = side
        self.seed, self.buffer = seed, buffer
        self.shards, self._is_divided = _shards_of(source, side, subset)

    @cached_property
    def layout(self) -> DocumentLayout:
        """How to read the documents: by the columns of the first shard."""
        name, opened = self.shards[0]
        with _told(name):
            table = opened()
            columns = table.column_names or list(next(iter(table), {}))
        return choose_layout(columns, self.text_column)

    def read(self, position: Position) -> Iterator[tuple[Position, Record]]:
        """Yield each document with its own position, from a position on; begins again at the end.

        Raises:
            DataError: see the class; or a whole pass without a document.
        """
        while True:
            is_empty_pass = position == Position(turn=position.turn)
            for start, block in self._blocks(position):
                order = range(len(block)) if self.seed is None else self._rng(start).permutation(len(block))
                for index in range(position.document if start.block == position.block else 0, len(block)):
                    is_empty_pass = False
                    yield replace(start, document=index), block[int(order[index])]
            if is_empty_pass:
                raise DataError(
                    f"expected at least one document with text to use as {self.side!r} in {self.source!r}, "
                    "got none; check that the text column is the right one, or give more documents: a source "
                    f"without a validation split holds about one in {HELD_OUT_ONE_IN} out by its content"
                )
            position = Position(turn=position.turn + 1)

    def first(self, count: int) -> Dataset:
        """The first so many documents (fewer where there are fewer) as a table in memory."""
        kept: list[Record] = []
        for position, record in self.read(Position()):
            if position.turn or len(kept) == count:
                break
            kept.append(record)
        return to_dataset(kept, self.layout)

    def _rng(self, start: Position) -> np.random.Generator:
        return np.random.default_rng([self.seed or 0, start.turn, 1 + start.block])

    def _order(self, turn: int) -> list[int]:
        count = len(self.shards)
        if self.seed is None:
            return list(range(count))
        return np.random.default_rng([self.seed, turn, 0]).permutation(count).tolist()

    def _blocks(self, position: Position) -> Iterator[tuple[Position, list[Record]]]:
        """Blocks of one pass, each with where it begins."""
        start, block = replace(position, document=0), list[Record]()
        order = self._order(position.turn)
        for shard in range(position.shard, len(order)):
            name, opened = self.shards[order[shard]]
            with _told(name):
                table = opened()
                if shard == position.shard and position.source is not None:
                    table.load_state_dict(deepcopy(position.source))
                for record in table:
                    row = self._kept(name, record)
                    if row is None:
                        continue
                    block.append(row)
                    if len(block) == self.buffer:
                        yield start, block
                        start = Position(
                            turn=position.turn, shard=shard, source=table.state_dict(), block=start.block + 1
                        )
                        block = []
        if block:
            yield start, block

    def _kept(self, where: str, record: Record) -> Record | None:
        """The layout's columns of a record, or None where it is empty or on another side."""
        row = project(record, self.layout, self.text_column)
        problem = problem_of(row, self.layout)
        if problem is not None:
            raise DataError(f"{where}: {problem}")
        if is_empty(row, self.layout):
            return None
        if self.side == "whole" or (not self._is_divided and self.side == "validation"):
            return row
        rest = content_hash(row) % HELD_OUT_ONE_IN
        held_out = rest == 0 and self._is_divided
        sides: dict[Side, bool] = {
            "validation": held_out, "train": not held_out,
            "aside": rest == _ASIDE, "rest": not held_out and rest != _ASIDE,
        }  # fmt: skip
        return row if sides[self.side] else None


@contextmanager
def _told(name: str) -> Generator[None]:
    try:
        yield
    except DataError:
        raise
    except _READING_ERRORS as error:
        raise DataError(
            f"{name}: expected a shard that can be read to its end, got {type(error).__name__}: {error}; it "
            "may be cut short or damaged: fetch or write it again, or leave it out"
        ) from error


Shard = tuple[str, Callable[[], IterableDataset]]


def _shards_of(source: str, side: Side, subset: str | None) -> tuple[list[Shard], bool]:
    """(shards by name, whether they hold both sides): files, or those of a Hub data set."""
    if source == "stdlib":
        split = "validation" if side == "validation" else "train"
        return [(f"stdlib {split}", partial(_open_stdlib, split))], False
    if is_local(source):
        return [(str(path), partial(_open_file, path)) for path in local_files(source)], True
    return _hub_shards(source, side, subset)


def _open_stdlib(split: str) -> IterableDataset:
    return IterableDataset.from_generator(stdlib_records, gen_kwargs={"split": split})


def _open_file(path: Path) -> IterableDataset:
    suffix = path.suffix.lower()
    options: dict[str, Any] = {"data_files": [str(path)], "split": "train", "streaming": True}
    if suffix in PARQUET_SUFFIXES:
        kind = "parquet"
    elif suffix in JSON_SUFFIXES:
        kind = "json"
    else:  # a text file is one document
        kind = "text"
        options |= {"sample_by": "document", "encoding": "utf-8-sig"}
    return cast("IterableDataset", datasets.load_dataset(kind, **options))


def _hub_shards(name: str, side: Side, subset: str | None) -> tuple[list[Shard], bool]:
    try:
        found = datasets.load_dataset(name, subset, streaming=True)
        is_divided = "validation" not in found
        table = found["validation" if side == "validation" and not is_divided else "train"]
    except _READING_ERRORS as error:
        raise DataError(
            f"expected a Hub data set with a split 'train', got {type(error).__name__} on "
            f"load_dataset({name!r}, {subset!r}, streaming=True): {error}; check the name, subset and the "
            "network, or give a local path or 'stdlib', which need no network"
        ) from error
    count = table.num_shards
    return [
        (f"{name}, shard {i}", partial(table.shard, num_shards=count, index=i)) for i in range(count)
    ], is_divided
