"""Draw the frontier: recall beyond reach, and text, against bytes of state, from docs/results/frontier.jsonl.

    python tools/frontier_figure.py --length 2048       # docs/figures/frontier-source-2048.svg, -docstrings-

One figure a donor. *Beyond* is one distance for all budgets: how far the windows of any control reach at any
of them, or ``--limit``. Text is what a run loses to the donor, paired by text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipoise.pages.plotting import DONOR_COLOUR, FONT, INK, SERIES, as_svg, style
from frontier_report import Bounds, Entry, farthest, interval, read, recall

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, FIGURES = DOCS / "results" / "frontier.jsonl", DOCS / "figures"
RUNS = {
    "equipoise": "equipoise", "moved-heads:next-token-3": "windows by head, tuned",
    "even:next-token-3": "windows, tuned", "heavy-hitters": "heavy hitters", "lolcats": "LoLCATs",
    "hedgecats": "HedgeCATs", "ssd": "SSD", "even": "windows",
}  # fmt: skip
"""What is drawn, in the order of the legend."""
Points = dict[str, list[tuple[int, list[Entry]]]]
"""Of each run: bytes and its seeds, by budget."""

app = typer.Typer(add_completion=False)


def points(
    results: Path, name: str, length: int, split: str, steps: int, tuned: int | None = None
) -> tuple[Points, list[Entry], int]:
    """Runs of one donor's budgets, the donor's own entries, and how far any control reaches.

    Machines train donors of one name and different weights: the last one that has results is drawn.
    A run of any other number of steps than ``steps``, or trained on texts of another length than ``tuned``
    (None: ``length``), is left out, unless nothing of it is trained.
    """
    found: Points = {}
    donor, edge = list[Entry](), 0
    latest = latest_weights(results, name, length, split)
    for (of, weights, tokens_long, part, _), runs in read(results).items():
        if (of, weights, tokens_long, part) != (name, latest, length, split):
            continue
        edge = max(edge, farthest(runs))
        for (run, *how), entries in runs.items():
            untuned = run in ("donor", "even", "heavy-hitters")
            if run == "donor":
                donor = entries
            elif run in RUNS and (untuned or how == [steps, tuned or length]):
                found.setdefault(run, []).append((int(entries[0]["bytes"]), entries))
    for of_run in found.values():
        of_run.sort(key=lambda point: point[0])
    return found, donor, edge


def latest_weights(results: Path, name: str, length: int, split: str) -> str | None:
    """Digest of the weights that the last entry is of."""
    entries = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    digests = [
        entry["donor"]
        for entry in entries
        if (entry.get("name", "demo"), entry.get("length", 512), entry["split"]) == (name, length, split)
    ]
    return digests[-1] if digests else None


def draw(found: Points, donor: Sequence[Entry], edge: int, length: int) -> Figure:
    """Two panels over bytes."""
    figure = Figure(figsize=(9.0, 3.8), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    taught = np.array([entry["both"]["nll"] for entry in donor]).mean(0)
    for index, (run, label) in enumerate(RUNS.items()):
        if run in found:
            at = [bytes_ / 1024 for bytes_, _ in found[run]]
            recalls = [recall(of, "both", (edge, length)) for _, of in found[run]]
            losses = [
                interval((np.array([entry["both"]["nll"] for entry in of]) - taught).tolist())
                for _, of in found[run]
            ]
            _series(left, at, recalls, label, SERIES[index])
            _series(right, at, losses, label, SERIES[index])
    left.axhline(recall(donor, "both", (edge, length))[0], color=DONOR_COLOUR, linestyle="--", linewidth=1)
    right.axhline(0, color=DONOR_COLOUR, linestyle="--", linewidth=1)
    left.set_ylabel(f"recall from more than {edge} tokens back", fontsize=FONT, color=INK)
    right.set_ylabel("text: nats per token more than the donor", fontsize=FONT, color=INK)
    left.set_ylim(-0.03, 1.03)
    sizes = sorted({round(bytes_ / 1024) for of in found.values() for bytes_, _ in of})
    for axes in (left, right):
        style(axes)
        axes.set_xscale("log", base=2)
        # runs of one budget differ by a few bytes, which would fill the axis where there is no other
        axes.set_xlim(sizes[0] / 1.5, 1.5 * sizes[-1])
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("KiB of state a sequence", fontsize=FONT, color=INK)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=FONT - 1.5, frameon=False)
    return figure


def _series(axes: Axes, at: list[float], values: list[Bounds], label: str, colour: str) -> None:
    means = [mean for mean, _, _ in values]
    spread = [[mean - low for mean, low, _ in values], [high - mean for mean, _, high in values]]
    axes.errorbar(
        at, means, yerr=spread, label=label, color=colour, marker="o", markersize=4, linewidth=1.4, capsize=2
    )


@app.command()
def main(
    length: int = 2048,
    split: str = "search",
    steps: int = 600,
    tuned: Annotated[int | None, typer.Option(help="Tokens of the texts that were trained on.")] = None,
    limit: Annotated[int | None, typer.Option(help="Tokens beyond which answers count.")] = None,
    donor: Annotated[list[str] | None, typer.Option(help="Repeat for several; else both.")] = None,
    results: Path = RESULTS,
    output: Path = FIGURES,
) -> None:
    """Draw a figure for each donor that has results."""
    for name in donor or ["source", "docstrings"]:
        found, own, edge = points(results, name, length, split, steps, tuned)
        if not found or not own:
            continue
        figure = draw(found, own, edge if limit is None else limit, length)
        path = output / f"frontier-{name}-{length}.svg"
        path.write_text(as_svg(figure, salt=path.stem) + "\n", encoding="utf-8", newline="\n")
        typer.echo(path)


if __name__ == "__main__":
    app()
