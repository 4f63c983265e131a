"""What the tools behind docs/research have in common: JSON, Markdown tables, intervals over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from equipoise.files import write_text

STUDENT = 4.303
"""Student's t at 2 degrees of freedom: three seeds."""


def over_seeds(values: NDArray[np.float64], digits: int = 3) -> str:
    """Mean and Student's t interval of three seeds."""
    middle, half = values.mean(), STUDENT * values.std(ddof=1) / len(values) ** 0.5
    return signed(f"{middle:.{digits}f} [{middle - half:.{digits}f}, {middle + half:.{digits}f}]")


def signed(text: str) -> str:
    """With a proper minus."""
    return text.replace("-", "−")


def line(*cells: str) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def heading(*cells: str) -> list[str]:
    """A table's head, numbers to the right."""
    return [line(*cells), "|---" + "|---:" * (len(cells) - 1) + "|"]


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row a line, five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(part) for part in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    lines = [json.dumps({key: short(value) for key, value in row.items()}) for row in rows]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def measure_or_print(
    measure: Callable[[Path, Console], None], tables: Callable[[list[dict[str, Any]]], Iterable[str]]
) -> None:
    """The command line of a tool that runs what its file lacks, and prints the tables of what is in there."""

    def main(
        output: Path,
        tables_only: Annotated[bool, typer.Option("--tables", help="Print, run nothing.")] = False,
    ) -> None:
        """Measure, or print what was measured."""
        if not tables_only:
            measure(output, Console(stderr=True))
        for text in tables(json.loads(output.read_text(encoding="utf-8"))):
            print(text)

    typer.run(main)
