"""Sampled Shapley values against the definition, and what their standard errors promise."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from equipoise.audit.depth_shapley import Coalition, least_pairs, shapley

DOCUMENTS = 5
WEIGHTS = np.array([1.0, 2.0, 3.0, 4.0, 5.0])


def random_game(players: int, seed: int = 0) -> Callable[[Coalition], np.ndarray]:
    """Any function of coalitions: independent numbers."""
    rng = np.random.default_rng(seed)
    values: dict[Coalition, np.ndarray] = {}
    for size in range(players + 1):
        for coalition in itertools.combinations(range(players), size):
            values[frozenset(coalition)] = rng.normal(size=DOCUMENTS) + size
    return values.__getitem__


def by_permutations(game: Callable[[Coalition], np.ndarray], players: int) -> np.ndarray:
    """The definition: mean marginal over all orders [players, documents]."""
    orders = list(itertools.permutations(range(players)))
    total = np.zeros((players, DOCUMENTS))
    for order in orders:
        for place, player in enumerate(order):
            total[player] += game(frozenset(order[: place + 1])) - game(frozenset(order[:place]))
    return total / len(orders)


def test_exact_where_the_budget_allows() -> None:
    game = random_game(5)
    found = shapley(game, 5, WEIGHTS, tolerance=0.0, budget=30)
    np.testing.assert_allclose(found.sums, by_permutations(game, 5), atol=1e-12)
    assert (found.stopped_by, found.pairs, found.evaluations, found.trusted) == ("exact", 0, 32, True)
    assert found.standard_errors.tolist() == [0.0] * 5
    assert found.efficiency_gap < 1e-12


def test_sampling_is_efficient_and_finds_the_values() -> None:
    game = random_game(6)
    found = shapley(game, 6, WEIGHTS, tolerance=0.02, budget=61)
    total = (game(frozenset(range(6))) - game(frozenset())).sum() / WEIGHTS.sum()
    values = found.sums.sum(1) / WEIGHTS.sum()
    assert values.sum() == pytest.approx(total, abs=1e-12)
    truth = by_permutations(game, 6).sum(1) / WEIGHTS.sum()
    assert found.pairs >= least_pairs(6)
    assert (np.abs(values - truth) <= 4 * found.standard_errors).all()
    assert (found.standard_errors > 0).all()


def test_games_of_pairwise_interactions_need_one_pair_only() -> None:
    """A permutation and its reverse: each two players meet once in either order."""
    rng = np.random.default_rng(1)
    alone, together = rng.normal(size=(9, DOCUMENTS)), rng.normal(size=(9, 9, DOCUMENTS))

    def game(coalition: Coalition) -> np.ndarray:
        members = sorted(coalition)
        return alone[members].sum(0) + together[np.ix_(members, members)].sum((0, 1))

    found = shapley(game, 9, WEIGHTS, tolerance=1e-9, budget=500)
    expected = alone + np.einsum("iid->id", together)
    for i, j in itertools.permutations(range(9), 2):
        expected[i] += (together[i, j] + together[j, i]) / 2
    np.testing.assert_allclose(found.sums, expected, atol=1e-10)
    assert (found.stopped_by, found.pairs) == ("tolerance", 9)


def test_stops_at_the_tolerance_or_at_the_budget() -> None:
    game = random_game(7)
    loose = shapley(game, 7, WEIGHTS, tolerance=1.0, budget=125)
    assert (loose.stopped_by, loose.pairs) == ("tolerance", 8)
    assert loose.standard_errors.max() <= 1.0
    tight = shapley(game, 7, WEIGHTS, tolerance=1e-6, budget=40)
    assert tight.stopped_by == "budget"
    assert not tight.trusted
    assert tight.evaluations - 2 <= 40
    assert 2 <= tight.pairs < 8
    poor = shapley(game, 7, WEIGHTS, tolerance=1e-6, budget=0)  # a standard error takes two pairs
    assert (poor.stopped_by, poor.pairs) == ("budget", 2)


def test_standard_errors_are_those_of_repeated_sampling() -> None:
    game = random_game(6)
    runs = [shapley(game, 6, WEIGHTS, tolerance=0.3, budget=61, seed=seed) for seed in range(150)]
    assert {run.pairs for run in runs} == {8}
    values = np.stack([run.sums.sum(1) / WEIGHTS.sum() for run in runs])
    reported = np.sqrt(np.mean([run.standard_errors**2 for run in runs], axis=0))
    np.testing.assert_allclose(reported, values.std(0), rtol=0.25)


def test_standard_errors_know_of_players_that_count_only_where_they_come_first() -> None:
    """Each adds the largest gain so far: the small ones are worth something at the first place alone, which
    some samples never show."""
    gains = np.array([0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0])

    def game(coalition: Coalition) -> np.ndarray:
        return WEIGHTS * (1 + max(gains[list(coalition)]) if coalition else 0.0)

    runs = [shapley(game, 7, WEIGHTS, tolerance=0.2, budget=125, seed=seed) for seed in range(100)]
    assert {run.pairs for run in runs} == {8}
    values = np.stack([run.sums.sum(1) / WEIGHTS.sum() for run in runs])
    assert (values[:, 0] == 0).any()  # it never came first, and its sample has no spread
    reported = np.stack([run.standard_errors for run in runs])
    assert (reported.min(0) > 0.7 * values.std(0)).all()


def test_seeds_decide_and_coalitions_are_scored_once() -> None:
    game, asked = random_game(6), list[Coalition]()

    def counting(coalition: Coalition) -> np.ndarray:
        asked.append(coalition)
        return game(coalition)

    one = shapley(counting, 6, WEIGHTS, tolerance=0.0, budget=50, seed=4)
    assert len(asked) == len(set(asked)) == one.evaluations
    again = shapley(game, 6, WEIGHTS, tolerance=0.0, budget=50, seed=4)
    np.testing.assert_array_equal(one.sums, again.sums)
    other = shapley(game, 6, WEIGHTS, tolerance=0.0, budget=50, seed=5)
    assert not np.allclose(one.sums, other.sums)


def test_one_player_gets_everything() -> None:
    game = random_game(1)
    found = shapley(game, 1, WEIGHTS, tolerance=0.0, budget=0)
    np.testing.assert_allclose(found.sums[0], game(frozenset({0})) - game(frozenset()))
    assert found.stopped_by == "exact"


@pytest.mark.parametrize(("players", "tolerance", "budget"), [(0, 0.1, 5), (3, -0.1, 5), (3, 0.1, -5)])
def test_wrong_settings_are_refused(players: int, tolerance: float, budget: int) -> None:
    with pytest.raises(ValueError, match="expected at least one player"):
        shapley(random_game(3), players, WEIGHTS, tolerance=tolerance, budget=budget)
