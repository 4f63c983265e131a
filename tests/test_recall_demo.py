"""The recall demo: what it trains on and asks, and once in small for its plumbing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from equipoise.data.sources import load_documents
from equipoise.evaluate.recall_text import Haystack
from equipoise.recall_demo import (
    BATCH,
    BUDGET_WINDOW,
    RECIPES,
    REFERENCE,
    _as_measured,
    _own_overrides,
    recall_recipe,
    run_recall_demo,
)
from equipoise.recall_donor import (
    CONTEXT,
    PairText,
    RecallDonorSettings,
    add_words,
    held_out,
    loss_weights,
    not_held_out,
)
from equipoise.train.outputs import OutputError


@pytest.fixture(scope="module")
def texts() -> PairText:
    from equipoise.demo_donor import train_tokenizer

    lines = [
        " ".join(f"{verb} the {noun}" for noun in ("cat", "dog", "hen")) for verb in ("feed", "call", "see")
    ]
    source = ["\n".join(lines * 40) for _ in range(8)]
    tokenizer = train_tokenizer(source, 300)
    keys, values = add_words(tokenizer)
    return PairText(tokenizer, Haystack.of(source, tokenizer, len(tokenizer)), keys, values, seed=0)


def test_every_trained_recipe_sees_the_same_tokens_at_the_same_rates(tmp_path: Path) -> None:
    runs = [recall_recipe(name, tmp_path, 40) for name in RECIPES]
    for run in runs:
        stages = [stage for stage in (run.transfer, run.finetune) if stage is not None]
        assert sum((stage.max_steps or 0) * stage.batch_size for stage in stages) == 40 * BATCH
        assert run.hybrid is not None
        assert run.hybrid.window == (16 if run.allocation is None else BUDGET_WINDOW)
        assert run.data.context_length == CONTEXT
        assert Path(run.data.source).parent == tmp_path
    assert len({run.transfer.learning_rate for run in runs if run.transfer}) == 1
    assert len({run.finetune.learning_rate for run in runs if run.finetune}) == 1
    assert recall_recipe(REFERENCE, tmp_path).transfer is None


def test_later_seeds_have_the_windows_that_the_first_one_measured(tmp_path: Path) -> None:
    run = recall_recipe("equipoise", tmp_path, 40)
    assert run.hybrid is not None
    own = {0: {"window": 9, "head_windows": [9, 3], "linear_heads": [0]}}
    measured = run.hybrid.model_copy(update={"window": 9, "per_layer": own})
    described = {"equipoise": {"hybrid": measured.model_dump(mode="json")}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    later = _as_measured(run, tmp_path)
    assert (later.allocation, later.hybrid) == (None, measured)
    assert later.finetune == run.finetune
    other = recall_recipe("ssd", tmp_path, 40)
    assert _as_measured(other, tmp_path) is other


def test_what_is_not_the_same_for_every_recipe_is_said(tmp_path: Path) -> None:
    own = _own_overrides(tmp_path, 40)
    assert set(own) == {"equipoise"}
    assert own["equipoise"]["hybrid"] == {"window": BUDGET_WINDOW}
    assert set(own["equipoise"]) == {"hybrid", "transfer", "finetune"}  # the stages by their steps alone


def test_texts_have_their_pairs_twice_and_none_that_is_kept_for_the_questions(texts: PairText) -> None:
    at = texts.tokenizer("\n@", add_special_tokens=False).input_ids
    twice = 0
    for index in range(20):
        row = texts.pairs(index).tolist()
        assert len(row) == CONTEXT
        spots = [i for i in range(len(row) - 4) if row[i : i + len(at)] == at]
        found = [tuple(row[i + len(at) : i + len(at) + 2]) for i in spots]
        assert len(set(found)) * 2 <= len(found)
        twice += len(set(found)) * 2 == len(found)
        for key, answer in found:
            assert not_held_out((key,), (answer,))
            assert not held_out((key,), (answer,))
    assert 4 <= twice <= 16


def test_only_what_was_shown_before_counts_as_an_answer(texts: PairText) -> None:
    (red, blue), (one, two) = texts.keys[:2], texts.words[:2]
    row = np.array([5, red, one, 6, blue, two, 7, red, one, 8, blue, two, red, one, 9])
    weights = loss_weights(row, texts.words, 0.5)
    assert weights[[2, 5]].tolist() == [0, 0]
    np.testing.assert_allclose(weights[[8, 11, 13]], 0.5 / 3)
    np.testing.assert_allclose(np.delete(weights, [2, 5, 8, 11, 13]), 1 / 10)
    np.testing.assert_allclose(loss_weights(np.arange(8), texts.words, 0.5), 1 / 8)
    assert add_words(texts.tokenizer) == (texts.keys, texts.words)  # adding again changes nothing


def test_a_document_fills_a_row_with_its_end(texts: PairText) -> None:
    for index in range(5):
        read = texts.tokenizer(texts.document(index), add_special_tokens=False).input_ids
        assert len(read) == CONTEXT - 1
    assert texts.document(3) == texts.document(3)


def test_repeated_text_comes_twice(texts: PairText) -> None:
    row = texts.repeated(0).tolist()
    quarter = CONTEXT // 4
    for start in (0, 2 * quarter):
        assert sorted(row[start : start + quarter]) == sorted(row[start + quarter : start + 2 * quarter])


def test_somebody_elses_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(OutputError, match="not empty"):
        run_recall_demo(tmp_path, console=Console(quiet=True))
    (tmp_path / "recall-demo.json").touch()
    with pytest.raises(OutputError, match="not empty"):
        run_recall_demo(tmp_path, console=Console(quiet=True))
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def some_documents(source: str, *, split: str) -> Dataset:
    documents = load_documents(source, split=split)
    return documents.select(range(min(40, len(documents))))


@pytest.mark.slow
def test_the_plumbing_with_a_barely_trained_donor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    for module in ("demo_donor", "recall_donor"):  # all of the standard library takes a minute to tokenise
        monkeypatch.setattr(f"equipoise.{module}.load_documents", some_documents)
    tiny = RecallDonorSettings(repeat_steps=1, pair_steps=2, batch_size=2)
    base = replace(tiny.base, steps=2, hidden_size=32, intermediate_size=64, layers=2, heads=2, batch_size=2)
    settings = replace(tiny, base=base)
    place = tmp_path / "recall"
    for recipes, seeds in ((["ssd"], (0,)), (RECIPES, (0, 1))):
        # the second time over the first, with the donor from the cache
        monkeypatch.setattr("equipoise.recall_demo.RECIPES", recipes)
        groups = run_recall_demo(
            place, seeds=seeds, console=Console(quiet=True), settings=settings, budget=4, texts=3
        )
    assert [group.name for group in groups] == [*RECIPES, REFERENCE]
    assert [len(group.runs) for group in groups] == [2, 2, 2, 2, 1]  # seeds of the default recipe as well
    assert len(list((tmp_path / "cache" / "donors").glob("recall-*/config.json"))) == 1
    data = json.loads((place / "recall.json").read_text(encoding="utf-8"))
    assert len(data["items"]) == 3 * 10
    own, reference = (data["groups"][i]["states"] for i in (3, 4))
    assert own["both"]["reach"] == 2 * 15
    # the reference is what the control of ssd is: the same window, the same answers
    assert own["swa_sinks_equal_bytes"]["window"] * 2 - 2 == reference["both"]["reach"]
    assert own["swa_sinks_equal_bytes"]["all"] == reference["both"]["all"] | {
        "seeds": own["swa_sinks_equal_bytes"]["all"]["seeds"]
    }
    page = (place / "recall.html").read_text(encoding="utf-8")
    assert "Which branch answers beyond every reach" in page
    assert page.count("<svg") == 5
