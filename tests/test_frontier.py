"""The tool behind docs/research/02-equal-bytes.md: what it asks, what its settings come to, how it counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from equipoise.train.recipes import load_recipe
from support import load_tool

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))  # tools import each other as scripts do
        return load_tool(name)


@pytest.fixture(scope="module")
def frontier() -> ModuleType:
    return tool("frontier")


@pytest.fixture(scope="module")
def texts() -> ModuleType:
    return tool("frontier_texts")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return tool("frontier_report")


DEMO = SimpleNamespace(layers=4, heads=4, kv_heads=4, head_dim=32, tokens=36, token_bytes=16 * 32 * 4)


def test_asked(texts: Any) -> None:
    """Values 90 and 91 after keys 50 and 51; the last showing counts, and first ones are not asked."""
    row = np.array([1, 50, 90, 2, 51, 91, 3, 50, 90, 4, 50, 91])
    assert texts.asked(row, (90, 91)) == [(8, 6), (11, 3)]


@pytest.mark.parametrize("name", ["lolcats", "hedgecats", "ssd", "zero-shot"])
def test_published_recipes_take_no_more_than_the_budget(frontier: Any, name: str) -> None:
    recipe, settings = frontier.settings_of(name, DEMO)
    run = load_recipe(recipe, settings)
    assert run.hybrid is not None
    window, features = run.hybrid.window, 32 * run.hybrid.feature_multiple
    assert window is not None
    assert window > 2
    state = 16 * (window * 2 * 32 * 2 + features * 33 * 4)
    assert 73_728 - 16 * 128 < state <= 73_728


def test_ablations_are_recipes_of_the_same_steps(frontier: Any) -> None:
    for name in tool("frontier_ablations").ABLATIONS:
        run = load_recipe(*frontier.settings_of(name, DEMO))
        assert run.transfer is not None
        assert run.finetune is not None
        assert (run.transfer.max_steps or 0) + (run.finetune.max_steps or 0) == frontier.STEPS
        assert run.allocation is None  # shared out once, before
        rates = {
                "half-rate": 2.5e-4, "twice-rate": 1e-3, "four-times-rate": 2e-3, "eight-times-rate": 4e-3,
                "sixteen-times-rate": 8e-3, "thirty-two-times-rate": 1.6e-2,
            }  # fmt: skip
        assert run.finetune.learning_rate == rates.get(name, 5e-4)
    settings = [
        load_recipe(*frontier.settings_of(name, DEMO)).hybrid
        for name in ("equipoise", "full-writes", "unit-maps")
    ]
    assert [of.write_gate for of in settings if of is not None] == ["quadratic", "none", "per_token"]
    assert [of.features(32) for of in settings if of is not None] == [128, 128, 32]


def test_windows_are_tuned_at_other_rates(frontier: Any) -> None:
    plain, twice = frontier.tuning_of("next-token-3"), frontier.tuning_of("next-token-3@2")
    assert twice == {**plain, "learning_rate": 2 * plain["learning_rate"]}
    assert plain["objectives"] == {"distillation": 1.0, "next-token": 3.0}
    own = frontier.settings_of("twice-rate", DEMO)[1]["finetune"]["learning_rate"]
    assert own == twice["learning_rate"]


@pytest.mark.parametrize("how", ["next-token-9", "next-token-3@", "tuned@twice", "tuned@0", "tuned@-1"])
def test_a_tuning_that_is_none_is_refused(frontier: Any, how: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected one of tuned, next-token, next-token-3"):
        frontier.tuning_of(how)


def test_ablations_can_be_joined(frontier: Any) -> None:
    joined = load_recipe(*frontier.settings_of("as-of-29+lookups+wider", DEMO))
    assert joined.hybrid is not None
    assert joined.finetune is not None
    assert joined.transfer is not None
    assert joined.hybrid.feature_multiple == 4
    assert joined.finetune.objectives["next-token"] == 1
    allocation = frontier.changes_of("as-of-29+lookups+wider")["allocation"]
    assert (allocation["weigh_lookups"], allocation["linear_share"]) == (True, 0.125)
    # what the recipe was has the gates it had
    assert joined.finetune.gate_learning_rate is None
    assert "hybrid-output" in joined.transfer.objectives
    assert frontier.changes_of("lookups+lolcats") is None


def test_ours_can_learn_what_windows_learn(frontier: Any) -> None:
    ours = frontier.settings_of("windows-objectives", DEMO)[1]["finetune"]
    assert ours["objectives"] == frontier.tuning_of("next-token-3")["objectives"]


def test_windows_of_ours_are_windows_without_states(frontier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "0": {
            "window": 40,
            "sinks": 1,
            "head_windows": [40, 8],
            "feature_map": "constant",
            "linear_heads": [0],
        },
        "1": {"window": 9, "sinks": 0, "linear_heads": [1]},
    }
    found = {"window": 40, "per_layer": own}
    shapes = frontier.windows_alone.__globals__
    monkeypatch.setitem(shapes, "shared_out", lambda *_, **__: found)
    config = frontier.windows_alone("own-windows", DEMO, of_old=False)
    layers = [config.for_layer(i) for i in range(2)]
    assert [layer.feature_map for layer in layers] == [None, None]
    assert [(layer.window, layer.head_windows, layer.sinks) for layer in layers] == [
        (40, (40, 8), 1),
        (9, None, 0),
    ]


def test_recall_counts_answers_in_a_span(tables: Any) -> None:
    texts = [[(10, 1), (200, 0), (300, 1)], [(200, 1)]]
    entries = [{"both": {"answers": texts}}, {"both": {"answers": texts}}]
    assert tables.recall(entries, "both", (124, 512))[0] == pytest.approx(2 / 3)
    assert tables.recall(entries, "both", (0, 124)) == (1.0, 0.0, 1.0)
    assert tables.in_words((1.0, 0.0, 1.0)) == "1.000 [0.000, 1.000]"


def test_interval_is_of_the_mean(tables: Any) -> None:
    values = np.random.default_rng(0).normal(3.0, 0.5, (1, 400)).repeat(3, 0).tolist()
    mean, low, high = tables.interval(values)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.2)


def test_against_pairs_texts_within_a_donor(frontier: Any, tmp_path: Path, capsys: Any) -> None:
    def entry(donor: str, run: str, nll: list[float], steps: int = 8) -> str:
        about = {"donor": donor, "split": "search", "tokens": 36, "run": run, "steps": steps, "seed": 0}
        return json.dumps({**about, "both": {"nll": nll}})

    place = tmp_path / "results.jsonl"
    lines = [entry("a", "rival", [1.0, 3.0]), entry("a", "ours", [1.5, 3.5]), entry("b", "ours", [0.0, 0.0])]
    lines.append(entry("a", "rival", [2.0, 4.0], steps=4))  # a worse way to run it, which does not count
    place.write_text("\n".join(lines) + "\n")
    frontier.against("rival", output=place)
    shown = capsys.readouterr().out
    assert "0.500 [0.500, 0.500]" in shown  # texts differ by 2, the runs by one half in each of them
    assert shown.count("ours") == 1  # donor b has no rival


def test_beyond_is_farther_than_any_control_reaches(tables: Any, tmp_path: Path, capsys: Any) -> None:
    about = {"donor": "a", "split": "search", "tokens": 36, "steps": 8, "seed": 0, "bytes": 1, "windows": [8]}
    answers = [[(100, 1), (300, 0), (400, 1)]]
    lines = [
        {**about, "run": run, "reach": far, "both": {"nll": [1.0], "answers": answers}}
        for run, far in (("even", 124), ("moved-heads", 320), ("ours", None))
    ]
    place = tmp_path / "results.jsonl"
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables.report(place)
    shown = capsys.readouterr().out
    assert "more than 320 tokens back" in shown
    assert shown.count("1.000 [1.000, 1.000]") == 2 * 3  # likelihood, and the one answer beyond
    tables.report(place, limit=124)
    assert "more than 124 tokens back" in capsys.readouterr().out


def test_a_step_has_2048_tokens_whatever_the_length(texts: Any) -> None:
    rows = {length: texts.Setting(length=length).rows for length in (512, 1024, 2048)}
    assert rows == {512: 4, 1024: 2, 2048: 1}


def test_docstring_files_are_halved_without_overlap(texts: Any) -> None:
    documents = [f"document {index}" for index in range(400)]
    halves = [
        {text for text in documents if (texts._digit(text, 2) == 0) == first} for first in (True, False)
    ]
    assert not halves[0] & halves[1]
    assert min(map(len, halves)) > 150


def test_longer_texts_and_more_pairs_come_later_in_a_donors_curriculum() -> None:
    donors: Any = tool("research_donors")
    for donor in donors.DONORS.values():
        reads_on = donor.curriculum[-len(donors.READING) :] == donors.READING
        first = donor.curriculum[: -len(donors.READING)] if reads_on else donor.curriculum
        lengths = [part.length for part in first]
        assert lengths == sorted(lengths)
        assert lengths[-1] == donor.curriculum[-1].length == donors.LONGEST
    grouped = donors.DONORS["docstrings"]
    assert grouped.base.heads == 2 * grouped.kv_heads
    assert grouped.base.hidden_size != donors.DONORS["source"].base.hidden_size


@dataclass
class TextsOfOneShape:
    length: int = 0
    shown_once: tuple[int, int] = (0, 0)


def test_a_donor_that_reads_on_reads_no_text_twice() -> None:
    donors: Any = tool("research_donors")
    for donor in donors.DONORS.values():
        steps = donors._Batches(TextsOfOneShape(), donor).steps
        rows = [(part.kind, part.length, first + row) for part, first in steps for row in range(part.rows)]
        assert len(set(rows)) == len(rows) == sum(part.steps * part.rows for part in donor.curriculum)


class TestFigure:
    ABOUT: dict[str, Any] = {"donor": "a", "name": "source", "split": "search", "length": 2048, "seed": 0}

    def results(self, place: Path) -> Path:
        answers = [[(100, 1), (300, 0), (900, 1)]] * 2

        def line(run: str, tokens: int, reach: int | None, nll: float, steps: int = 600) -> str:
            both = {"nll": [nll, nll + 1], "answers": answers}
            sizes = {"tokens": tokens, "bytes": 1024 * tokens, "reach": reach, "steps": steps}
            return json.dumps({**self.ABOUT, "run": run, "both": both, **sizes, "windows": [8]})

        lines = [
            line("donor", 20, None, 2.0), line("equipoise", 20, None, 2.2), line("even", 20, 100, 2.5),
            line("equipoise", 68, None, 2.1), line("moved-heads:next-token-3", 68, 500, 2.1, 300),
            line("moved-heads:next-token-3", 68, 500, 2.1), line("an-ablation", 68, None, 9.0),
        ]  # fmt: skip
        # of other weights: not drawn
        older = [{**json.loads(one), "donor": "older", "bytes": 9, "reach": 900} for one in lines]
        place.write_text("\n".join([*map(json.dumps, older), *lines]) + "\n")
        return place

    def test_budgets_of_a_run_are_one_line(self, tmp_path: Path) -> None:
        figures: Any = tool("frontier_figure")
        place = self.results(tmp_path / "results.jsonl")
        found, donor, edge = figures.points(place, "source", 2048, "search", 600)
        assert {run: [size for size, _ in of] for run, of in found.items()} == {
            "equipoise": [20 * 1024, 68 * 1024], "even": [20 * 1024], "moved-heads:next-token-3": [68 * 1024],
        }  # fmt: skip
        assert len(donor) == 1
        assert edge == 500  # of any budget: beyond is one distance in one figure
        drawn = figures.draw(found, donor, edge, 2048)
        recalled, lost = ({one.get_label(): one[0] for one in axes.containers} for axes in drawn.axes)
        assert len(recalled) == len(lost) == len(found)
        assert all([one.get_text() for one in axes.get_xticklabels()] == ["20", "68"] for axes in drawn.axes)
        np.testing.assert_allclose(np.asarray(lost["equipoise"].get_ydata(), float), [0.2, 0.1])
        np.testing.assert_allclose(
            np.asarray(recalled["equipoise"].get_ydata(), float), [1.0, 1.0]
        )  # of 900, not of 300

    def test_nothing_is_drawn_of_a_donor_without_results(self, tmp_path: Path) -> None:
        figures: Any = tool("frontier_figure")
        place = self.results(tmp_path / "results.jsonl")
        figures.main(length=2048, tuned=None, limit=None, donor=None, results=place, output=tmp_path)
        assert [path.name for path in tmp_path.glob("*.svg")] == ["frontier-source-2048.svg"]


def test_a_split_that_is_none_is_refused_before_anything_trains(frontier: Any, tmp_path: Path) -> None:
    place = tmp_path / "results.jsonl"
    arguments = ["run", "even", "--split", "search,train", "--output", str(place)]
    found = CliRunner().invoke(frontier.app, arguments)
    assert found.exit_code == 2
    assert "got 'train'" in " ".join(found.output.replace("\u2502", " ").split())
    assert not place.exists()


def test_every_split_gets_a_line(frontier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "made", lambda *_: (None, None))
    monkeypatch.setattr(frontier, "score_run", lambda name, at, seed, split, *_: {"split": split})
    monkeypatch.setattr(frontier.frontier_report, "report", lambda output: None)
    place = tmp_path / "results.jsonl"
    found = CliRunner().invoke(
        frontier.app, ["run", "even", "--split", "search,test", "--output", str(place)]
    )
    assert found.exit_code == 0
    assert [json.loads(text)["split"] for text in place.read_text().splitlines()] == ["search", "test"]


def test_even_windows_leave_states_as_wide_as_they_were(
    frontier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        0: {"window": 40, "sinks": 0, "linear_heads": [1]},
        1: {"window": 9, "sinks": 0, "feature_map": None},
    }
    found = {"window": 40, "feature_multiple": 1, "per_layer": own}
    monkeypatch.setitem(frontier.shared_out.__globals__, "searched", lambda *_: found)
    settings = frontier.settings_of("even-windows", DEMO)[1]["hybrid"]
    shared = frontier.shared_out(DEMO, settings, {}, evenly=True)
    assert shared["feature_multiple"] == 1
    hybrid = load_recipe("equipoise", {"hybrid": shared, "allocation": None}).hybrid
    assert hybrid is not None
    layer = hybrid.for_layer(0)
    assert (layer.features(32), layer.window) == (32, shared["window"])
    state = 32 * layer.value_size(32) * 4
    assert shared["window"] == (36 * DEMO.token_bytes - state) // DEMO.token_bytes - 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["donor", "test"], "trains nothing"),
        (["heavy-hitters", "test"], "trains nothing"),
        (["equipoise", "train"], "expected search or test"),
    ],
)
def test_what_cannot_be_scored_again(arguments: list[str], words: str, tmp_path: Path) -> None:
    place = tmp_path / "results.jsonl"
    found = CliRunner().invoke(
        tool("frontier").app, ["score", str(tmp_path), *arguments, "--output", str(place)]
    )
    assert found.exit_code == 2
    assert words in " ".join(found.output.replace("\u2502", " ").split())
    assert not place.exists()
