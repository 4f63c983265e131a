"""The table of a benchmark run, from made-up scores of documents."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.config import ConfigError
from equipoise.evaluate.benchmarks import BenchmarkTable, benchmark_table, columns_of, score_table
from equipoise.evaluate.entries import Aggregate, Entry, for_each_task, per_task
from equipoise.evaluate.failures import HarnessError
from equipoise.evaluate.scores import MetricScores, StateScores, TaskScores
from equipoise.registry import UnknownNameError

RNG = np.random.default_rng(0)
PAIR = Entry(name="pair", tasks=("small", "large"), aggregates=(Aggregate(metric="acc"),))


def entry(name: str) -> Entry:
    return Entry(name=name, tasks=(name,))


def metric(values: object, chance: float = 0.25, weights: object = None) -> MetricScores:
    sums = np.asarray(values, dtype=np.float64)
    weighed = np.ones(len(sums)) if weights is None else np.asarray(weights, dtype=np.float64)
    return MetricScores(sums=sums, weights=weighed, chance=chance * weighed)


def task(**metrics: MetricScores) -> TaskScores:
    named = {name.replace("__", ","): scores for name, scores in metrics.items()}
    size = len(next(iter(named.values())).sums)
    return TaskScores(documents=tuple(f"{i}" for i in range(size)), metrics=named, reported={})


def state(**tasks: TaskScores) -> StateScores:
    return StateScores(tasks=tasks, seconds=1.0)


def answers(share: float, count: int) -> MetricScores:
    return metric(RNG.permutation(np.arange(count) < share * count))


def example(documents: int = 40) -> dict[str, StateScores]:
    def one(shares: tuple[float, float, float]) -> StateScores:
        first, small, large = shares
        return state(
            first=task(acc__none=answers(first, documents)), small=task(acc__none=answers(small, 10)),
            large=task(acc__none=answers(large, documents - 10)),
        )  # fmt: skip

    return {"softmax": one((0.8, 0.7, 0.6)), "both": one((0.7, 0.6, 0.5)), "none": one((0.25, 0.2, 0.3))}


def table(states: dict[str, StateScores], *entries: Entry, **settings: object) -> BenchmarkTable:
    return benchmark_table(entries, states, resamples=200, **settings)  # type: ignore[arg-type]


def test_group_counts_once_and_weighs_its_tasks_by_size() -> None:
    made = table(example(), entry("first"), PAIR)
    donor = made.rows["softmax"]
    assert donor.scores["first"].value == pytest.approx(0.8)
    assert donor.scores["pair"].value == pytest.approx((0.7 * 10 + 0.6 * 30) / 40)
    assert donor.average.value == pytest.approx((0.8 + (0.7 * 10 + 0.6 * 30) / 40) / 2)
    assert [column.is_group for column in made.columns] == [False, True]


def test_group_may_weigh_its_tasks_equally() -> None:
    equal = Entry(name="pair", tasks=PAIR.tasks, aggregates=(Aggregate(metric="acc", by_size=False),))
    assert table(example(), equal).rows["softmax"].average.value == pytest.approx(0.65)


def test_recovered_of_the_donor_and_above_chance() -> None:
    made = table(example(), entry("first"), PAIR)
    donor, both, none = (made.rows[name] for name in ("softmax", "both", "none"))
    assert made.average_chance == made.chance["pair"] == 0.25
    for row in (both, none):
        assert row.recovered is not None
        assert row.recovered_above_chance is not None
        assert row.recovered.value == pytest.approx(row.average.value / donor.average.value)
        corrected = (row.average.value - 0.25) / (donor.average.value - 0.25)
        assert row.recovered_above_chance.value == pytest.approx(corrected)
        assert row.recovered.ci95[0] < row.recovered.value < row.recovered.ci95[1]
    assert donor.recovered is not None
    assert donor.recovered.ci95 == (1, 1)  # paired: the donor is compared with itself, document by document


def test_chance_is_averaged_as_scores_are() -> None:
    states = {
        "softmax": state(
            two=task(acc__none=metric([1] * 10, 0.5)), told=task(exact__none=metric([1] * 4, 0.0))
        ),
        "both": state(
            two=task(acc__none=metric([1, 0] * 5, 0.5)), told=task(exact__none=metric([1, 0] * 2, 0.0))
        ),
    }
    made = table(states, entry("two"), entry("told"))
    assert (made.chance, made.average_chance) == ({"two": 0.5, "told": 0.0}, 0.25)
    assert made.rows["both"].recovered_above_chance is not None
    assert made.rows["both"].recovered_above_chance.value == pytest.approx((0.5 - 0.25) / (1 - 0.25))


def test_donor_no_better_than_guessing_leaves_recovery_above_chance_undefined() -> None:
    states = {name: state(first=task(acc__none=metric([0, 0, 0, 1] * 5))) for name in ("softmax", "both")}
    row = table(states, entry("first")).rows["both"]
    assert row.recovered is not None
    assert row.recovered_above_chance is not None
    assert row.recovered.value == 1
    assert not row.recovered_above_chance.defined


def test_differences_are_paired() -> None:
    right = RNG.random(60) < 0.5
    fewer = right.copy()
    fewer[:3] = False
    right[:3] = True
    states = {
        "softmax": state(first=task(acc__none=metric(right))),
        "both": state(first=task(acc__none=metric(right))),
        "window": state(first=task(acc__none=metric(fewer))),
    }  # fmt: skip
    row = table(states, entry("first")).rows["window"]
    assert row.below_donor is not None
    assert row.below_donor == row.below_both
    assert row.below_donor.value == pytest.approx(3 / 60)
    low, high = row.below_donor.ci95
    unpaired = row.average.ci95[1] - row.average.ci95[0]
    assert 0 <= low < 3 / 60 < high
    assert high - low < unpaired / 2


def test_without_a_donor_nothing_is_recovered() -> None:
    states = example()
    del states["softmax"]
    row = table(states, entry("first")).rows["none"]
    assert (row.recovered, row.recovered_above_chance, row.below_donor) == (None, None, None)
    assert row.below_both is not None


def test_average_resamples_within_each_task() -> None:
    # Two tasks without any spread of their own: resampled together, one task's documents would replace the
    # other's, and their average would spread.
    states = {"both": state(easy=task(acc__none=metric([1] * 20)), hard=task(acc__none=metric([0] * 20)))}
    average = table(states, entry("easy"), entry("hard")).rows["both"].average
    assert (average.value, *average.ci95) == (0.5, 0.5, 0.5)
    # and with spread: variances of independent tasks add up
    states = {"both": state(**{f"t{i}": task(acc__none=answers(0.5, 100)) for i in range(4)})}
    made = benchmark_table([entry(f"t{i}") for i in range(4)], states, resamples=4000)
    widths = [score.ci95[1] - score.ci95[0] for score in made.rows["both"].scores.values()]
    average = made.rows["both"].average
    assert average.ci95[1] - average.ci95[0] == pytest.approx(np.mean(widths) / 2, rel=0.1)


def test_tasks_interval_does_not_depend_on_the_others() -> None:
    states = example()
    alone = table(states, entry("first")).rows["both"].scores["first"]
    assert table(states, PAIR, entry("first")).rows["both"].scores["first"] == alone
    assert table(states, entry("first"), seed=1).rows["both"].scores["first"] != alone


def test_states_that_saw_other_prompts_are_an_error() -> None:
    states = example()
    other = TaskScores(documents=("x",) * 40, metrics=states["none"].tasks["first"].metrics, reported={})
    states["none"] = state(**{**states["none"].tasks, "first": other})
    with pytest.raises(
        HarnessError, match="task first: states softmax and none did not see the same prompts"
    ):
        table(states, entry("first"))


def test_documents_that_a_metric_does_not_cover_do_not_count() -> None:
    scores = metric([0.5, 0, 1, 0], chance=0.1, weights=[1, 0, 1, 0])
    made = score_table("long", "512,none", {"both": state(long=task(**{"512__none": scores}))})
    assert made.documents == 2
    assert list(made.sums["both"]) == [0.5, 1]
    assert list(made.sums["chance"]) == [0.1, 0.1]


# ---- which metric


def test_published_metrics_are_the_default() -> None:
    both = task(acc__none=answers(0.5, 8), acc_norm__none=answers(0.5, 8))
    tasks = {"hellaswag": both, "piqa": both, "made": task(f__one=answers(0.5, 8), f__two=answers(0.5, 8))}
    chosen = {name: columns_of(entry(name), tasks, {})[0].metric for name in tasks}
    assert chosen == {"hellaswag": "acc_norm", "piqa": "acc", "made": "f,one"}
    wanted = {"hellaswag": "acc", "piqa": "acc_norm", "made": "f,two"}
    assert {name: columns_of(entry(name), tasks, wanted)[0].metric for name in tasks} == wanted
    with pytest.raises(UnknownNameError, match=r"unknown metric of piqa 'acc_nrm'. Did you mean 'acc_norm"):
        columns_of(entry("piqa"), tasks, {"piqa": "acc_nrm"})


def test_metric_of_a_task_that_was_not_run() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task in --metric 'frist'. Did you mean 'first'?"):
        table(example(), entry("first"), metrics={"frist": "acc"})


def test_group_may_show_another_metric_and_leaves_out_tasks_without_it() -> None:
    tasks = {"small": task(acc__none=answers(0.5, 4), acc_norm__none=answers(0.5, 4)),
             "large": task(acc__none=answers(0.5, 8))}  # fmt: skip
    (column,) = columns_of(PAIR, tasks, {"pair": "acc_norm"})
    assert column.parts == (("small", "acc_norm,none"),)
    with pytest.raises(UnknownNameError, match="metric of pair"):
        columns_of(PAIR, tasks, {"pair": "f1"})


def test_lengths_are_columns_that_share_one_place_in_the_average() -> None:
    lengths = task(**{"4096__none": answers(0.25, 8), "512__none": answers(0.75, 8)})
    states = {"both": state(niah=lengths, first=task(acc__none=answers(1.0, 8)))}
    made = table(states, entry("niah"), entry("first"))
    assert [column.label for column in made.columns] == ["niah@512", "niah@4096", "first"]
    assert made.rows["both"].average.value == pytest.approx((0.5 + 1.0) / 2)
    group = Entry(name="ruler", tasks=("niah",), aggregates=(Aggregate(metric="4096", by_size=False),))
    assert [column.label for column in table(states, group).columns] == ["ruler@512", "ruler@4096"]


# ---- values by task


def test_values_by_task() -> None:
    assert per_task("5", "--x") == ("5", {})
    assert per_task("0, mmlu=5", "--x") == ("0", {"mmlu": "5"})
    assert per_task("a=1,b=2", "--x") == (None, {"a": "1", "b": "2"})
    for wrong in ("", "1,2", "a=", "=1", "1,"):
        with pytest.raises(ConfigError, match="--x: expected a value, or TASK=VALUE"):
            per_task(wrong, "--x")
    spread = for_each_task([entry("first"), PAIR], {"pair": "1", "large": "2"}, "--x")
    assert spread == {"small": "1", "large": "2"}
