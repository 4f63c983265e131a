"""Token data for training and audit: packed rows, and windows of single documents.

Shapes: N tokens of all documents in a row, T context length, R rows, B batch, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from equipoise.data.encoding import encode_documents
from equipoise.data.layouts import DataError
from equipoise.data.token_cache import (
    TokenStream,
    default_cache_dir,
    read_stream,
    stream_key,
    write_stream,
)

IGNORED_LABEL = -100
"""The label that transformers' losses leave out."""


# --- the tokenizer --------------------------------------------------------------------------


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that a tokenizer can feed a model whose vocabulary has `vocab_size` rows.

    Added tokens past the vocabulary are accepted where no text of ours produces them: Gemma 3 1B
    ships with an image token that its embedding lacks. The ids that documents do produce are
    checked by `pack_documents` and `evaluation_windows`.

    Raises:
        DataError: no EOS token, or ids past the model's vocabulary.
    """
    _eos(tokenizer)
    untyped = cast("Any", tokenizer)  # __getattr__ hides these two methods from a type checker
    vocabulary: dict[str, int] = untyped.get_vocab()
    highest = max(vocabulary.values(), default=0)
    if highest < vocab_size:
        return
    added: dict[str, int] = untyped.get_added_vocab()
    special = cast("Mapping[str, object]", tokenizer.special_tokens_map)
    named = {str(special.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    unreachable = {t for t in added if t not in named and t not in template}
    if any(i >= vocab_size and token not in unreachable for token, i in vocabulary.items()):
        raise _vocabulary_error(highest, vocab_size, f"a tokenizer of {len(tokenizer)} tokens")


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = cast("int | None", tokenizer.eos_token_id)
    if eos is None:
        raise DataError(
            "expected a tokenizer with an EOS token to end documents with, got none; set "
            "tokenizer.eos_token to a token of its vocabulary"
        )
    return eos


def _vocabulary_error(highest: int, vocab_size: int, what: str) -> DataError:
    return DataError(
        f"expected token ids below the model's vocabulary size {vocab_size}, got {what} with ids up "
        f"to {highest}; use the model's own tokenizer, or call "
        f"model.resize_token_embeddings({highest + 1}) first"
    )


def check_ids(highest: int, vocab_size: int | None) -> None:
    """Raise `DataError` where documents have ids past the model's vocabulary."""
    if vocab_size is not None and highest >= vocab_size:
        raise _vocabulary_error(highest, vocab_size, "documents")


