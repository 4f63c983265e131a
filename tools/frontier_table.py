"""Markdown tables of docs/research/02, from docs/results/frontier.jsonl.

    python tools/frontier_table.py --donor source --tokens 68 --split test
    python tools/frontier_table.py --donor source --tokens 68 --run equipoise --run no-far    # in this order

*Beyond* is farther than the windows of any control reach. Text is paired with the rival's, text by text.
Machines train donors of one name and different weights: the last that has results counts, or ``--digest``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from frontier_figure import RESULTS, latest_weights
from frontier_report import Entry, How, farthest, in_words, interval, likelihoods_less, read, recall
from tables import heading, line, signed

RIVAL = "moved-heads:next-token-3"
"""The strongest control."""


def runs_of(
    results: Path, name: str, length: int, tokens: int, split: str, digest: str | None = None
) -> dict[How, list[Entry]]:
    """Runs of one donor at one budget.

    Raises:
        BadParameter: nothing was run there.
    """
    weights = digest or latest_weights(results, name, length, split)
    found: dict[How, list[Entry]] = {}
    for group, runs in read(results).items():
        if group == (name, weights, length, split, tokens):
            found = runs
    if not found:
        raise typer.BadParameter(
            f"expected results of donor {name} ({weights}), texts of {length}, split {split}, {tokens} "
            f"tokens a head, found none in {results}: run them with tools/frontier.py."
        )
    return found


def controls_reach(runs: Mapping[How, list[Entry]]) -> int:
    """Tokens that the windows of any control reach: of runs without a linear branch."""
    return farthest({how: of for how, of in runs.items() if all("linear alone" not in entry for entry in of)})


def figures(of: Sequence[Entry], rival: Sequence[Entry], edge: int, length: int) -> Iterator[str]:
    """Cells of one run."""
    yield str(len(of))
    yield f"{np.mean([entry['both']['nll'] for entry in of]):.3f}"
    if rival and of is not rival:
        apart = likelihoods_less(of, [entry["both"]["nll"] for entry in rival])
        yield signed(in_words(interval(apart)))
    else:
        yield ""
    yield f"{recall(of, 'both', (0, edge))[0]:.3f}"
    for state in ("both", "more", "linear alone"):
        asked = all(state in entry for entry in of)
        yield signed(in_words(recall(of, state, (edge, length)))) if asked else ""


def table(
    runs: Mapping[How, list[Entry]], rival: str, length: int, only: Sequence[str] = ()
) -> Iterator[str]:
    """All runs, or some in the order they are named."""
    edge = controls_reach(runs)
    against = next((of for (run, *_), of in runs.items() if run == rival), [])
    yield from heading(
        "run", "seeds", "NLL", "less the rival's", f"within {edge}", "beyond", "beyond, 40 pairs",
        "linear alone, beyond",
    )  # fmt: skip
    names = list(only) or sorted({run for run, *_ in runs})
    for name in names:
        for (run, *_), of in sorted(runs.items()):
            if run == name:
                yield line(f"`{run}`", *figures(of, against, edge, length))


def main(
    donor: Annotated[
        str, typer.Option(help="demo, source, docstrings, settled-source, settled-docstrings or large.")
    ] = "source",
    length: int = 2048,
    tokens: int = 68,
    split: str = "test",
    run: Annotated[list[str] | None, typer.Option(help="Repeat for several; else all.")] = None,
    rival: str = RIVAL,
    digest: Annotated[str | None, typer.Option(help="Of the donor's weights.")] = None,
    results: Path = RESULTS,
) -> None:
    """Print a table: means, 95% bootstrap intervals over texts and seeds."""
    for text in table(runs_of(results, donor, length, tokens, split, digest), rival, length, run or ()):
        print(text)


if __name__ == "__main__":
    typer.run(main)
