"""When early stopping strikes, and which look it keeps; no model is needed for that."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback

from equipoise.train.stopping import StoppingRule, lower_is_better

NAN = float("nan")


def rule(**settings: Any) -> StoppingRule:
    return StoppingRule({"watch": "linear_share", "mode": "fall", "patience": 2, **settings})


def shown(judge: StoppingRule, values: list[float]) -> tuple[int | None, int | None]:
    """(index of the look that stops, index of the look to keep), both None where there is none."""
    kept = None
    for index, value in enumerate(values):
        kept = index if judge.keeps(value) else kept
        if judge.strikes:
            return index, kept
    return None, kept


@pytest.mark.parametrize(
    ("settings", "values", "expected"),
    [
        ({}, [0.5, 0.6, 0.55, 0.5, 0.9], (3, 1)),
        ({}, [0.5, 0.4, 0.3], (2, 0)),
        ({}, [0.5, 0.4, 0.45, 0.44, 0.44, 0.43], (None, 4)),  # never twice in a row; equal is no fall
        ({}, [0.5, 0.6, 0.59], (None, 1)),  # the steps are up in the middle of a fall
        ({"patience": 1}, [0.5, 0.6, 0.59], (2, 1)),
        ({"min_improvement": 0.05}, [0.5, 0.46, 0.42, 0.3, 0.2], (4, 2)),  # small falls do not count
        ({"watch": "nll"}, [3.0, 2.0, 2.1, 2.2], (3, 1)),  # a loss falls when it rises
        ({"mode": "best"}, [0.5, 0.6, 0.55, 0.58], (3, 1)),
        ({"mode": "best"}, [0.5, 0.6, 0.55, 0.61, 0.6, 0.6], (5, 3)),
        ({"mode": "best", "min_improvement": 0.1}, [0.5, 0.55, 0.58], (2, 2)),  # better, but not by enough
        ({"watch": "loss", "mode": "best"}, [3.0, 2.0, 2.5, NAN], (3, 1)),
        ({"watch": "loss", "mode": "best"}, [NAN, 2.0, NAN, 1.0], (None, 3)),
    ],
)
def test_when_it_stops_and_what_it_keeps(
    settings: dict[str, Any], values: list[float], expected: tuple[int | None, int | None]
) -> None:
    assert shown(rule(**settings), values) == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_best_is_what_transformers_does(seed: int, threshold: float) -> None:
    """Early stopping on the loss went through its callback before; it must stop where that did."""
    draw = random.Random(seed)
    peer, best = EarlyStoppingCallback(3, threshold), None
    own = rule(watch="loss", mode="best", patience=3, min_improvement=threshold)
    args = SimpleNamespace(greater_is_better=False, metric_for_best_model="eval_loss")
    for _ in range(40):
        loss = draw.random()
        control = SimpleNamespace(should_training_stop=False)
        peer.on_evaluate(args, SimpleNamespace(best_metric=best), control, {"eval_loss": loss})  # type: ignore[arg-type]
        is_best = best is None or loss < best
        best = loss if is_best else best
        assert own.keeps(loss) == is_best
        assert own.strikes == control.should_training_stop


@pytest.mark.parametrize("mode", ["fall", "best"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_checkpoint_holds_all_it_knows(mode: str, cut: int) -> None:
    values = [0.5, 0.6, 0.55, 0.5, 0.9]
    whole, before = rule(mode=mode), rule(mode=mode)
    expected = [(whole.keeps(value), whole.strikes) for value in values]
    found = [(before.keeps(value), before.strikes) for value in values[:cut]]
    after = StoppingRule.from_state(before.state())
    found += [(after.keeps(value), after.strikes) for value in values[cut:]]
    assert found == expected


def test_which_way_is_up() -> None:
    assert [lower_is_better(name) for name in ("loss", "nll", "nll_window")] == [True] * 3
    assert [lower_is_better(name) for name in ("linear_share", "gap", "recall", "recovered")] == [False] * 4
