"""Tables of what tools/frontier.py has run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Entry = dict[str, Any]
Group = tuple[str, str, int, str, int]
"""Of what can be compared: donor and its weights, length of texts, split, budget."""
Bounds = tuple[float, float, float]
"""A mean and its interval."""
How = tuple[str, int, int]
"""Of a run: its name, steps, and tokens of the texts that were trained on."""
RESAMPLES = 2000


def read(output: Path) -> dict[Group, dict[How, list[Entry]]]:
    """Entries by what can be compared, and within that by how they were made, seeds together."""
    groups: dict[Group, dict[How, list[Entry]]] = {}
    for entry in map(json.loads, output.read_text(encoding="utf-8").splitlines()):
        kind = (
            entry.get("name", "demo"), entry["donor"], entry.get("length", 512), entry["split"],
            entry["tokens"],
        )  # fmt: skip
        how = (entry["run"], entry["steps"], entry.get("tuned", entry.get("length", 512)))
        groups.setdefault(kind, {}).setdefault(how, []).append(entry)
    return dict(sorted(groups.items()))


def farthest(runs: dict[How, list[Entry]]) -> int:
    """Tokens that the windows of any control reach: what lies beyond, no window answers."""
    reaches = [entry["reach"] for of in runs.values() for entry in of if entry["reach"]]
    return max(reaches, default=0)


def report(output: Path, limit: int | None = None) -> None:
    """Everything that was run: means over texts and seeds, 95% bootstrap intervals over both.

    Args:
        output: results.
        limit: tokens that divide answers into within and beyond; how far the controls reach where None.
    """
    console = Console(width=240)
    for (name, donor, length, split, tokens), runs in read(output).items():
        edge = farthest(runs) if limit is None else limit
        console.print(
            f"\ndonor {name} ({donor}), texts of {length}, split {split}, {tokens} tokens a head; beyond is "
            f"more than {edge} tokens back",
            highlight=False,
        )
        table = Table(box=None)
        for title in (
            "run", "steps", "tuned at", "seeds", "bytes", "windows", "sinks", "NLL", "recall within",
            "beyond", "more pairs, beyond", "window alone", "linear alone",
        ):  # fmt: skip
            table.add_column(title, no_wrap=True)
        for (run, steps, tuned), of in sorted(runs.items()):
            windows = " ".join(map(shown, of[0]["windows"])) if run != "donor" else ""
            sinks = " ".join(map(str, of[0].get("sinks", [])))
            cells = [in_words(interval([entry["both"]["nll"] for entry in of]))]
            cells += [in_words(recall(of, "both", span)) for span in ((0, edge), (edge, length))]
            cells += [
                in_words(recall(of, branch, (edge, length))) if branch in of[0] else ""
                for branch in ("more", "window alone", "linear alone")
            ]
            numbers = (str(steps), str(tuned), str(len(of)), f"{of[0]['bytes']:,}")
            table.add_row(run, *numbers, windows, sinks, *cells)
        console.print(table)


def against(output: Path, rival: str) -> None:
    """Likelihood of text, less the rival's on the same donor and texts: paired, 95% bootstrap intervals.

    Of a rival that was run in several ways (steps, lengths of text) the likeliest counts.
    """
    table = Table(
        "donor",
        "length",
        "split",
        "tokens",
        "run",
        "steps",
        "tuned at",
        "seeds",
        f"nats more than {rival}",
        box=None,
    )
    for (name, _, length, split, tokens), runs in read(output).items():
        ways = [[entry["both"]["nll"] for entry in of] for (run, *_), of in runs.items() if run == rival]
        others = min(ways, key=lambda way: float(np.mean(way)), default=[])
        for (run, steps, tuned), of in sorted(runs.items()):
            if others and run != rival:
                counts = (str(length), split, str(tokens), run, str(steps), str(tuned), str(len(of)))
                table.add_row(name, *counts, in_words(interval(likelihoods_less(of, others))))
    Console(width=160).print(table)


def likelihoods_less(of: Sequence[Entry], others: Sequence[Sequence[float]]) -> list[list[float]]:
    """Nats per token [seeds][texts], less the mean of another run's: seeds of two have nothing in common."""
    return (np.array([entry["both"]["nll"] for entry in of]) - np.array(others).mean(0)).tolist()


def shown(windows: int | list[int]) -> str:
    """A layer's window, or those of its heads."""
    return str(windows) if isinstance(windows, int) else "/".join(map(str, windows))


def in_words(values: Bounds) -> str:
    """A mean and its interval."""
    mean, low, high = values
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def interval(values: Sequence[Sequence[float]]) -> Bounds:
    """Mean of [seeds][texts], and its 95% bootstrap interval over both."""
    whole = np.array(values)
    generator = np.random.default_rng(0)
    draws = [
        whole[generator.integers(0, len(whole), len(whole))][
            :, generator.integers(0, whole.shape[1], whole.shape[1])
        ].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(whole.mean()), float(low), float(high)


def recall(entries: Sequence[Entry], state: str, span: tuple[int, int]) -> Bounds:
    """Share of answers that are right at these distances, and its interval over texts and seeds."""
    counts = np.array(
        [
            [
                [
                    sum(right for far, right in text if span[0] < far <= span[1]),
                    sum(span[0] < far <= span[1] for far, _ in text),
                ]
                for text in entry[state]["answers"]
            ]
            for entry in entries
        ],
        dtype=np.float64,
    )  # [seeds, texts, (right, asked)]
    generator = np.random.default_rng(0)
    draws: list[float] = []
    for _ in range(RESAMPLES):
        seeds, texts = (generator.integers(0, n, n) for n in counts.shape[:2])
        right, all_ = counts[seeds][:, texts].sum((0, 1))
        draws.append(float(right / max(1, all_)))
    right, all_ = counts.sum((0, 1))
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(right / max(1, all_)), float(low), float(high)
