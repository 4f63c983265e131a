"""From answers to figures and pages; no model is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from equipoise.evaluate.recall_examples import Example, Item, Question
from equipoise.evaluate.recall_report import (
    Described,
    figure,
    reach_table,
    recall_page,
    summary,
    write_recall,
)
from equipoise.evaluate.recall_results import (
    Group,
    RecallRun,
    beyond_all,
    bins_of,
    gain,
    grouped,
    marked,
    recall_of,
    score_table,
)
from equipoise.evaluate.recall_running import CONTROL, Answers, Sight
from equipoise.evaluate.recall_text import RecallError
from equipoise.statistics import bootstrap, score

DISTANCES = tuple(range(10, 210, 2))
SIGHTS = {"softmax": Sight(None), "both": Sight(50), "window": Sight(50), CONTROL: Sight(120, 4, 61)}


def examples() -> list[Example]:
    """100 texts in 10 documents, an answer each, at distances 10, 12, …, 208."""
    return [
        Example(
            task="passkey" if index % 2 else "mqar", length=256, cluster=index % 10, tokens=np.arange(4),
            questions=(Question(tokens=(1,), budget=1, items=(
                Item(
                    answer=(1,), others=(), distance=distance, span=distance + 4, start=10, stop=12,
                    guess=0.01,
                ),
            )),),
        )
        for index, distance in enumerate(DISTANCES)
    ]  # fmt: skip


def answers(right: list[bool]) -> Answers:
    nothing = np.zeros(len(right))
    return Answers(np.array(right, float), nothing, nothing, 4096)


def run(seed: int = 0, *, lost: int = 0) -> RecallRun:
    """The hybrid answers everything but what lies past 160 (and `lost` more), windows what is in reach."""
    by_state = {
        "softmax": answers([True] * len(DISTANCES)),
        "both": answers([d <= 160 - lost for d in DISTANCES]),
        "window": answers([d <= 50 for d in DISTANCES]),
        CONTROL: answers([d <= 120 for d in DISTANCES]),
    }
    return RecallRun("ssd", seed, by_state, SIGHTS)


def group(*runs: RecallRun) -> Group:
    (found,) = grouped(runs or (run(),), examples())
    return found


def test_every_state_is_judged_by_its_own_reach() -> None:
    found = group()
    for state, within, beyond in (("both", 1.0, 55 / 79), ("window", 1.0, 0.0), (CONTROL, 1.0, 0.0)):
        seen = found.sights[state]
        assert recall_of(found, state, marked(found.examples, seen.within)).estimate.value == within
        assert recall_of(found, state, marked(found.examples, seen.beyond)).estimate.value == pytest.approx(
            beyond
        )
    everything = recall_of(found, "softmax", marked(found.examples, SIGHTS["softmax"].within))
    assert (everything.items, everything.estimate.value) == (100, 1.0)
    nothing = recall_of(found, "softmax", marked(found.examples, SIGHTS["softmax"].beyond))
    assert nothing.items == 0
    assert not nothing.estimate.defined


def test_what_lies_beyond_every_reach_compares_states_on_the_same_items() -> None:
    found = group()
    far = beyond_all(found)
    assert far.tolist() == [d > 120 for d in DISTANCES]
    more = gain(found, "both", CONTROL, far)
    assert more.value == pytest.approx(20 / 44)
    assert more.ci95[0] > 0


def test_scores_are_a_table_by_document() -> None:
    found = group()
    right = {state: given.right for state, given in found.runs[0].answers.items()}
    table = score_table(found.examples, right)
    assert (table.metric, table.documents) == ("recall", 10)
    assert table.weights.tolist() == [10.0] * 10
    assert score(bootstrap(table), "both").value == pytest.approx(0.76)
    per_document = [sum(d <= 160 for d in DISTANCES[i::10]) for i in range(10)]
    assert table.sums["both"].tolist() == per_document


def test_seeds_average_and_their_spread_is_kept() -> None:
    found = group(run(0), run(1, lost=40), run(2, lost=20))
    recall = recall_of(found, "both", beyond_all(found))
    assert recall.seeds == pytest.approx((20 / 44, 0, 10 / 44))
    assert recall.estimate.value == pytest.approx(10 / 44)
    assert recall.spread == pytest.approx((0, 20 / 44))
    assert recall.estimate.ci95[0] < 10 / 44 < recall.estimate.ci95[1]


def test_models_that_see_unequally_far_do_not_mix() -> None:
    other = RecallRun("ssd", 1, run().answers, {**SIGHTS, "both": Sight(60)})
    assert [len(found.runs) for found in grouped([run(), other], examples())] == [1, 1]
    with pytest.raises(RecallError, match="at least one"):
        grouped([], examples())


def test_one_document_gives_no_interval() -> None:
    found = group()
    keep = np.zeros(100, bool)
    keep[0] = True
    recall = recall_of(found, "both", keep)
    assert (recall.estimate.value, recall.estimate.defined) == (1.0, False)


def test_bins_cover_every_item_once() -> None:
    found = bins_of(examples())
    assert sum(part.keep.astype(int) for part in found).tolist() == [1] * 100
    assert all(part.low <= part.middle <= part.high for part in found)
    assert len(bins_of(examples()[:1])) == 1


def test_the_figure_draws_both_reaches() -> None:
    found = figure(group(run(0), run(1)), salt="test")
    assert found.svg.startswith("<svg")
    assert "both branches 100%" in found.description
    assert "spread of 2 seeds" in found.note


def test_the_table_gives_two_numbers_a_state() -> None:
    table = reach_table([group()])
    texts = {row[1].text: [cell.text for cell in row] for row in table.cells}
    assert texts["both branches"][2:4] == ["50", "100.0% [100.0, 100.0]"]
    assert texts["softmax (the donor)"][2] == "unlimited"
    assert texts["softmax (the donor)"][4] == "–"
    assert texts["SWA + sinks, equal bytes (window 61)"][2] == "120"


def test_the_summary_says_what_windows_cannot_do() -> None:
    text = summary(group())
    assert "44 answers" in text
    assert "both branches 45%" in text
    assert "+0.45" in text
    near = [e for e in examples() if e.questions[0].items[0].distance <= 50]
    short = Group(
        "ssd", near, [RecallRun("ssd", 0, {"both": answers([True] * len(near))}, {"both": Sight(50)})]
    )
    assert "no answer lies beyond reach" in summary(short)


def test_files(tmp_path: Path) -> None:
    groups = [group(run(0), run(1))]
    paths = write_recall(groups, Described({"tasks": ["passkey"]}, "numbers", 200), tmp_path)
    data = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert len(data["items"]) == 100
    assert data["items"][3]["distance"] == 16
    assert sum(data["runs"][1]["right"]["both"]) == 76
    state = data["groups"][0]["states"]["both"]
    assert state["reach"] == 50
    assert state["beyond_reach"]["value"] == pytest.approx(55 / 79)
    assert sum(part["items"] for part in state["curve"]) == 100
    assert data["groups"][0]["gain_beyond_every_reach"]["value"] == pytest.approx(20 / 44)
    assert "beyond every reach" in paths["md"].read_text(encoding="utf-8")
    assert "<svg" in paths["html"].read_text(encoding="utf-8")
    assert recall_page(groups, Described({}, "numbers")).title == "Recall beyond reach"
