"""The layouts a table of documents can have, and what is wrong with records that do not fit theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, cast

from datasets import Dataset

DocumentLayout = Literal["messages", "completion", "instruction", "text"]
Record: TypeAlias = Mapping[str, Any]

LAYOUTS: Mapping[DocumentLayout, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Columns that each layout needs. Structured layouts come first: a table that carries both a chat
and its rendered text says more about which tokens are responses through the chat. `instruction`
(Alpaca) may also have an `input` column."""


class DataError(ValueError):
    """Data that cannot be used. The message says what was expected, what came, and the fix."""


def layout_of(columns: Iterable[str]) -> DocumentLayout:
    """Return the layout that a table with these columns has.

    Raises:
        DataError: no layout fits; the message lists the columns found.
    """
    found = sorted(columns)
    for layout, needed in LAYOUTS.items():
        if set(needed) <= set(found):
            return layout
    expected = "; ".join(" + ".join(needed) for needed in LAYOUTS.values())
    raise DataError(
        f"expected columns of one of these layouts: {expected}; got {found}; rename a column or "
        "name the one to read with text_column"
    )


def choose_layout(columns: Iterable[str], text_column: str | None) -> DocumentLayout:
    """The layout to read a table in: plain text where a column is named, else the one that fits."""
    if text_column is None:
        return layout_of(columns)
    if text_column not in columns:
        raise DataError(f"expected a column {text_column!r}, got {sorted(columns)}; correct text_column")
    return "text"


def project(record: Record, layout: DocumentLayout, text_column: str | None) -> Record:
    """Keep a layout's own columns; a column that the record lacks stays out."""
    if text_column is not None:
        return {"text": record[text_column]} if text_column in record else {}
    row = {name: record[name] for name in LAYOUTS[layout] if name in record}
    return {**row, "input": record.get("input") or ""} if layout == "instruction" else row


def problem_of(row: Record, layout: DocumentLayout) -> str | None:
    """Say what is wrong with a row, or None. A null is empty, not wrong; it is filtered later."""
    for name in LAYOUTS[layout]:
        if name not in row:
            return f"expected a column {name!r}, got {sorted(row)}; add it or remove the record"
    if layout == "messages":
        return _messages_problem(row["messages"])
    for name, value in row.items():
        if value is not None and not isinstance(value, str):
            return (
                f"expected text in column {name!r}, got a {type(value).__name__}; convert it to a "
                "string (conversations belong in a column 'messages')"
            )
    return None


def _messages_problem(messages: object) -> str | None:
    if messages is None:
        return None
    shape = 'a list of {"role": "…", "content": "…"}'
    if not isinstance(messages, list):
        return f"expected {shape} in 'messages', got a {type(messages).__name__}; convert it"
    for index, message in enumerate(cast("list[Any]", messages)):
        if not isinstance(message, dict):
            return f"expected {shape} in 'messages', got a {type(message).__name__} at {index}"
        fields = cast("dict[str, Any]", message)
        for key in ("role", "content"):
            if not isinstance(fields.get(key), str):
                return (
                    f"expected text as {key!r} of message {index}, got {fields.get(key)!r}; only "
                    "text conversations can be used, so convert or remove it"
                )
    return None


def is_empty(row: Record, layout: DocumentLayout) -> bool:
    """Whether a row holds nothing to learn from."""
    if layout == "messages":
        return not row["messages"]
    answer = row[LAYOUTS[layout][-1]]  # a completion may follow an empty prompt, not the reverse
    return answer is None or not answer.strip() or any(row[c] is None for c in LAYOUTS[layout])


def to_dataset(records: Iterable[Record], layout: DocumentLayout) -> Dataset:
    """Build an in-memory table of the records that are not empty."""
    kept = [dict(record) for record in records if not is_empty(record, layout)]
    try:
        if not kept:
            return Dataset.from_dict({name: [] for name in LAYOUTS[layout]})
        return Dataset.from_list(kept)
    except (ValueError, TypeError) as error:  # pyarrow's errors, and lone surrogates
        raise DataError(
            f"expected records with the same valid types, got {error}; make the columns uniform"
        ) from error
