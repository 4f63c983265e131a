"""Documents from shards: the same ones in the same order from any position on, and whose side they are on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from datasets import Dataset, IterableDatasetDict
from pyarrow.parquet import write_table

from equipoise.data.layouts import DataError
from equipoise.data.shards import Position, ShardedDocuments
from equipoise.data.sources import absolute_source, load_documents, overlaps

COUNT = 60


def texts(shard: int, count: int = COUNT) -> list[str]:
    return [f"document {shard}.{i}" for i in range(count)]


def write_shards(place: Path, kind: str, *, shards: int = 3, count: int = COUNT) -> str:
    """Shards of `count` documents; Parquet ones in groups of 7, so that blocks begin within a group."""
    for shard in range(shards):
        rows, path = texts(shard, count), place / f"s{shard}.{kind}"
        if kind == "parquet":
            write_table(pyarrow.table({"text": rows}), path, row_group_size=7)
        elif kind == "jsonl":
            path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
        else:
            for i, text in enumerate(rows):
                (place / f"s{shard}-{i}.txt").write_text(text)
    return str(place)


def first(documents: ShardedDocuments, count: int, start: Position | None = None) -> list[str]:
    return [row["text"] for _, row in islice(documents.read(start or Position()), count)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
class TestOrder:
    def test_one_pass_has_every_document_once(self, kind: str, tmp_path: Path) -> None:
        source = write_shards(tmp_path, kind, count=20)
        documents = ShardedDocuments(source, side="whole", seed=0, buffer=9)
        read = first(documents, 60)
        expected = [text for shard in range(3) for text in texts(shard, 20)]
        assert read != expected
        assert sorted(read) == sorted(expected)

    def test_every_position_goes_on_where_it_was_taken(self, kind: str, tmp_path: Path) -> None:
        source = write_shards(tmp_path, kind, count=20)
        documents = ShardedDocuments(source, side="train", seed=0, buffer=9)
        whole = list(islice(documents.read(Position()), 100))  # into the second pass
        for index in (0, 1, 8, 9, 10, 25, 40, 56, 57, 58, 70, 80):
            place = Position(**json.loads(json.dumps(whole[index][0].to_dict())))
            again = ShardedDocuments(source, side="train", seed=0, buffer=9)
            assert first(again, 100 - index, place) == [row["text"] for _, row in whole[index:]], index

    def test_without_a_seed_documents_come_as_they_lie(self, kind: str, tmp_path: Path) -> None:
        documents = ShardedDocuments(write_shards(tmp_path, kind, count=5), side="whole", buffer=4)
        read = first(documents, 15)
        assert read == [text for shard in range(3) for text in texts(shard, 5)]


class TestSides:
    def test_division_is_that_of_data_read_whole(self, tmp_path: Path) -> None:
        source = write_shards(tmp_path, "jsonl", count=200)
        for side in ("train", "validation"):
            whole = load_documents(source, split=side)["text"]
            streamed = ShardedDocuments(source, side=side, seed=1).first(1000)["text"]  # pyright: ignore
            assert sorted(streamed) == sorted(whole)

    def test_what_is_set_aside_is_neither_trained_on_nor_held_out(self, tmp_path: Path) -> None:
        source = write_shards(tmp_path, "parquet", count=200)
        sides = ("rest", "validation", "aside")
        train, held_out, aside = (set(ShardedDocuments(source, side=s).first(1000)["text"]) for s in sides)
        assert aside
        assert held_out
        assert not held_out & (train | aside)
        assert not train & aside

    def test_a_validation_split_of_its_own_is_held_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tables = {
            "train": Dataset.from_dict({"text": texts(0)}).to_iterable_dataset(num_shards=4),
            "validation": Dataset.from_dict({"text": texts(1)}).to_iterable_dataset(),
        }
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: IterableDatasetDict(tables))
        train = ShardedDocuments("some/data", seed=0)
        assert len(train.shards) == 4
        assert sorted(first(train, COUNT)) == sorted(texts(0))
        assert first(ShardedDocuments("some/data", side="validation"), COUNT) == texts(1)

    def test_the_standard_library_divides_by_files(self) -> None:
        expected = load_documents("stdlib", split="validation", limit=5)["text"][:]
        assert ShardedDocuments("stdlib", side="validation").first(5)["text"][:] == expected


class TestPatterns:
    def test_pattern_names_shards(self, tmp_path: Path) -> None:
        write_shards(tmp_path, "jsonl", count=3)
        (tmp_path / "other.jsonl").write_text(json.dumps({"text": "other"}))
        pattern = str(tmp_path / "s*.jsonl")
        assert len(ShardedDocuments(pattern, side="whole").first(100)) == 9
        assert len(load_documents(pattern, held_out=False)) == 9
        assert Path(absolute_source(pattern)).is_absolute()
        assert overlaps(pattern, str(tmp_path / "s1.jsonl"))
        assert overlaps(pattern, str(tmp_path))
        assert not overlaps(pattern, str(tmp_path / "other.jsonl"))

    def test_pattern_that_finds_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="expected non-empty files"):
            ShardedDocuments(str(tmp_path / "*.parquet"))

    def test_parquet_is_read_whole_too(self, tmp_path: Path) -> None:
        source = write_shards(tmp_path, "parquet", shards=1)
        assert load_documents(source, held_out=False)["text"][:] == texts(0)
        (tmp_path / "s0.parquet").write_bytes((tmp_path / "s0.parquet").read_bytes()[:100])
        with pytest.raises(DataError, match=r"s0\.parquet.*cut short"):
            load_documents(source)


class TestErrors:
    def test_damaged_shard_is_named_when_it_is_reached(self, tmp_path: Path) -> None:
        source = write_shards(tmp_path, "parquet")
        damaged = tmp_path / "s1.parquet"
        damaged.write_bytes(damaged.read_bytes()[:200])
        reader = ShardedDocuments(source, side="whole", buffer=10).read(Position())
        assert len(list(islice(reader, COUNT))) == COUNT
        with pytest.raises(DataError, match=r"s1\.parquet: expected a shard that can be read to its end"):
            next(reader)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"body": "x"}, "expected columns of one of these"),
            ({"text": 3}, "expected text in column 'text'"),
        ],
    )
    def test_records_that_do_not_fit(self, row: dict[str, Any], message: str, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=message):
            first(ShardedDocuments(str(tmp_path / "a.jsonl")), 1)

    def test_nothing_on_a_side(self, tmp_path: Path) -> None:
        source = write_shards(tmp_path, "jsonl", shards=1, count=1)
        with pytest.raises(DataError, match="at least one document with text to use as 'validation'"):
            list(islice(ShardedDocuments(source, side="validation").read(Position()), 1))

    def test_missing_source(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="expected a file or directory"):
            ShardedDocuments(str(tmp_path / "nothing"))
        with pytest.raises(DataError, match="expected a Hub data set"):
            ShardedDocuments("no/such-data")
