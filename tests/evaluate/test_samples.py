"""From lm-eval's samples to scores of documents, on made-up tasks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from equipoise.evaluate.failures import HarnessError
from equipoise.evaluate.samples import by_document, chance_of, task_scores


def task(output_type: str = "multiple_choice", **settings: Any) -> Any:
    config = SimpleNamespace(process_results=settings.get("process_results"))
    return SimpleNamespace(
        OUTPUT_TYPE=output_type, config=config, multiple_target=settings.get("multiple_target", False),
        _metric_fn_list=settings.get("metrics", {"acc": None}), task_name="made-up",
        process_results=settings.get("process_results"),
    )  # fmt: skip


def sample(options: int, target: Any = 0, **scores: Any) -> dict[str, Any]:
    return {"arguments": [("Q", "A")] * options, "target": target, "doc": {"right": target}, "doc_hash": "d",
            "prompt_hash": str(options), "filter": "none", **scores}  # fmt: skip


# ---- what counts as a score


def test_one_score_a_document() -> None:
    sums, weights = by_document([1.0, 0, True, np.float64(0.5)], 2.5 / 4) or ((), ())
    assert list(sums) == [1, 0, 1, 0.5]
    assert list(weights) == [1, 1, 1, 1]


def test_several_scores_a_document() -> None:  # IFEval's instructions
    sums, weights = by_document([[True, False], [True], []], 2 / 3) or ((), ())
    assert list(sums) == [1, 1, 0]
    assert list(weights) == [2, 1, 0]


def test_documents_marked_as_not_covered() -> None:  # RULER's lengths
    sums, weights = by_document([0.5, -1.0, 1.0, None], 0.75) or ((), ())
    assert list(sums) == [0.5, 0, 1, 0]
    assert list(weights) == [1, 0, 1, 0]


def test_minus_one_is_a_score_where_it_counts_as_one() -> None:
    sums, _ = by_document([1.0, -1.0], 0.0) or ((), ())
    assert list(sums) == [1, -1]


@pytest.mark.parametrize(
    ("values", "reported"),
    [([1.0, 0.0], 0.7), ([(1, 0), (0, 1)], 0.5), ([-1.0, -1.0], 0.3), ([None, None], 0.0), (["yes"], 1.0)],
)
def test_what_is_no_average_over_documents(values: list[Any], reported: float) -> None:
    assert by_document(values, reported) is None


# ---- guessing


def test_chance_is_one_over_the_options() -> None:
    samples = [sample(2), sample(4), sample(5)]
    assert list(chance_of(task(), "acc", samples)) == [1 / 2, 1 / 4, 1 / 5]
    assert list(chance_of(task(), "acc_norm", samples)) == [1 / 2, 1 / 4, 1 / 5]
    assert list(chance_of(task(), "exact_match", samples)) == [0, 0, 0]


def test_chance_with_several_right_options() -> None:
    several = [sample(4, [0, 2]), sample(4, [1])]
    assert list(chance_of(task(multiple_target=True), "acc", several)) == [1 / 2, 1 / 4]


def test_unconditional_requests_are_no_options() -> None:
    assert list(chance_of(task(metrics={"acc": None, "acc_mutual_info": None}), "acc", [sample(8)])) == [
        1 / 4
    ]


def test_what_is_generated_cannot_be_guessed() -> None:
    assert list(chance_of(task("generate_until"), "exact_match", [sample(1), sample(1)])) == [0, 0]


def test_chance_of_a_task_with_a_score_of_its_own() -> None:
    def probability_of_the_right(document: Any, answers: list[tuple[float, bool]]) -> dict[str, float]:
        weights = np.exp([likelihood for likelihood, _ in answers])
        return {"acc": float(weights[document["right"]].sum() / weights.sum()), "other": "words"}  # type: ignore

    own = task(process_results=probability_of_the_right)
    assert chance_of(own, "acc", [sample(5, [0, 3])])[0] == pytest.approx(2 / 5)
    assert chance_of(own, "other", [sample(5, [0, 3])])[0] == 0


# ---- a whole task


def test_metrics_of_which_less_is_better_and_errors_are_left_out() -> None:
    samples = [sample(2, acc=1.0, brier=0.1, f1=(0, 1)), sample(4, acc=0.0, brier=0.3, f1=(1, 1))]
    reported = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "brier,none": 0.2, "f1,none": 0.9}
    scores = task_scores(task(), samples, reported, {"acc": True, "brier": False, "f1": True})
    assert list(scores.metrics) == ["acc,none"]
    assert list(scores.metrics["acc,none"].chance) == [1 / 2, 1 / 4]
    assert scores.reported == {"acc,none": 0.5, "brier,none": 0.2, "f1,none": 0.9}
    assert len(set(scores.documents)) == 2
    with pytest.raises(HarnessError, match=r"task made-up: none of its scores \(f1,none\)"):
        task_scores(task(), samples, {"f1,none": 0.9}, {"f1": True})


def test_every_filter_is_a_metric_of_its_own() -> None:  # gsm8k: strict and flexible
    strict = [sample(1, exact_match=0.0), sample(1, exact_match=1.0)]
    flexible = [{**each, "filter": "flexible", "exact_match": 1.0} for each in strict]
    reported = {"exact_match,none": 0.5, "exact_match,flexible": 1.0}
    scores = task_scores(task("generate_until"), strict + flexible, reported, {"exact_match": True})
    assert list(scores.metrics["exact_match,none"].sums) == [0, 1]
    assert list(scores.metrics["exact_match,flexible"].sums) == [1, 1]
    assert len(scores.documents) == 2
