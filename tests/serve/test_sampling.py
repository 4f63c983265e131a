"""Each row is drawn by its own parameters and numbers, whoever its neighbours are."""

from __future__ import annotations

import pytest
import torch

from equipoise.serve.sampling import Sampling, choose, logprob_of
from support import normal

LOGITS = normal(5, 50) * 2


def draw(rows: list[int], samplings: list[Sampling], times: int = 1) -> list[list[int]]:
    generators = [sampling.generator(0) for sampling in samplings]
    return [choose(LOGITS[rows], list(zip(samplings, generators, strict=True))) for _ in range(times)]


def test_neighbours_do_not_matter() -> None:
    mixed = [
        Sampling(seed=1),
        Sampling(temperature=0.0),
        Sampling(seed=2, top_p=0.5),
        Sampling(seed=1),
        Sampling(),
    ]
    together = draw([0, 1, 2, 3, 4], mixed, 8)
    for row in range(4):
        alone = draw([row], [mixed[row]], 8)
        assert [step[row] for step in together] == [step[0] for step in alone]


@pytest.mark.parametrize("temperature", [0.0, 1e-5])
def test_low_temperatures_take_the_likeliest(temperature: float) -> None:
    assert draw([0, 1], [Sampling(temperature=temperature)] * 2)[0] == LOGITS[:2].argmax(-1).tolist()


def test_truncation_keeps_to_the_likeliest() -> None:
    order = LOGITS[0].argsort(descending=True).tolist()
    drawn = {step[0] for step in draw([0], [Sampling(top_k=3, seed=0, temperature=2.0)], 200)}
    assert drawn == set(order[:3])
    probabilities = LOGITS[0].softmax(-1)
    drawn = {step[0] for step in draw([0], [Sampling(top_p=0.5, seed=0)], 200)}
    needed = int((probabilities[order].cumsum(0) < 0.5).sum()) + 1
    assert drawn == set(order[:needed])


def test_draws_follow_the_probabilities() -> None:
    times = 1000
    drawn = torch.tensor([step[0] for step in draw([0], [Sampling(seed=0, temperature=1.5)], times)])
    found = torch.bincount(drawn, minlength=50).double() / times
    expected = (LOGITS[0] / 1.5).softmax(-1)
    assert float((found - expected).abs().sum()) < 0.25  # about sqrt(2 * 50 / (pi * times)) by chance


def test_choices_of_one_seed_differ() -> None:
    first, second = (Sampling(seed=5).generator(index) for index in (0, 1))
    assert first is not None
    assert second is not None
    assert first.initial_seed() != second.initial_seed()
    assert Sampling(seed=-3).generator(0) is not None


def test_log_probabilities_are_those_before_temperature() -> None:
    found = logprob_of(LOGITS[0], 7, 2)
    expected = LOGITS[0].log_softmax(-1)
    assert found.logprob == pytest.approx(float(expected[7]), abs=1e-12)
    assert [token for token, _ in found.top] == expected.topk(2).indices.tolist()
