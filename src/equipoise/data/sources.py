"""Where documents come from: the standard library's own sources, local files, or a Hub data set.

Whatever the source, the result is a `datasets.Dataset` in one of four layouts (`LAYOUTS`), which
`equipoise.data.encoding` turns into tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset

from equipoise.data.layouts import (
    LAYOUTS,
    DataError,
    DocumentLayout,
    Record,
    choose_layout,
    is_empty,
    problem_of,
    project,
    to_dataset,
)
from equipoise.secrets import has_secret

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".text", ".py"})
JSON_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
PARQUET_SUFFIXES = frozenset({".parquet"})
HELD_OUT_ONE_IN = 20

_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "idlelib"}
    | {"pydoc_data", "encodings", "ensurepip"}
)
_STDLIB_ORDER_SEED = 0


def load_documents(
    source: str,
    *,
    split: str = "train",
    text_column: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
    held_out: bool = True,
) -> Dataset:
    """Load the documents of one split, without empty ones, in an order that is always the same.

    Args:
        source: `"stdlib"`, the path of a local file or directory, a pattern of paths
            (`shards/*.parquet`), or the name of a Hub data set. A text file is one document;
            `.jsonl`, `.json` and `.parquet` files hold one per record.
        split: `"train"` or `"validation"`. A Hub data set's own split names, and slices such as
            `"train[:1%]"`, work too.
        text_column: the column to read as text; by default the layout is recognised.
        subset: a Hub data set's configuration name.
        limit: keep at most this many documents.
        held_out: a source without a validation split holds out about 5% of its documents by a
            hash of their content: `"train"` then omits what `"validation"` returns. False uses
            every document for either split, for callers who have a separate validation file.

    Raises:
        DataError: the source is missing, unreadable, malformed or has no usable document.
    """
    if has_secret(source):
        raise DataError(
            "expected a source without a user, password or token in its address, since reports carry it on; "
            "give the token as HF_TOKEN, or log in with `hf auth login`"
        )
    if limit is not None and limit < 1:
        raise DataError(f"expected a document limit of at least 1, got {limit}; omit it for all")
    if source == "stdlib":
        documents = to_dataset(stdlib_records(split), layout="text")
    elif is_local(source):
        documents = _load_local(source, text_column)
        documents = _held_out_split(documents, split, source) if held_out else documents
    else:
        documents = _load_hub(source, split, text_column, subset, held_out)
    if len(documents) == 0:
        raise DataError(
            f"expected at least one document with text in split {split!r} of {source!r}, got none; "
            "check that the text column is the right one and is not empty"
        )
    return documents if limit is None else documents.select(range(min(limit, len(documents))))


# --- the standard library -------------------------------------------------------------------


def stdlib_files(split: str = "train") -> list[tuple[str, Path]]:
    """Return (relative path, path) of the standard library's sources in one split, shuffled.

    About one file in 20 is in `"validation"`, by a hash of its relative path, so that the same file
    is held out whatever the machine. Tests, codecs tables and bundled tools are left out.

    Raises:
        DataError: the split is neither `"train"` nor `"validation"`.
    """
    _check_split(split, "stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    files: list[tuple[str, Path]] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in _STDLIB_SKIPPED or part.startswith("config-3") for part in relative.parts):
            continue
        digest = hashlib.md5(relative.as_posix().encode(), usedforsecurity=False).hexdigest()
        if (int(digest, 16) % HELD_OUT_ONE_IN == 0) == (split == "validation"):
            files.append((relative.as_posix(), path))
    random.Random(_STDLIB_ORDER_SEED).shuffle(files)
    return files


def stdlib_records(split: str) -> Iterator[Record]:
    for _, path in stdlib_files(split):
        try:
            yield {"text": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError):
            continue  # a few sources declare another encoding on purpose; they are not a user's


# --- local files ----------------------------------------------------------------------------


def absolute_source(source: str) -> str:
    """The name of a source from any working directory: local paths resolved, all others as they are."""
    is_path = source != "stdlib" and is_local(source)
    return str(Path(source).expanduser().resolve()) if is_path else source


def overlaps(source: str, other: str) -> bool:
    """Whether two sources share documents, by name: the same one, or a file or folder in the other."""
    one, two = absolute_source(source), absolute_source(other)
    if one == two:
        return True
    if "stdlib" in (source, other) or not (is_local(source) and is_local(other)):
        return False
    if _is_pattern(one) or _is_pattern(two):
        found = [{path.resolve() for path in _matches(name) if path.is_file()} for name in (one, two)]
        return bool(found[0] & found[1])
    return Path(one) in Path(two).parents or Path(two) in Path(one).parents


def is_local(source: str) -> bool:
    """Whether a source is meant as a path: it exists, or no Hub name could look like it."""
    path = Path(source).expanduser()
    looks_like_path = (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or _is_pattern(source)
        or path.suffix.lower() in TEXT_SUFFIXES | JSON_SUFFIXES | PARQUET_SUFFIXES
    )
    return looks_like_path or path.exists()


def _is_pattern(source: str) -> bool:
    return any(sign in source for sign in "*?[")


def _matches(source: str) -> list[Path]:
    """The path itself where it exists, what is below it where it is a folder, or what the pattern finds."""
    path = Path(source).expanduser()
    if path.is_dir():
        return [found for found in sorted(path.rglob("*")) if not _is_hidden(found.relative_to(path))]
    if path.exists() or not _is_pattern(source):
        return [path]
    return [Path(name) for name in sorted(glob(str(path), recursive=True))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _load_local(source: str, text_column: str | None) -> Dataset:
    located = [item for file in local_files(source) for item in _read_file(file)]
    columns = {name for _, record in located for name in record}
    layout = choose_layout(columns, text_column)
    records: list[Record] = []
    for where, record in located:
        row = project(record, layout, text_column)
        problem = problem_of(row, layout)
        if problem is not None:
            raise DataError(f"{where}: {problem}")
        records.append(row)
    return to_dataset(records, layout)


def local_files(source: str) -> list[Path]:
    """The files that a path, a folder or a pattern stands for, in the order of their names.

    Raises:
        DataError: there is none that could be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise DataError(f"expected text in {str(path)!r}, got an empty file; give another file")
        return [path]
    if not path.exists() and not _is_pattern(source):
        raise DataError(
            f"expected a file or directory at {str(path)!r}, got none; check the path (it is "
            f"relative to {str(Path.cwd())!r}), or give 'stdlib' or the name of a Hub data set"
        )
    wanted = TEXT_SUFFIXES | JSON_SUFFIXES | PARQUET_SUFFIXES
    files = [
        file
        for file in _matches(source)
        if file.is_file() and file.suffix.lower() in wanted and file.stat().st_size > 0
    ]
    if not files:
        raise DataError(
            f"expected non-empty files ending in {sorted(wanted)} under {str(path)!r}, got none; "
            "add such files or give the path of one file"
        )
    return files


