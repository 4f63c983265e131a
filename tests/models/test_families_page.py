"""docs/families.md names exactly the families that convert, and those refused by name."""

from __future__ import annotations

import re
from pathlib import Path

from equipoise.models.families import REFUSED, SUPPORTED

TEXT = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
CONVERTS, REFUSES = TEXT.split("## Refused by name")


def first_cells(part: str) -> list[str]:
    """Code names in the first column of a part's table, in order."""
    rows = re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_the_table_of_families_is_the_codes() -> None:
    assert first_cells(CONVERTS) == list(SUPPORTED)


def test_the_table_of_refusals_is_the_codes() -> None:
    named = first_cells(REFUSES)
    assert len(named) == len(set(named))
    assert set(named) == set(REFUSED)


def test_no_family_is_both() -> None:
    assert not set(SUPPORTED) & set(REFUSED)
    assert list(SUPPORTED) == sorted(SUPPORTED)
