"""What several tests of audits share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise.audit.compare import AuditFile, read_audit
from equipoise.audit.report import (
    to_json,
)
from equipoise.statistics import ScoreTable
from planted_audits import report


@pytest.fixture
def audited(tmp_path: Path) -> Callable[..., AuditFile]:
    """An audit that was written to disk and read again."""

    def write(table: ScoreTable, recipe: str, seed: int = 0, **metric: Any) -> AuditFile:
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        place.write_text(to_json(report(table, recipe, seed, **metric)), encoding="utf-8")
        return read_audit(place)

    return write