# --- packing --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PackingStatistics:
    """What became of the tokens: tokens = (rows + rows_without_labels) * T + dropped_tokens."""

    documents: int
    tokens: int
    rows: int
    rows_without_labels: int
    """Rows left out because the loss would count none of their tokens and be 0/0."""
    dropped_tokens: int
    """Tokens of the last, partial row."""
    trained_tokens: int
    """Labels of the rows kept, as the loss counts them."""


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of exactly `context_length` tokens, cut from a stream of documents.

    Each row is a dict of int64 tensors [T]: `input_ids`; `segment_ids`, counting the documents of
    the row from 0; `position_ids`, counting from 0 in each segment; and `labels`, the input ids
    with -100 where the loss does not count. transformers shifts labels by one, so the first token
    of a segment, which the previous document would predict, is never a label. A document that
    crosses a row's end goes on in the next row as a segment of its own.

    Where documents are not separate a row is one sequence without `segment_ids`: attention crosses from a
    document to the next, positions count on, and a document's first token is a label too.

    Args:
        stream: tokens of all documents.
        context_length: T.
        separate: whether documents are segments of their own.

    Raises:
        DataError: fewer tokens than one row, or no row with a label.
    """

    def __init__(self, stream: TokenStream, *, context_length: int, separate: bool = True) -> None:
        if context_length < 2:
            raise DataError(f"expected a context_length of at least 2 tokens, got {context_length}; raise it")
        total = len(stream.tokens)
        rows = total // context_length
        if rows == 0:
            raise DataError(
                f"expected at least {context_length} tokens to fill one row, got {total} from "
                f"{len(stream.starts)} documents; give more data, raise limit or max_tokens, or "
                f"lower context_length to at most {total}"
            )
        labelled = stream.trained.copy()
        labelled[stream.starts] &= not separate
        labelled[::context_length] = False
        per_row = labelled[: rows * context_length].reshape(rows, context_length).sum(axis=1)
        self.stream = stream
        self.context_length, self.separate = context_length, separate
        self._rows: NDArray[np.int64] = np.flatnonzero(per_row).astype(np.int64)
        self.statistics = PackingStatistics(
            documents=len(stream.starts),
            tokens=total,
            rows=len(self._rows),
            rows_without_labels=rows - len(self._rows),
            dropped_tokens=total - rows * context_length,
            trained_tokens=int(per_row.sum()),
        )
        if len(self._rows) == 0:
            raise DataError(
                f"expected responses to train on, got none in {rows} rows of {context_length} "
                "tokens; raise context_length, check that conversations have assistant turns, or "
                "set responses_only=False"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        low = int(self._rows[range(len(self))[index]]) * self.context_length
        high = low + self.context_length
        starts = self.stream.starts
        first = int(np.searchsorted(starts, low, side="right")) - 1
        inside = starts[first : int(np.searchsorted(starts, high))]
        row = packed_row(
            self.stream.tokens[low:high], self.stream.trained[low:high], np.maximum(inside, low) - low,
            separate=self.separate,
        )  # fmt: skip
        assert row is not None
        return row


def packed_row(
    tokens: NDArray[np.int32] | list[int],
    trained: NDArray[np.bool_] | list[bool],
    starts: NDArray[np.int64] | list[int],
    *,
    separate: bool,
) -> dict[str, Tensor] | None:
    """One row of T tokens (see `PackedDataset`), or None where the loss would count none of them.

    Args:
        tokens, trained: T each.
        starts: where documents begin in the row, ascending from 0.
        separate: whether documents are segments of their own.
    """
    ids, span = np.asarray(tokens, np.int64), np.arange(len(tokens))
    bounds = np.asarray(starts if separate else [0], np.int64)
    segments = np.searchsorted(bounds, span, side="right") - 1
    positions = span - bounds[segments]
    labelled = np.asarray(trained, np.bool_) & (positions > 0)
    if not labelled.any():
        return None
    labels = np.where(labelled, ids, IGNORED_LABEL)
    row = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if separate:
        row["segment_ids"] = segments
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in row.items()}


def pack_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    seed: int,
    max_tokens: int | None = None,
    cache_dir: Path | None = None,
    responses_only: bool = True,
    vocab_size: int | None = None,
    separate: bool = True,
) -> PackedDataset:
    """Tokenise documents in a seeded order and pack them into rows (see `PackedDataset`).

    The tokens are cached by content: a second call with the same documents, tokenizer, seed and
    options reads them back, whatever its context length.

    Args:
        documents: from `load_documents`.
        tokenizer: must have an EOS token, which ends each document.
        context_length: T, tokens in a row.
        seed: of the documents' order.
        max_tokens: stop after this many tokens.
        cache_dir: by default `default_cache_dir()`.
        responses_only: train only on assistant turns and completions, where there are any.
        vocab_size: the model's; where given, token ids are checked against it.
        separate: whether documents of a row are segments of their own.

    Raises:
        DataError: documents or a tokenizer that cannot be used, or too few tokens for one row.
    """
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"expected max_tokens of at least 1, got {max_tokens}; omit it for all")
    _eos(tokenizer)
    key = stream_key(documents, tokenizer, seed, max_tokens, responses_only)
    path = (cache_dir or default_cache_dir()) / "tokens" / f"{key}.safetensors"
    stream = read_stream(path)
    if stream is None:
        ordered = documents.shuffle(seed=seed, keep_in_memory=True)
        stream = tokenise_stream(ordered, tokenizer, max_tokens, responses_only)
        write_stream(path, stream)
    check_ids(int(stream.tokens.max(initial=0)), vocab_size)
    return PackedDataset(stream, context_length=context_length, separate=separate)


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows of tensors [T] into a batch of tensors [B, T]."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def tokenise_stream(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    responses_only: bool,
) -> TokenStream:
    tokens: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    starts: list[int] = []
    total = 0
    for document in encode_documents(documents, tokenizer, responses_only=responses_only):
        if not document.input_ids:
            continue
        starts.append(total)
        tokens.append(np.array(document.input_ids, dtype=np.int32))
        trained.append(np.array(document.trained, dtype=np.bool_))
        total += len(document.input_ids)
        if max_tokens is not None and total >= max_tokens:
            break
    return TokenStream(
        tokens=np.concatenate(tokens or [np.zeros(0, np.int32)])[:max_tokens],
        trained=np.concatenate(trained or [np.zeros(0, np.bool_)])[:max_tokens],
        starts=np.array(starts, dtype=np.int64),
    )


# --- evaluation -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluationWindow:
    """Consecutive tokens of one document."""

    document: int
    """Index of the document: the cluster to resample by."""
    start: int
    """Index in the document of the window's first token."""
    input_ids: Int[Tensor, "L"]
    labels: Int[Tensor, "L"]
    """The input ids, with -100 at the first token and outside responses."""


