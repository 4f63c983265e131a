"""Packing loses no token and leaks none between documents; the cache returns what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from equipoise.data import packing as data
from equipoise.data import token_cache
from equipoise.data.packing import (
    IGNORED_LABEL,
    PackedDataset,
    check_tokenizer,
    collate,
    evaluation_batches,
    evaluation_windows,
    pack_documents,
)
from equipoise.data.sources import DataError
from equipoise.data.token_cache import TokenStream, default_cache_dir

TEXTS = ["the quick brown fox " * n + f"number {n}" for n in range(1, 13)]


def documents(texts: list[str] = TEXTS) -> Dataset:
    return Dataset.from_dict({"text": texts})


def pack(tokenizer: PreTrainedTokenizerFast, cache_dir: Path, **changes: Any) -> PackedDataset:
    options: dict[str, Any] = {"context_length": 16, "seed": 0, "cache_dir": cache_dir, **changes}
    return pack_documents(options.pop("documents", documents()), tokenizer, **options)


def refuse_to_tokenise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("tokenised a second time")

    monkeypatch.setattr(data, "encode_documents", refuse)


def all_tokens(packed: PackedDataset) -> list[int]:
    return [int(i) for row in packed for i in row["input_ids"]]


class TestRows:
    def test_known_rows(self) -> None:
        stream = TokenStream(
            tokens=np.arange(10, 20, dtype=np.int32),
            trained=np.array([True] * 8 + [False, True]),
            starts=np.array([0, 3, 4], dtype=np.int64),
        )
        packed = PackedDataset(stream, context_length=5)
        first, second = packed[0], packed[1]
        assert first["input_ids"].tolist() == [10, 11, 12, 13, 14]
        assert first["segment_ids"].tolist() == [0, 0, 0, 1, 2]
        assert first["position_ids"].tolist() == [0, 1, 2, 0, 0]
        assert first["labels"].tolist() == [-100, 11, 12, -100, -100]
        # The third document goes on as a segment of its own.
        assert second["segment_ids"].tolist() == [0, 0, 0, 0, 0]
        assert second["position_ids"].tolist() == [0, 1, 2, 3, 4]
        assert second["labels"].tolist() == [-100, 16, 17, -100, 19]
        assert {t.dtype for t in first.values()} == {torch.int64}

    @pytest.mark.parametrize("context_length", [2, 7, 16, 63])
    def test_nothing_leaks_between_segments(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, context_length: int
    ) -> None:
        for row in pack(tokenizer, tmp_path, context_length=context_length):
            segments, positions, labels = row["segment_ids"], row["position_ids"], row["labels"]
            steps = segments.diff()
            assert segments[0] == 0
            assert set(steps.tolist()) <= {0, 1}
            starts = torch.cat([torch.tensor([True]), steps == 1])
            assert torch.equal(positions == 0, starts)
            assert torch.equal(positions.diff()[steps == 0], torch.ones_like(steps)[steps == 0])
            assert torch.equal(labels == IGNORED_LABEL, starts)
            assert torch.equal(labels[~starts], row["input_ids"][~starts])
            ends = torch.cat([starts[1:], torch.tensor([False])])  # the last token before a new segment
            assert all(i == tokenizer.eos_token_id for i in row["input_ids"][ends].tolist())

    def test_tokens_are_conserved(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        packed = pack(tokenizer, tmp_path)
        expected = sum(len(ids) + 1 for ids in tokenizer(TEXTS)["input_ids"])
        stats = packed.statistics
        assert (stats.documents, stats.tokens, stats.rows_without_labels) == (len(TEXTS), expected, 0)
        assert len(packed) * 16 + stats.dropped_tokens == expected
        assert all_tokens(packed) == packed.stream.tokens[: len(packed) * 16].tolist()
        text = str(tokenizer.decode(packed.stream.tokens.tolist()))
        assert sorted(text.split("<eos>")) == sorted([*TEXTS, ""])
        assert stats.trained_tokens == sum(int((row["labels"] >= 0).sum()) for row in packed)

    def test_rows_without_labels_are_left_out(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        pairs = {"prompt": ["the quick brown fox " * 30], "completion": ["jumps over the dog " * 5]}
        rows = Dataset.from_dict(pairs)
        packed = pack(tokenizer, tmp_path, documents=rows)
        stats = packed.statistics
        assert stats.rows_without_labels > 0
        assert (stats.rows + stats.rows_without_labels) * 16 + stats.dropped_tokens == stats.tokens
        assert all((row["labels"] >= 0).any() for row in packed)

    def test_order_depends_on_the_seed_alone(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        first = all_tokens(pack(tokenizer, tmp_path / "a"))
        np.random.seed(3)
        assert first == all_tokens(pack(tokenizer, tmp_path / "b"))
        assert first != all_tokens(pack(tokenizer, tmp_path, seed=1))

    def test_max_tokens(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        whole, part = pack(tokenizer, tmp_path), pack(tokenizer, tmp_path, max_tokens=40)
        assert part.statistics.tokens == 40
        assert part.stream.tokens.tolist() == whole.stream.tokens[:40].tolist()

    def test_sequence_protocol(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        packed = pack(tokenizer, tmp_path)
        assert torch.equal(packed[-1]["input_ids"], packed[len(packed) - 1]["input_ids"])
        with pytest.raises(IndexError):
            packed[len(packed)]

    def test_collate_stacks_rows(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        packed = pack(tokenizer, tmp_path)
        batch = next(iter(DataLoader(packed, batch_size=3, collate_fn=collate)))
        assert set(batch) == {"input_ids", "labels", "segment_ids", "position_ids"}
        assert {tuple(values.shape) for values in batch.values()} == {(3, 16)}
        assert torch.equal(batch["labels"][1], packed[1]["labels"])


class TestPackingErrors:
    def test_too_few_tokens(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"at least 512 tokens .* got \d+ from 1 documents"):
            pack(tokenizer, tmp_path, documents=documents(["the fox"]), context_length=512)

    def test_no_response(self, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        rows = Dataset.from_list([{"messages": [{"role": "user", "content": "the fox " * 30}]}])
        with pytest.raises(DataError, match=r"responses to train on.*responses_only=False"):
            pack(chat_tokenizer, tmp_path, documents=rows)

    def test_context_length(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="at least 2 tokens, got 1"):
            pack(tokenizer, tmp_path, context_length=1)

    def test_max_tokens(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="max_tokens of at least 1"):
            pack(tokenizer, tmp_path, max_tokens=0)

    def test_ids_past_the_vocabulary(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        pack(tokenizer, tmp_path, vocab_size=len(tokenizer))
        with pytest.raises(DataError, match="vocabulary size 50, got documents with ids up to"):
            pack(tokenizer, tmp_path, vocab_size=50)

    def test_no_eos(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        tokenizer.eos_token = None
        with pytest.raises(DataError, match=r"EOS token.*set tokenizer\.eos_token"):
            pack(tokenizer, tmp_path)


class TestCheckTokenizer:
    def test_fits(self, tokenizer: PreTrainedTokenizerFast) -> None:
        check_tokenizer(tokenizer, len(tokenizer))
        check_tokenizer(tokenizer, 1000)

    def test_too_large(self, tokenizer: PreTrainedTokenizerFast) -> None:
        size = len(tokenizer)
        with pytest.raises(DataError, match=rf"size 200, got a tokenizer of {size} .*embeddings\({size}\)"):
            check_tokenizer(tokenizer, 200)

    def test_no_eos(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="EOS token"):
            check_tokenizer(tokenizer, 1000)

    def test_added_tokens_are_refused_only_where_they_can_occur(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        size = len(tokenizer)
        tokenizer.add_tokens(["<image>"])
        check_tokenizer(tokenizer, size)
        tokenizer.chat_template = "<image>{{ messages }}"
        with pytest.raises(DataError, match=f"size {size}"):
            check_tokenizer(tokenizer, size)
        tokenizer.chat_template = None
        tokenizer.pad_token = "<image>"
        with pytest.raises(DataError, match=f"size {size}"):
            check_tokenizer(tokenizer, size)


class TestCache:
    def test_second_call_does_not_tokenise(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = pack(tokenizer, tmp_path)
        # A call that truncates leaves this in the tokenizer's state; later calls reset it.
        tokenizer.backend_tokenizer.enable_truncation(4)
        refuse_to_tokenise(monkeypatch)
        assert all_tokens(pack(tokenizer, tmp_path)) == all_tokens(first)
        assert len(pack(tokenizer, tmp_path, context_length=32)) == first.statistics.tokens // 32
        assert [p.suffix for p in (tmp_path / "tokens").iterdir()] == [".safetensors"]

    @pytest.mark.parametrize(
        "change",
        [{"seed": 1}, {"max_tokens": 50}, {"responses_only": False}, {"documents": documents(["x"])}],
    )
    def test_another_input_is_another_entry(
        self,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        change: dict[str, Any],
    ) -> None:
        pack(tokenizer, tmp_path)
        refuse_to_tokenise(monkeypatch)
        with pytest.raises(AssertionError, match="second time"):
            pack(tokenizer, tmp_path, **change)

    def test_another_tokenizer_is_another_entry(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pack(tokenizer, tmp_path)
        tokenizer.add_tokens(["fox"])
        refuse_to_tokenise(monkeypatch)
        with pytest.raises(AssertionError, match="second time"):
            pack(tokenizer, tmp_path)

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
    def test_damaged_file_is_rebuilt(
        self,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        damage: str,
    ) -> None:
        first = pack(tokenizer, tmp_path)
        (path,) = (tmp_path / "tokens").iterdir()
        intact = path.read_bytes()
        flipped = intact[:-1] + bytes([intact[-1] ^ 1])
        damaged = {"cut": intact[:-40], "flip": flipped, "empty": b"", "foreign": b"not safetensors"}
        path.write_bytes(damaged[damage])
        assert all_tokens(pack(tokenizer, tmp_path)) == all_tokens(first)
        assert "rebuilding the token cache" in caplog.text
        assert path.read_bytes() == intact

    def test_failed_write_leaves_nothing_behind_and_is_no_error(
        self,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(token_cache, "save_file", full)
        assert len(pack(tokenizer, tmp_path)) > 0
        assert "No space left" in caplog.text
        assert list((tmp_path / "tokens").iterdir()) == []

    def test_default_directory(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
        assert default_cache_dir() == tmp_path
        monkeypatch.delenv("EQUIPOISE_CACHE")
        assert default_cache_dir() == Path.home() / ".cache" / "equipoise"


class TestEvaluation:
    def test_windows_cover_each_document_on_its_own(self, tokenizer: PreTrainedTokenizerFast) -> None:
        windows = evaluation_windows(documents(), tokenizer, context_length=10)
        for index, ids in enumerate(tokenizer(TEXTS)["input_ids"]):
            own = [w for w in windows if w.document == index]
            joined = [int(i) for w in own for i in w.input_ids]
            assert joined == (ids if len(ids) % 10 != 1 else ids[:-1])  # one token predicts nothing
            assert [w.start for w in own] == list(range(0, len(joined), 10))
        for window in windows:
            assert window.labels[0] == IGNORED_LABEL
            assert torch.equal(window.labels[1:], window.input_ids[1:])

    def test_limits(self, tokenizer: PreTrainedTokenizerFast) -> None:
        windows = evaluation_windows(
            documents(), tokenizer, context_length=4, limit_documents=3, max_windows_per_document=2
        )
        assert [w.document for w in windows] == [0, 0, 1, 1, 2, 2]

    def test_short_documents_are_skipped_and_keep_their_index(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        windows = evaluation_windows(documents(["x", "the fox"]), tokenizer, context_length=8)
        assert [w.document for w in windows] == [1]
        with pytest.raises(DataError, match=r"at least 2 tokens.*among 1"):
            evaluation_windows(documents(["x"]), tokenizer, context_length=8)

    def test_only_responses_are_labels(self, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = Dataset.from_dict({"prompt": ["the quick"], "completion": [" brown fox"]})
        (window,) = evaluation_windows(rows, tokenizer, context_length=64)
        assert tokenizer.decode(window.labels[window.labels >= 0].tolist()) == " brown fox"

    def test_refusals(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="context_length of at least 2"):
            evaluation_windows(documents(), tokenizer, context_length=1)
        with pytest.raises(DataError, match="vocabulary size 50"):
            evaluation_windows(documents(), tokenizer, context_length=8, vocab_size=50)

    def test_batches_pad_on_the_right_and_return_every_window_once(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        windows = evaluation_windows(documents(), tokenizer, context_length=23)
        batches = list(evaluation_batches(windows, batch_size=5, pad_token_id=7))
        seen = [int(i) for batch in batches for i in batch.window_ids]
        assert sorted(seen) == list(range(len(windows)))
        widths = [batch.input_ids.shape[1] for batch in batches]
        assert widths == sorted(widths, reverse=True)
        for batch in batches:
            assert batch.attention_mask.sum(1).max() == batch.input_ids.shape[1]
            for row, index in enumerate(batch.window_ids.tolist()):
                window, length = windows[index], len(windows[index].input_ids)
                assert batch.document_ids[row] == window.document
                assert torch.equal(batch.input_ids[row, :length], window.input_ids)
                assert torch.equal(batch.labels[row, :length], window.labels)
                assert (batch.input_ids[row, length:] == 7).all()
                assert (batch.labels[row, length:] == IGNORED_LABEL).all()
                assert (
                    batch.attention_mask[row].tolist()
                    == [int(i < length) for i in range(widths[0])][: batch.input_ids.shape[1]]
                )
        again = [
            batch.window_ids.tolist() for batch in evaluation_batches(windows, batch_size=5, pad_token_id=7)
        ]
        assert again == [batch.window_ids.tolist() for batch in batches]

    def test_batch_size(self) -> None:
        with pytest.raises(ValueError, match="batch_size of at least 1"):
            list(evaluation_batches([], batch_size=0, pad_token_id=0))
