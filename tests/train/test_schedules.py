"""Schedules are pure: the same step gives the same value, however the batch is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equipoise.train.schedules import (
    draw_window_dropout,
    piecewise,
    window_dropout_probability,
    window_size,
)


def draw(probability: float = 0.5, **changes: Any) -> torch.Tensor:
    options: dict[str, Any] = {"batch_size": 64, "heads": None, "per": "sample", "seed": 1}
    options |= {"step": 0, "layer": 0, **changes}
    return draw_window_dropout(probability, **options)


class TestPiecewise:
    def test_published_schedule_in_equal_shares(self) -> None:
        values = [piecewise([0.9, 0.75, 0.5], step, 9) for step in range(9)]
        assert values == [0.9] * 3 + [0.75] * 3 + [0.5] * 3

    @pytest.mark.parametrize("total", [3, 7, 10, 100])
    def test_shares_differ_by_at_most_one_step(self, total: int) -> None:
        values = [piecewise("abc", step, total) for step in range(total)]
        counts = [values.count(v) for v in "abc"]
        assert values == sorted(values)
        assert max(counts) - min(counts) <= 1

    def test_last_value_holds_past_the_end(self) -> None:
        assert piecewise([3, 2, 1], 50, 9) == 1

    def test_fewer_steps_than_values_still_starts_at_the_first(self) -> None:
        assert piecewise([3, 2, 1], 0, 1) == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(([], 0, 1), "got none"), (([1], -1, 1), "count from 0"), (([1], 0, 0), "total_steps")],
    )
    def test_refusals(self, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            piecewise(*arguments)

    def test_window_size(self) -> None:
        assert [window_size([8, 64], step, 4) for step in range(4)] == [8, 8, 64, 64]
        with pytest.raises(ValueError, match="at least 1 token"):
            window_size([0], 0, 1)

    def test_window_dropout_probability(self) -> None:
        assert window_dropout_probability([0.9, 0.5], 3, 4) == 0.5
        with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
            window_dropout_probability([1.5], 0, 1)


class TestWindowDropout:
    @pytest.mark.parametrize(("per", "shape"), [("sample", (64,)), ("layer", (64,)), ("head", (64, 4))])
    def test_shape_and_repeatability(self, per: str, shape: tuple[int, ...]) -> None:
        first = draw(per=per, heads=4)
        assert first.dtype == torch.bool
        assert first.shape == shape
        assert torch.equal(first, draw(per=per, heads=4))

    def test_global_generator_is_neither_read_nor_advanced(self) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = draw()
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(1)
        assert torch.equal(first, draw())

    @pytest.mark.parametrize("per", ["sample", "layer", "head"])
    def test_dividing_the_batch_changes_nothing(self, per: str) -> None:
        whole = draw(per=per, heads=3, batch_size=10)
        parts = [
            draw(per=per, heads=3, batch_size=size, first_sample=first)
            for first, size in ((0, 3), (3, 0), (3, 6), (9, 1))
        ]
        assert torch.equal(whole, torch.cat(parts))

    @pytest.mark.parametrize("probability", [0.9, 0.75, 0.5])
    def test_marginal_frequency(self, probability: float) -> None:
        kept = torch.stack([draw(probability, step=step) for step in range(60)]).double()
        error = 4 * (probability * (1 - probability) / kept.numel()) ** 0.5
        assert abs(kept.mean().item() - (1 - probability)) < error

    def test_ends_of_the_range(self) -> None:
        assert draw(0.0).all()
        assert not draw(1.0).any()

    def test_sample_shares_its_draw_between_layers(self) -> None:
        assert torch.equal(draw(layer=0), draw(layer=7))

    @pytest.mark.parametrize("per", ["layer", "head"])
    def test_layers_are_independent(self, per: str) -> None:
        draws = torch.stack(
            [draw(per=per, heads=2, layer=layer, batch_size=500).flatten() for layer in range(4)]
        )
        correlations = torch.corrcoef(draws.double()) - torch.eye(4)
        assert correlations.abs().max() < 4 / draws.shape[1] ** 0.5

    def test_heads_steps_and_seeds_are_independent(self) -> None:
        by_head = draw(per="head", heads=2, batch_size=500).T
        others = [draw(per="layer", batch_size=500, **change) for change in ({"step": 1}, {"seed": 2})]
        draws = torch.stack([*by_head, *others]).double()
        assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 4 / 500**0.5

    def test_neighbouring_samples_are_independent(self) -> None:
        kept = draw(batch_size=2000).double()
        pairs = torch.stack([kept[:-1], kept[1:]])
        assert torch.corrcoef(pairs)[0, 1].abs() < 4 / 2000**0.5

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"probability": -0.1}, r"\[0, 1\]"),
            ({"probability": float("nan")}, r"\[0, 1\]"),
            ({"per": "head"}, "number of heads"),
            ({"first_sample": -1}, "at least 0"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            draw(**changes)
