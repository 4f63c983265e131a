"""Streamed rows: those of the same documents packed in memory, by index, from any position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from equipoise.data.encoding import encode_documents
from equipoise.data.layouts import DataError
from equipoise.data.packing import PackedDataset, pack_documents, tokenise_stream
from equipoise.data.shards import Position, ShardedDocuments
from equipoise.data.sources import load_documents
from equipoise.data.streaming import RowPosition, StreamedRows

LENGTH = 16


@pytest.fixture
def source(tmp_path: Path) -> str:
    for shard in range(3):
        lines = [json.dumps({"text": f"def window(size) {shard} {i} " * (i % 5 + 1)}) for i in range(40)]
        (tmp_path / f"s{shard}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "s*.jsonl")


def streamed(
    source: str, tokenizer: PreTrainedTokenizerFast, *, count: int = 400, seed: int | None = 0, **options: Any
) -> StreamedRows:
    documents = ShardedDocuments(source, seed=seed, buffer=16, side=options.pop("side", "train"))
    return StreamedRows(documents, tokenizer, context_length=LENGTH, count=count, **options)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("separate", [True, False])
def test_rows_are_those_packed_in_memory(
    separate: bool, source: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = streamed(source, tokenizer, seed=None, side="whole", separate=separate)
    documents = load_documents(source, held_out=False)
    tokens = [t for d in encode_documents(documents, tokenizer) for t in d.input_ids]
    packed = _in_order(documents, tokenizer, separate=separate)
    assert len(packed) == len(tokens) // LENGTH
    for index in range(len(packed)):
        assert same(rows[index], packed[index]), index


def _in_order(documents: Any, tokenizer: PreTrainedTokenizerFast, *, separate: bool) -> PackedDataset:
    return PackedDataset(
        tokenise_stream(documents, tokenizer, None, True), context_length=LENGTH, separate=separate
    )


class TestIndices:
    def test_any_order_and_any_reader_give_the_same_rows(
        self, source: str, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        rows = streamed(source, tokenizer)
        whole = [rows[i] for i in range(300)]
        again = streamed(source, tokenizer)
        for index in (3, 1, 1, 299, 0, 150, 151, 149):
            assert same(again[index], whole[index]), index
        ranks = [streamed(source, tokenizer) for _ in range(2)]
        for index in range(0, 100):
            assert same(ranks[index // 4 % 2][index], whole[index]), index

    def test_the_second_pass_has_an_order_of_its_own(
        self, source: str, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        rows = streamed(source, tokenizer, count=2000)
        places = [rows.position(i).place for i in range(0, 2000, 7)]
        assert max(place.turn for place in places) >= 1
        read = [row["text"] for _, row in zip(range(240), _texts(rows), strict=False)]
        half = len(set(read))
        assert read[:half] != read[half : 2 * half]
        assert set(read[:half]) == set(read[half : 2 * half])

    def test_seeds_differ_and_repeat(self, source: str, tokenizer: PreTrainedTokenizerFast) -> None:
        one, two, other = (streamed(source, tokenizer, seed=seed)[5] for seed in (0, 0, 1))
        assert same(one, two)
        assert not same(one, other)

    def test_no_row_past_the_count(self, source: str, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = streamed(source, tokenizer, count=4)
        assert len(rows) == 4
        with pytest.raises(IndexError):
            rows[4]


def _texts(rows: StreamedRows) -> Any:
    return (row for _, row in rows.documents.read(Position()))


class TestPosition:
    @pytest.mark.parametrize("index", [0, 1, 7, 64, 130, 299])
    def test_a_row_sought_is_the_row(
        self, index: int, source: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = streamed(source, tokenizer)
        rows[min(index + 9, 300)]  # prefetched past what a checkpoint is of
        position = RowPosition.from_dict(json.loads(json.dumps(rows.position(index).to_dict())))
        expected = [rows[i] for i in range(index, index + 20)]
        resumed = streamed(source, tokenizer)
        resumed.seek(index, position)
        started: list[Position] = []
        read = ShardedDocuments.read

        def noted(self: ShardedDocuments, start: Position) -> Any:
            started.append(start)
            return read(self, start)

        monkeypatch.setattr(ShardedDocuments, "read", noted)
        for i in range(20):
            assert same(resumed[index + i], expected[i])
        assert started == [position.place]  # nothing before it was read

    def test_positions_are_forgotten_but_rows_are_not(
        self, source: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("equipoise.data.streaming._REMEMBERED", 10)
        rows = streamed(source, tokenizer)
        first = [rows[i] for i in range(100)]
        assert len(rows._known) <= 12
        assert same(rows[50], first[50])


class TestErrors:
    def test_too_little_for_a_row_is_not_read_forever(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ab"}))
        documents = ShardedDocuments(str(tmp_path / "a.jsonl"), side="whole")
        rows = StreamedRows(documents, tokenizer, context_length=1000, count=3)
        with pytest.raises(DataError, match="expected a row of 1000 tokens"):
            rows[0]

    def test_counts_and_lengths(self, source: str, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="expected max_tokens of at least 16 tokens"):
            streamed(source, tokenizer, count=0)
        with pytest.raises(DataError, match="ids up to"):
            streamed(source, tokenizer, vocab_size=5)[0]


def test_packing_in_memory_can_join_documents(
    source: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    documents = load_documents(source)
    apart, joined = (
        pack_documents(documents, tokenizer, context_length=LENGTH, seed=0, cache_dir=tmp_path, separate=flag)
        for flag in (True, False)
    )
    row = joined[3]
    assert "segment_ids" not in row
    assert row["position_ids"].tolist() == list(range(LENGTH))
    assert (row["labels"][1:] == row["input_ids"][1:]).all()
    assert torch.equal(apart[3]["input_ids"], row["input_ids"])
