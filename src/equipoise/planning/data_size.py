"""How many tokens a source of text has, without reading a data set of the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from equipoise.config import DataConfig
from equipoise.data.sources import load_documents
from equipoise.models.load import load_tokenizer
from equipoise.models.storage import CheckpointError

CHARACTERS = 4.0
"""Of a token, where no tokenizer is at hand to count with."""
SAMPLE = 200
"""Documents to count with one."""


@dataclass(frozen=True)
class DataSize:
    """Tokens to train on.

    Attributes:
        tokens: about how many; None where that cannot be known before the data is read.
        source: where the figure comes from, in words.
    """

    tokens: int | None
    source: str


def data_size(data: DataConfig, donor: str, *, local: bool) -> DataSize:
    """Estimate the tokens of a run's training split.

    Args:
        data: of the recipe.
        donor: whose tokenizer to count with, if it is a local directory that has one.
        local: whether the source lies on this machine.

    Raises:
        DataError: a local source that cannot be used.
    """
    if data.streaming and data.max_tokens is not None:  # the data begins again where it ends
        return DataSize(data.max_tokens, "data.max_tokens")
    found = _local_size(data, donor) if local else _hub_size(data)
    if data.max_tokens is None:
        return found
    if found.tokens is None or found.tokens > data.max_tokens:
        return DataSize(data.max_tokens, "data.max_tokens")
    return found


def _local_size(data: DataConfig, donor: str) -> DataSize:
    documents = load_documents(data.source, text_column=data.text_column)
    lengths = [_characters(row) for row in documents]
    total, sample = sum(lengths), documents.select(range(min(SAMPLE, len(documents))))
    try:
        tokenizer: Any = load_tokenizer(donor)
    except CheckpointError:
        return DataSize(round(total / CHARACTERS), f"{total:,} characters at {CHARACTERS:g} a token")
    texts = [" ".join(_texts(row)) for row in sample]
    counted = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
    each = sum(lengths[: len(texts)]) / max(1, counted)
    return DataSize(round(total / each), f"{total:,} characters at {each:.2f} a token, counted on a sample")


def _hub_size(data: DataConfig) -> DataSize:
    from datasets import load_dataset_builder

    try:
        splits: Any = load_dataset_builder(data.source, data.subset).info.splits
        size = int(splits["train"].num_bytes)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # not reachable, no such split, or its sizes were never written down
        return DataSize(None, "not known before the data set is read; give --max-steps or data.max_tokens")
    return DataSize(round(size / CHARACTERS), f"{size:,} bytes on the Hub at {CHARACTERS:g} a token")


def _texts(row: Any) -> list[str]:
    """All strings of a document, whatever its layout."""
    if isinstance(row, str):
        return [row]
    parts = row.values() if isinstance(row, dict) else row if isinstance(row, list) else ()
    return [text for part in parts for text in _texts(part)]


def _characters(row: Any) -> int:
    return sum(map(len, _texts(row)))
