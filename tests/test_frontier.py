"""The tool behind docs/research/02-equal-bytes.md: what it asks, what its settings come to, how it counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from equipoise.train.recipes import load_recipe
from support import load_tool


@pytest.fixture(scope="module")
def frontier() -> ModuleType:
    return load_tool("frontier")


def test_asked(frontier: Any) -> None:
    """Values 90 and 91 after keys 50 and 51; the last showing counts, and first ones are not asked."""
    row = np.array([1, 50, 90, 2, 51, 91, 3, 50, 90, 4, 50, 91])
    assert frontier.asked(row, (90, 91)) == [(8, 6), (11, 3)]


@pytest.mark.parametrize("name", ["lolcats", "hedgecats", "ssd", "zero-shot"])
def test_published_recipes_take_no_more_than_the_budget(frontier: Any, name: str) -> None:
    recipe, settings = frontier.settings_of(name, 73_728)
    run = load_recipe(recipe, settings)
    assert run.hybrid is not None
    window, features = run.hybrid.window, 32 * run.hybrid.feature_multiple
    assert window is not None
    assert window > 2
    state = 16 * (window * 2 * 32 * 2 + features * 33 * 4)
    assert 73_728 - 16 * 128 < state <= 73_728


def test_ablations_are_recipes_of_the_same_steps(frontier: Any) -> None:
    for name in frontier.ABLATIONS:
        run = load_recipe(*frontier.settings_of(name, 73_728))
        assert run.transfer is not None
        assert run.finetune is not None
        assert (run.transfer.max_steps or 0) + (run.finetune.max_steps or 0) == frontier.STEPS
        assert run.allocation is None  # shared out once, before
        assert run.finetune.learning_rate == 5e-4
    plain, other = (load_recipe(*frontier.settings_of(name, 1)) for name in ("equipoise", "full-writes"))
    assert plain.hybrid is not None
    assert other.hybrid is not None
    assert (plain.hybrid.write_gate, other.hybrid.write_gate) == ("per_token", "none")


def test_recall_counts_answers_in_a_span(frontier: Any) -> None:
    texts = [[(10, 1), (200, 0), (300, 1)], [(200, 1)]]
    entries = [{"both": {"answers": texts}}, {"both": {"answers": texts}}]
    assert frontier.recall(entries, "both", (124, 512)).startswith("0.667 [")
    assert frontier.recall(entries, "both", (0, 124)) == "1.000 [0.000, 1.000]"


def test_interval_is_of_the_mean(frontier: Any) -> None:
    values = np.random.default_rng(0).normal(3.0, 0.5, (1, 400)).repeat(3, 0).tolist()
    mean, low, high = (float(part.strip("[],")) for part in frontier.interval(values).split())
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.2)


def test_against_pairs_texts_within_a_donor(frontier: Any, tmp_path: Path, capsys: Any) -> None:
    def entry(donor: str, run: str, nll: list[float]) -> str:
        about = {"donor": donor, "split": "search", "tokens": 36, "run": run, "steps": 8, "seed": 0}
        return json.dumps({**about, "both": {"nll": nll}})

    place = tmp_path / "results.jsonl"
    lines = [entry("a", "rival", [1.0, 3.0]), entry("a", "ours", [1.5, 3.5]), entry("b", "ours", [0.0, 0.0])]
    place.write_text("\n".join(lines) + "\n")
    frontier.against("rival", output=place)
    shown = capsys.readouterr().out
    assert "0.500 [0.500, 0.500]" in shown  # texts differ by 2, the runs by one half in each of them
    assert shown.count("ours") == 1  # donor b has no rival
