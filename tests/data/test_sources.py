"""Documents from every source, and a clear error for each kind of unusable input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from equipoise.data.sources import DataError, load_documents, stdlib_files


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"document {i}"} for i in range(count)]


class TestStdlib:
    def test_splits_are_disjoint_and_about_one_in_twenty(self) -> None:
        train, validation = ({name for name, _ in stdlib_files(s)} for s in ("train", "validation"))
        assert not train & validation
        assert 0.02 < len(validation) / len(train | validation) < 0.08
        skipped = ("test/", "tests/", "site-packages/", "encodings/", "idlelib/")
        assert not [name for name in train | validation if name.startswith(skipped)]

    def test_order_is_shuffled_and_repeatable(self) -> None:
        names = [name for name, _ in stdlib_files("train")]
        assert names == [name for name, _ in stdlib_files("train")]
        assert names != sorted(names)

    def test_documents_are_whole_files(self) -> None:
        documents = load_documents("stdlib", split="validation", limit=3)
        contents = [path.read_text(encoding="utf-8") for _, path in stdlib_files("validation")]
        contents = [content for content in contents if content.strip()]
        assert documents["text"][:] == contents[:3]

    def test_other_splits_are_refused(self) -> None:
        with pytest.raises(DataError, match=r"'train' or 'validation'.*'test'"):
            load_documents("stdlib", split="test")


class TestLocalFiles:
    def test_text_file_is_one_document(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"one\r\n\r\ntwo\n")
        assert load_documents(str(path))["text"][:] == ["one\n\ntwo\n"]

    def test_unknown_suffix_is_read_as_text(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tex"
        path.write_text("words")
        assert load_documents(str(path))["text"][:] == ["words"]

    def test_directory_reads_every_text_and_json_file(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "no.txt").write_text("hidden")
        (tmp_path / "a.md").write_text("markdown")
        (tmp_path / "picture.png").write_bytes(b"\x00")
        (tmp_path / "empty.txt").write_text("")
        write_rows(tmp_path / "sub" / "b.jsonl", [{"text": "lines"}])
        documents = load_documents(str(tmp_path), held_out=False)
        assert sorted(documents["text"][:]) == ["lines", "markdown"]

    @pytest.mark.parametrize("as_list", [True, False])
    def test_json_file_holds_a_list_or_lines(self, tmp_path: Path, as_list: bool) -> None:
        path = tmp_path / "a.json"
        rows = texts(3)
        path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)))
        assert load_documents(str(path), held_out=False)["text"][:] == [r["text"] for r in rows]

    def test_line_separators_within_strings_do_not_end_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
        assert load_documents(str(path))["text"][:] == ["a\u2028b"]

    @pytest.mark.parametrize(
        ("row", "columns"),
        [
            ({"text": "t", "messages": [{"role": "user", "content": "q"}]}, {"messages"}),
            ({"prompt": "q", "completion": "a", "id": 3}, {"prompt", "completion"}),
            ({"instruction": "q", "input": None, "output": "a"}, {"instruction", "input", "output"}),
            ({"instruction": "q", "output": "a", "text": "qa"}, {"instruction", "input", "output"}),
            ({"text": "t", "id": 3}, {"text"}),
        ],
    )
    def test_layout_is_recognised(self, tmp_path: Path, row: dict[str, Any], columns: set[str]) -> None:
        documents = load_documents(write_rows(tmp_path / "a.jsonl", [row]))
        assert set(documents.column_names) == columns

    def test_text_column_overrides_the_layout(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "body": "b"}])
        assert load_documents(path, text_column="body").to_list() == [{"text": "b"}]

    def test_empty_documents_are_left_out_and_limit_counts_the_rest(self, tmp_path: Path) -> None:
        rows = [{"text": ""}, {"text": None}, {"text": " \n"}, *texts(5)]
        documents = load_documents(write_rows(tmp_path / "a.jsonl", rows), limit=2, held_out=False)
        assert documents["text"][:] == ["document 0", "document 1"]


class TestHeldOut:
    def test_splits_partition_the_documents(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", texts(400))
        train, validation = (set(load_documents(path, split=s)["text"]) for s in ("train", "validation"))
        assert not train & validation
        assert len(train) + len(validation) == 400
        assert 5 <= len(validation) <= 45

    def test_membership_depends_on_content_and_not_on_order(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", texts(100))
        turned = write_rows(tmp_path / "b.jsonl", texts(100)[::-1] + texts(50))
        first = set(load_documents(path, split="validation")["text"])
        assert first == set(load_documents(turned, split="validation")["text"])

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_few_documents_leave_neither_side_empty(self, tmp_path: Path, count: int) -> None:
        path = write_rows(tmp_path / "a.jsonl", texts(count))
        assert len(load_documents(path, split="validation")) >= 1
        assert len(load_documents(path, split="train")) >= 1

    def test_one_document_cannot_be_divided(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", texts(1))
        assert len(load_documents(path, split="train")) == 1
        with pytest.raises(DataError, match="separate validation file"):
            load_documents(path, split="validation")

    def test_a_distinct_validation_file_is_used_whole(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", texts(30))
        assert len(load_documents(path, split="validation", held_out=False)) == 30

    def test_other_splits_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="'train' or 'validation'"):
            load_documents(write_rows(tmp_path / "a.jsonl", texts(3)), split="test")


class TestBadInput:
    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"expected a file or directory.*none.*stdlib"):
            load_documents(str(tmp_path / "no.jsonl"))

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
    def test_empty_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match="empty file"):
            load_documents(str(tmp_path / name))

    @pytest.mark.parametrize("raw", [b"abc\x00def", b"caf\xe9"])
    def test_binary_file(self, tmp_path: Path, raw: bytes) -> None:
        (tmp_path / "a.txt").write_bytes(raw)
        with pytest.raises(DataError, match=r"expected UTF-8 text in .*a\.txt"):
            load_documents(str(tmp_path / "a.txt"))

    def test_directory_without_text(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"\.jsonl.*got none"):
            load_documents(str(tmp_path))

    @pytest.mark.parametrize("suffix", ["jsonl", "json"])
    def test_broken_line_is_named(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"a.{suffix}"
        path.write_text('{"text": "a"}\n\n{"text": \n')
        with pytest.raises(DataError, match="line 3 that does not parse"):
            load_documents(str(path))

    @pytest.mark.parametrize("row", ["text", 3, ["a"]])
    def test_line_that_is_no_object(self, tmp_path: Path, row: Any) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, row])
        with pytest.raises(DataError, match="line 2: expected a JSON object"):
            load_documents(path)

    def test_no_usable_column_lists_the_columns(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"body": "a", "title": "b"}])
        with pytest.raises(DataError, match=r"\['body', 'title'\].*text_column"):
            load_documents(path)

    def test_missing_text_column_lists_the_columns(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"body": "a"}])
        with pytest.raises(DataError, match=r"'title', got \['body'\]"):
            load_documents(path, text_column="title")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"other": "a"}, "line 2: expected a column 'text'"),
            ({"text": 3}, "line 2: expected text in column 'text', got a int"),
        ],
    )
    def test_malformed_text_row(self, tmp_path: Path, row: Any, message: str) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, row])
        with pytest.raises(DataError, match=message):
            load_documents(path)

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ("hello", "got a str"),
            (["hello"], "got a str at 0"),
            ([{"role": "user"}], "'content' of message 0"),
            ([{"role": "user", "content": [{"type": "image"}]}], "only text conversations"),
        ],
    )
    def test_malformed_conversation(self, tmp_path: Path, messages: Any, message: str) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
        with pytest.raises(DataError, match=f"line 1: .*{message}"):
            load_documents(path)

    def test_no_document_left(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"text": " "}, {"text": None}])
        with pytest.raises(DataError, match=r"at least one document.*got none"):
            load_documents(path)

    def test_lone_surrogate(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "\\ud800"}')
        with pytest.raises(DataError, match="valid types"):
            load_documents(str(path))

    @pytest.mark.parametrize("limit", [0, -1])
    def test_limit_below_one(self, limit: int) -> None:
        with pytest.raises(DataError, match="limit of at least 1"):
            load_documents("stdlib", limit=limit)


class TestHub:
    def serve(self, monkeypatch: pytest.MonkeyPatch, **splits: list[dict[str, Any]]) -> None:
        def load_dataset(name: str, subset: str | None, split: str | None = None) -> Any:
            assert (name, subset) == ("owner/name", "en")
            tables = DatasetDict({key: Dataset.from_list(rows) for key, rows in splits.items()})
            if split is None:
                return tables
            return tables["train"].select(range(2))  # stands for a slice

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        datasets.disable_progress_bars()

    def load(self, **options: Any) -> list[dict[str, Any]]:
        return load_documents("owner/name", subset="en", **options).to_list()

    def test_own_splits_are_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.serve(monkeypatch, train=texts(30), validation=[{"text": "held"}, {"text": ""}])
        assert self.load(split="validation") == [{"text": "held"}]
        assert len(self.load(split="train")) == 30
        assert len(self.load(split="train[:2]")) == 2

    def test_train_is_divided_where_there_is_no_validation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [{"instruction": f"q{i}", "output": "a", "input": None, "x": i} for i in range(60)]
        self.serve(monkeypatch, train=rows)
        train, validation = self.load(split="train"), self.load(split="validation")
        assert len(train) + len(validation) == 60
        assert not {r["instruction"] for r in train} & {r["instruction"] for r in validation}
        assert set(train[0]) == {"instruction", "output", "input"}
        assert len(self.load(split="train", held_out=False)) == 60

    def test_text_column(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.serve(monkeypatch, test=[{"body": "a", "text": "b"}])
        assert self.load(split="test", text_column="body") == [{"text": "a"}]

    def test_unknown_split_lists_the_splits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.serve(monkeypatch, train=texts(3))
        with pytest.raises(DataError, match=r"no split 'test' among \['train'\]"):
            self.load(split="test")

    def test_wrong_types_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.serve(monkeypatch, test=[{"text": 3}])
        with pytest.raises(DataError, match="expected text in column 'text'"):
            self.load(split="test")

    def test_offline_says_what_was_tried_and_what_works(self) -> None:
        with pytest.raises(DataError, match=r"load_dataset\('owner/absent', None\).*local path or 'stdlib'"):
            load_documents("owner/absent")