def _read_file(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield (where it stands, record) for each record of a file; a text file is one record."""
    if path.suffix.lower() in PARQUET_SUFFIXES:
        yield from _read_parquet(path)
        return
    text = _read_text(path)
    if path.suffix.lower() not in JSON_SUFFIXES:
        yield str(path), {"text": text}
        return
    if path.suffix.lower() == ".json":
        try:
            whole: Any = json.loads(text)
        except json.JSONDecodeError:
            whole = None  # many .json files are JSON lines; the line reader names a broken line
        if isinstance(whole, list):
            for index, item in enumerate(cast("list[Any]", whole)):
                yield _as_record(f"{path}, record {index}", item)
            return
    yield from _read_json_lines(path, text)


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        records: list[Record] = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(
            f"expected a Parquet file at {str(path)!r}, got one that cannot be read ({error}); it may be "
            "cut short: fetch it again"
        ) from error
    for index, record in enumerate(records):
        yield f"{path}, record {index}", record


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[str, Record]]:
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends here.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"expected one JSON object per line in {str(path)!r} (or, in a .json file, one "
                f"list), got a line {number} that does not parse ({error}); fix or delete that line"
            ) from error
        yield _as_record(f"{path}, line {number}", item)


def _as_record(where: str, item: object) -> tuple[str, Record]:
    if not isinstance(item, dict):
        raise DataError(
            f'{where}: expected a JSON object such as {{"text": "…"}}, got a '
            f"{type(item).__name__}; wrap the value in an object"
        )
    return where, cast("Record", item)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"expected a readable file, got {error}; check its permissions") from error
    hint = "convert it to UTF-8 text or JSON lines"
    if b"\x00" in raw:
        raise DataError(f"expected UTF-8 text in {str(path)!r}, got binary data (NUL bytes); {hint}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"expected UTF-8 text in {str(path)!r}, got bytes that are not ({error}); {hint}"
        ) from error
    return text.replace("\r\n", "\n")


# --- the Hub --------------------------------------------------------------------------------


def _load_hub(name: str, split: str, text_column: str | None, subset: str | None, held_out: bool) -> Dataset:
    try:
        found = datasets.load_dataset(name, subset)
        without_validation = held_out and "train" in found and "validation" not in found
        divide = without_validation and split in ("train", "validation")
        if divide or split in found:
            documents = found["train" if divide else split]
        elif "[" in split or "+" in split:  # a slice or a sum of splits
            documents = datasets.load_dataset(name, subset, split=split)
        else:
            raise ValueError(f"no split {split!r} among {sorted(map(str, found))}")
    except (OSError, ValueError, TypeError) as error:
        # OSError covers no network, offline mode and an unknown name; ValueError a wrong split.
        raise DataError(
            f"expected a Hub data set, got {type(error).__name__} on load_dataset({name!r}, "
            f"{subset!r}) for split {split!r}: {error}; check the name, subset and split and the "
            "network, or give a local path or 'stdlib', which need no network"
        ) from error
    layout = choose_layout(documents.column_names, text_column)
    documents = _project_table(documents, layout, text_column)
    documents = documents.filter(_keep, fn_kwargs={"layout": layout, "name": name})
    return _held_out_split(documents, split, name) if divide else documents


def _project_table(documents: Dataset, layout: DocumentLayout, text_column: str | None) -> Dataset:
    if text_column is not None:
        documents = documents.select_columns([text_column])
        return documents if text_column == "text" else documents.rename_column(text_column, "text")
    optional = [c for c in ("input",) if layout == "instruction" and c in documents.column_names]
    return documents.select_columns([*LAYOUTS[layout], *optional])


def _keep(row: Record, layout: DocumentLayout, name: str) -> bool:
    problem = problem_of(row, layout)
    if problem is not None:
        raise DataError(f"{name}: {problem}")
    return not is_empty(row, layout)


def _check_split(split: str, source: str) -> None:
    if split not in ("train", "validation"):
        raise DataError(
            f"expected split 'train' or 'validation' of {source!r}, got {split!r}; use one of them"
        )


def _held_out_split(documents: Dataset, split: str, source: str) -> Dataset:
    """Return one side of a split by content: equal documents always fall on the same side."""
    _check_split(split, source)
    hashes = [content_hash(row) for row in cast("Iterable[Record]", documents)]
    distinct = set(hashes)
    validation = {h for h in distinct if h % HELD_OUT_ONE_IN == 0}
    if distinct and (not validation or validation == distinct):
        validation = {min(distinct)}  # few documents: neither side may end up empty
    if len(distinct) == 1:
        if split == "validation":
            raise DataError(
                f"expected at least 2 different documents in {source!r} to hold some out, got 1; "
                "give a separate validation file, or more documents"
            )
        validation = set()
    wanted = split == "validation"
    return documents.select([i for i, h in enumerate(hashes) if (h in validation) == wanted])


def content_hash(row: Record) -> int:
    """A number of a document's content, the same on any machine; 0 modulo `HELD_OUT_ONE_IN` is held out."""
    return int(hashlib.md5(json.dumps(row, sort_keys=True).encode(), usedforsecurity=False).hexdigest(), 16)
