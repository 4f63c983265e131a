"""Per-document sums in `audit.json`: what merging and testing audits against one another needs later."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from equipoise.data.packing import EvaluationWindow
from equipoise.statistics import ScoreTable

_DIGITS = 6
"""Decimals of a document's summed NLL in nats; sums run to thousands, and scores to a few per token."""
_NUMBER = r"(?:-?[\d.]+(?:[eE][-+]?\d+)?|null)"
_NUMBERS = re.compile(rf"\[\s+({_NUMBER}(?:,\s+{_NUMBER})*)\s+\]")


def text_fingerprint(windows: Sequence[EvaluationWindow]) -> str:
    """SHA-256 of what is scored: token ids and labels of every window, and which document it is of.

    Two audits with the same fingerprint saw the same tokens in the same documents, cut the same way.
    """
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.document} {window.start} {len(window.input_ids)};".encode())
        for values in (window.input_ids, window.labels):
            digest.update(np.asarray(values.cpu().numpy(), dtype="<i8").tobytes())
    return digest.hexdigest()


def document_sums(table: ScoreTable) -> dict[str, Any]:
    """A run's `documents` in `audit.json`: tokens [documents], and NLL in nats [documents] of every state."""
    return {
        "tokens": [round(float(tokens)) for tokens in table.weights],
        "nll": {state: [round(-float(s), _DIGITS) for s in sums] for state, sums in table.sums.items()},
    }


def read_sums(documents: Mapping[str, Any]) -> ScoreTable:
    """The table that `document_sums` wrote.

    Raises:
        ValueError: what `ScoreTable` refuses.
    """
    return ScoreTable.from_nll(documents["nll"], documents["tokens"])


def on_one_line(text: str) -> str:
    """Indented JSON with every list of numbers on one line: hundreds of documents are hundreds of numbers.

    Strings are safe: JSON has no raw line break in them, and only such lists hold one after the bracket.
    """
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
