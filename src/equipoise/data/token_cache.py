"""The tokens of many documents, kept on disk by what they were made from.

Files are safetensors: nothing in them can execute, and a checksum tells a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from equipoise.files import write_atomically

_LOG = logging.getLogger(__name__)
_CACHE_VERSION = 1  # raise it when tokens, packing order or the file's form change


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """The tokens of many documents, one after the other."""

    tokens: NDArray[np.int32]
    """[N] token ids."""
    trained: NDArray[np.bool_]
    """[N] whether the loss counts the token."""
    starts: NDArray[np.int64]
    """Index of each document's first token, ascending from 0."""


def default_cache_dir() -> Path:
    """`$EQUIPOISE_CACHE`, or `~/.cache/equipoise`."""
    configured = os.environ.get("EQUIPOISE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "equipoise"


def stream_key(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    max_tokens: int | None,
    responses_only: bool,
) -> str:
    # Not Dataset._fingerprint: it is private, and differs between equal tables built in memory.
    digest = hashlib.blake2b(digest_size=20)
    options = (_CACHE_VERSION, seed, max_tokens, responses_only, documents.column_names)
    digest.update(json.dumps(options).encode())
    digest.update(_serialised(tokenizer).encode())
    for batch in documents.iter(batch_size=1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def _serialised(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe all of a tokenizer that its tokens depend on."""
    backend: Any = None
    if tokenizer.is_fast:
        backend = json.loads(cast("Any", tokenizer).backend_tokenizer.to_str())
        # Set by whoever called it last; our calls neither truncate nor pad.
        backend.pop("truncation", None)
        backend.pop("padding", None)
    described = {
        "class": type(tokenizer).__name__,
        "backend": backend if backend is not None else tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "init": {name: str(value) for name, value in tokenizer.init_kwargs.items()},
        "chat_template": tokenizer.chat_template,
    }
    return json.dumps(described, sort_keys=True)


def _checksum(arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def read_stream(path: Path) -> TokenStream | None:
    """Read a cached stream; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in ("tokens", "trained", "starts")}
            recorded = (file.metadata() or {}).get("checksum")
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        _LOG.warning("rebuilding the token cache %s, which cannot be read: %s", path, error)
        return None
    if recorded != _checksum(arrays):
        _LOG.warning("rebuilding the token cache %s, whose checksum does not match", path)
        return None
    return TokenStream(**arrays)


def write_stream(path: Path, stream: TokenStream) -> None:
    """Write a stream in one step: readers and other writers see all of it or nothing."""
    arrays = {"tokens": stream.tokens, "trained": stream.trained, "starts": stream.starts}
    metadata = {"checksum": _checksum(arrays)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda p: save_file(arrays, p, metadata=metadata))
    except (OSError, SafetensorError) as error:  # a cache is a convenience: a full disk is no end
        _LOG.warning("tokens are not cached: cannot write %s: %s", path, error)