@dataclass(frozen=True, kw_only=True)
class EvaluationBatch:
    """Windows padded on the right to the longest of them."""

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    """1 at tokens, 0 at padding."""
    labels: Int[Tensor, "B L"]
    """-100 at padding too."""
    document_ids: Int[Tensor, "B"]
    window_ids: Int[Tensor, "B"]
    """Indices into the list of windows, to put results back in its order."""


def evaluation_windows(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    limit_documents: int | None = None,
    max_windows_per_document: int | None = None,
    responses_only: bool = True,
    vocab_size: int | None = None,
) -> list[EvaluationWindow]:
    """Cut each document into windows of up to `context_length` tokens that do not overlap.

    Nothing is packed, so every window belongs to one document. Windows without a label, such as
    those of a single token, are left out. No EOS is added: windows hold the documents' own tokens.

    Raises:
        DataError: documents or a tokenizer that cannot be used, or no window at all.
    """
    if context_length < 2:
        raise DataError(f"expected a context_length of at least 2, got {context_length}; raise it")
    if limit_documents is not None:
        documents = documents.select(range(min(limit_documents, len(documents))))
    windows: list[EvaluationWindow] = []
    encoded = encode_documents(documents, tokenizer, responses_only=responses_only, end_with_eos=False)
    for index, document in enumerate(encoded):
        check_ids(max(document.input_ids, default=0), vocab_size)
        starts = range(0, len(document.input_ids), context_length)[:max_windows_per_document]
        for start in starts:
            ids = torch.tensor(document.input_ids[start : start + context_length])
            labels = ids.clone()
            labels[~torch.tensor(document.trained[start : start + context_length])] = IGNORED_LABEL
            labels[0] = IGNORED_LABEL
            if bool((labels != IGNORED_LABEL).any()):
                windows.append(EvaluationWindow(document=index, start=start, input_ids=ids, labels=labels))
    if not windows:
        raise DataError(
            f"expected a document of at least 2 tokens with something to predict, got none among "
            f"{len(documents)}; give longer documents, or set responses_only=False"
        )
    return windows


def evaluation_batches(
    windows: Sequence[EvaluationWindow], *, batch_size: int, pad_token_id: int
) -> Iterator[EvaluationBatch]:
    """Yield batches of windows, the longest first: little padding, and memory runs out early.

    The order is a function of the windows alone. Any id will do as padding, since it is masked.

    Raises:
        ValueError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size}; raise it")
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].input_ids))
    pad = torch.nn.utils.rnn.pad_sequence
    for low in range(0, len(order), batch_size):
        chosen = order[low : low + batch_size]
        ids = [windows[i].input_ids for i in chosen]
        labels = [windows[i].labels for i in chosen]
        yield EvaluationBatch(
            input_ids=pad(ids, batch_first=True, padding_value=pad_token_id),
            attention_mask=pad([torch.ones_like(row) for row in ids], batch_first=True),
            labels=pad(labels, batch_first=True, padding_value=IGNORED_LABEL),
            document_ids=torch.tensor([windows[i].document for i in chosen]),
            window_ids=torch.tensor(chosen),
        )
