"""Measuring a donor and giving each layer its share, on tiny random donors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.config import AllocationConfig, ConfigError, HybridConfig, parse
from equipoise.layers.cache import CacheError
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode, Blend
from equipoise.models.allocation import allocate, measuring
from equipoise.models.allocation import budget as sharing
from equipoise.models.allocation.measuring import DonorDivergence
from equipoise.models.branches import branches
from equipoise.models.layout import state_bytes
from equipoise.models.surgery import hybridize
from support import random_tokens, tiny_model

F64 = torch.float64
HYBRID = HybridConfig(window=10, sinks=2)
SETTINGS = AllocationConfig(smallest_window=2, linear_share=0.5)


def donor(factor: float = 6.0) -> Any:
    """A tiny Llama whose attention is sharp enough to matter."""
    model = tiny_model(dtype=F64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "o_proj", "v_proj")):
                parameter.mul_(factor)
    return model


@pytest.fixture
def rows() -> dict[str, Tensor]:
    return {"input_ids": random_tokens(3, 20)}


@pytest.fixture
def measured(rows: dict[str, Tensor]) -> DonorDivergence:
    model = hybridize(donor(), HybridConfig(window=4, feature_map=None), check=False)
    return DonorDivergence(model, rows, batch_size=2)


class TestMeasuring:
    def test_windows(self, measured: DonorDivergence, rows: dict[str, Tensor]) -> None:
        own = donor()(**rows).logits[:, :-1].log_softmax(-1)
        with branches(measured.model, AttentionMode("swa", window=3, sinks=1)):
            other = measured.model(**rows, use_cache=False).logits[:, :-1].log_softmax(-1)
        expected = (own.exp() * (own - other)).sum(-1).mean()
        assert expected > 1e-4
        assert measured.windowed([3, 3], sinks=1) == pytest.approx(expected.item(), rel=1e-9)

    def test_nothing_is_lost_by_windows_as_long_as_the_text(self, measured: DonorDivergence) -> None:
        assert measured.windowed([20, None], sinks=0) == pytest.approx(0, abs=1e-12)

    def test_heads_kept_whole(self, measured: DonorDivergence) -> None:
        every = [range(4), range(4)]
        assert measured.windowed([2, 2], sinks=0, heads=every) == pytest.approx(0, abs=1e-12)
        none, whole = measured.windowed([2, 2], sinks=0), measured.windowed([2, 2], sinks=0, heads=[[1], []])
        assert whole != pytest.approx(none, rel=1e-6)
        for share, expected in ((0.0, none), (1.0, whole)):
            found = measured.windowed([2, 2], sinks=0, heads=[[1], []], softmax_share=share)
            assert found == pytest.approx(expected)
        half = measured.windowed([2, 2], sinks=0, heads=[[1], []], softmax_share=0.5)
        assert half not in (pytest.approx(none, rel=1e-6), pytest.approx(whole, rel=1e-6))

    def test_windows_of_heads(self, measured: DonorDivergence) -> None:
        alike = measured.windowed([[3, 3], (2, 2)], sinks=1)
        assert alike == pytest.approx(measured.windowed([3, 2], sinks=1), rel=1e-9)
        assert measured.windowed([[20, 20], [20, 20]], sinks=0) == pytest.approx(0, abs=1e-12)
        # query heads 0 and 1 read the first key head, so whole softmax in them makes its window irrelevant
        first, other = ([[window, 3], [20, 20]] for window in (2, 5))
        kept: Any = {"sinks": 0, "heads": [[0, 1], []]}
        assert measured.windowed(first, **kept) == pytest.approx(measured.windowed(other, **kept), rel=1e-9)
        assert measured.windowed(first, sinks=0) != pytest.approx(measured.windowed(other, sinks=0), rel=1e-6)

    def test_windows_of_heads_are_computed_once_for_each_head(
        self, measured: DonorDivergence, rows: dict[str, Tensor]
    ) -> None:
        """The same as a blend of windows in all heads with weights of 0 and 1."""
        weights = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
        blend = AttentionMode("blend", sinks=1, blend=Blend((2, 5), weights))
        apart = AttentionMode("swa", sinks=1, head_windows=(2, 5))
        found: list[Tensor] = []
        for mode in (blend, apart):
            with branches(measured.model, mode):
                found.append(measured.model(**rows, use_cache=False).logits)
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        whole = [20, 20]
        # a share of softmax too small to count takes the way of blends
        one_way, other_way = (measured.windowed([own, whole], sinks=1) for own in ([2, 5], [5, 2]))
        kept: Any = {"sinks": 1, "heads": [[0, 1], []], "softmax_share": 1e-9}
        assert one_way == pytest.approx(measured.windowed([[2, 5], whole], **kept), rel=1e-6)
        assert one_way != pytest.approx(other_way, rel=1e-4)
        with branches(measured.model, apart), pytest.raises(CacheError, match="keeps no cache"):
            measured.model(**rows, use_cache=True)

    def test_worth_adds_up_to_what_windows_lose(self, rows: dict[str, Tensor]) -> None:
        model = hybridize(donor(2.0), HybridConfig(window=4, feature_map=None), check=False)
        measured = DonorDivergence(model, rows, batch_size=3)
        found = measured.worth([2, 4, 20], sinks=0, steps=16)
        assert found.shape == (2, 4, 3)
        assert float(found.sum()) == pytest.approx(measured.windowed([2, 2], sinks=0), rel=0.02)
        assert float(found[..., 2].abs().max()) < 1e-12  # from the whole text to the whole text
        whole = measured.worth([2], sinks=0, steps=16)
        torch.testing.assert_close(found.sum(-1, keepdim=True), whole, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("batch_size", [2, 3])
    def test_lookups_weigh_by_what_windows_lose(self, batch_size: int, rows: dict[str, Tensor]) -> None:
        """Everything together then restores the mean of squares over the mean."""
        model = donor(2.0)
        own = model(**rows).logits[:, :-1].log_softmax(-1).detach()
        hybridize(model, HybridConfig(window=4, feature_map=None), check=False)
        with branches(model, AttentionMode("swa", window=3, sinks=1)):
            other = model(**rows, use_cache=False).logits[:, :-1].log_softmax(-1).detach()
        lost = (own.exp() * (own - other)).sum(-1)
        measured = DonorDivergence(model, rows, batch_size=batch_size)
        found = measured.worth([3], sinks=1, steps=64, weigh_lookups=True)
        expected = float(lost.square().mean() / lost.mean())
        assert expected > 1.1 * float(lost.mean())
        assert float(found.sum()) == pytest.approx(expected, rel=0.02)

    def test_nothing_lost_is_nothing_to_weigh(self, measured: DonorDivergence) -> None:
        found = measured.worth([20], sinks=0, weigh_lookups=True)
        assert float(found.abs().max()) < 1e-12

    def test_worth_is_of_the_only_head_that_is_read(self, rows: dict[str, Tensor]) -> None:
        model = donor()
        with torch.no_grad():  # the output projection reads head 2 of layer 1 alone, and nothing of layer 0
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[1].self_attn.o_proj.weight[:, torch.arange(32) // 8 != 2] = 0
        hybridize(model, HybridConfig(window=4, feature_map=None), check=False)
        found = DonorDivergence(model, rows, batch_size=3).worth([2, 4], sinks=0).sum(-1)
        others = found.clone()
        others[1, 2] = 0
        assert found[1, 2] > 1e-4
        assert others.abs().max() < 1e-12

    def test_batches_do_not_matter(self, measured: DonorDivergence, rows: dict[str, Tensor]) -> None:
        whole = DonorDivergence(measured.model, rows, batch_size=3)
        assert measured.windowed([3, 2], sinks=1) == pytest.approx(whole.windowed([3, 2], sinks=1), rel=1e-9)
        torch.testing.assert_close(measured.worth([2, 3], sinks=1), whole.worth([2, 3], sinks=1))

    def test_modes_come_back(self, measured: DonorDivergence) -> None:
        before = [mixer.mode for mixer in mixers_of(measured.model)]
        measured.windowed([3, 3], sinks=0)
        measured.worth([3], sinks=0, steps=1)
        assert [mixer.mode for mixer in mixers_of(measured.model)] == before

    def test_blends_keep_no_cache(self, measured: DonorDivergence) -> None:
        mode = AttentionMode("blend", blend=Blend((3,), torch.ones(1, 4)))
        with branches(measured.model, mode), pytest.raises(CacheError, match="use_cache=False"):
            measured.model(random_tokens(1, 5), use_cache=True)


class TestAllocate:
    def test_the_budget_is_kept_and_the_hybrid_is_that(self, rows: dict[str, Tensor]) -> None:
        for budget in (1_100, 1_500, 3_000):
            found = allocate(donor(), rows, HYBRID, SETTINGS.model_copy(update={"state_bytes": budget}))
            assert found.state_bytes <= budget
            assert (
                budget - found.state_bytes < 4 * 32 or max(map(max, found.windows)) == 20
            )  # less than a token a head
            assert any(found.linear_heads)
            model = hybridize(donor(), found.hybrid)
            assert state_bytes(model) == found.state_bytes
            for mixer, windows, heads in zip(
                mixers_of(model), found.windows, found.linear_heads, strict=True
            ):
                assert mixer.config.window == max(windows)
                assert list(mixer.config.head_windows or (mixer.config.window,) * 2) == windows
                assert mixer.has_both == bool(heads)
                assert list(mixer.config.linear_heads or ()) == heads

    def test_heads_that_share_a_state_are_chosen_together(self, rows: dict[str, Tensor]) -> None:
        shared = HYBRID.model_copy(update={"map_heads": "key_value"})
        apart = allocate(donor(), rows, HYBRID, SETTINGS)
        found = allocate(donor(), rows, shared, SETTINGS)
        assert any(found.linear_heads)
        for heads in found.linear_heads:
            assert heads == sorted({head // 2 * 2 + i for head in heads for i in range(2)})
        assert sum(map(len, found.linear_heads)) >= sum(map(len, apart.linear_heads))  # each costs half
        assert found.state_bytes == state_bytes(hybridize(donor(), found.hybrid)) <= found.budget

    def test_means_of_shared_states_cost_half(self, rows: dict[str, Tensor]) -> None:
        model = donor()
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
        means = {"feature_map": "constant", "feature_dim": 1, "mixing": "calibrated"}
        found: dict[str, Any] = {}
        for way in ("query", "key_value"):
            hybrid = HYBRID.model_copy(update={"map_heads": way})
            settings = SETTINGS.model_copy(update={"elsewhere": means, "state_bytes": 3_000})
            found[way] = allocate(model, rows, hybrid, settings)
            converted = hybridize(donor(), found[way].hybrid)
            assert found[way].state_bytes == state_bytes(converted) <= found[way].budget
        first = [of.hybrid.for_layer(0) for of in found.values()]
        assert [of.map_heads for of in first] == ["query", "key_value"]
        assert [of.linear_heads for of in first] == [(0, 1, 2, 3)] * 2

    def test_no_window_is_longer_than_the_rows(self, rows: dict[str, Tensor]) -> None:
        found = allocate(donor(), rows, HYBRID, SETTINGS.model_copy(update={"state_bytes": 100_000}))
        assert max(map(max, found.windows)) <= 20
        assert min(found.divergence.values()) == pytest.approx(0, abs=1e-9)
        assert found.state_bytes < found.budget

    def test_a_layer_with_a_window_only_has_nothing_to_train(self, rows: dict[str, Tensor]) -> None:
        model = donor()
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
        gated = HYBRID.model_copy(update={"gate": "per_token", "write_gate": "per_token"})
        found = allocate(model, rows, gated, SETTINGS)
        first, second = mixers_of(hybridize(donor(), found.hybrid))
        assert not list(first.parameters())
        assert list(second.parameters())

    def test_without_a_budget_it_is_the_windows_own(self, rows: dict[str, Tensor]) -> None:
        windows = HybridConfig(window=12, sinks=2, feature_map=None)
        found = allocate(donor(), rows, HYBRID.model_copy(update={"window": 12}), SETTINGS)
        assert found.budget == state_bytes(hybridize(donor(), windows))

    def test_a_layer_that_sees_nothing_far_gets_the_smallest_window(self, rows: dict[str, Tensor]) -> None:
        model = donor()
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
        found = allocate(model, rows, HYBRID, SETTINGS.model_copy(update={"state_bytes": 1_500}))
        assert found.windows[0] == [2, 2]
        assert found.linear_heads[0] == []
        assert found.divergence["shared"] < found.divergence["even"]

    @pytest.mark.parametrize("credit", [0.0, 0.7])
    def test_never_worse_than_shared_evenly(self, credit: float, rows: dict[str, Tensor]) -> None:
        settings = SETTINGS.model_copy(update={"linear_credit": credit})
        found = allocate(donor(), rows, HYBRID, settings)
        model = hybridize(donor(), HybridConfig(window=4, feature_map=None), check=False)
        own = DonorDivergence(model, rows, batch_size=4).windowed(
            found.windows, sinks=2, heads=found.linear_heads, softmax_share=credit
        )
        assert own == pytest.approx(min(found.divergence.values()))
        assert own <= found.divergence["even"]

    def test_key_heads_are_worth_what_their_query_heads_lack(self) -> None:
        """Two query heads a key head; of the second the branch is taken to restore three quarters."""
        (mixer, *_) = mixers_of(hybridize(donor(), HYBRID))
        worth = [[1.0, 2.0], [4.0, 8.0], [0.5, 0.0], [0.25, 1.0]]
        found = sharing._by_key_head(mixer, worth, (1,), 0.75)
        assert found == [[1.0 + 1.0, 2.0 + 2.0], [0.75, 1.0]]

    def test_what_lies_beyond_a_window_counts_in_part(self) -> None:
        worth, sizes = [4.0, 2.0, 1.0], [4, 8, 16]
        assert [sharing._beyond(worth, sizes, window) for window in (4, 6, 8, 12, 16, 17)] == [
            7.0, 5.0, 3.0, 2.0, 1.0, 0.0,
        ]  # fmt: skip

    def test_heads_are_chosen_by_lookups(self, rows: dict[str, Tensor]) -> None:
        plain = SETTINGS.model_copy(
            update={"state_bytes": 1_800, "linear_share": 0.9, "least_importance": 0.35}
        )
        settings = plain.model_copy(update={"weigh_lookups": True})
        done: list[tuple[int, int]] = []
        found = allocate(donor(), rows, HYBRID, settings, seen=lambda now, total: done.append((now, total)))
        model = hybridize(donor(), HybridConfig(window=4, feature_map=None), check=False)
        even = (found.budget // (2 * 8 * 2) - 4 * HYBRID.sinks) // 4  # of the heads, a token 32 bytes
        expected = DonorDivergence(model, rows, batch_size=4).worth(
            [even], sinks=2, steps=2, weigh_lookups=True
        )
        torch.testing.assert_close(torch.tensor(found.importance, dtype=F64), expected[..., 0])
        bar = 0.35 * float(expected.max())
        chosen = [[head for head, value in enumerate(row) if value >= bar] for row in found.importance]
        assert found.linear_heads == chosen
        assert chosen != allocate(donor(), rows, HYBRID, plain).linear_heads
        assert done[-1][0] == done[-1][1] == 3 * 6 + 3 * 2 + 2

    @pytest.mark.parametrize(("budget", "width"), [(900, 1), (3_000, 4)])
    def test_widths_of_states(self, budget: int, width: int, rows: dict[str, Tensor]) -> None:
        wanted = {"state_bytes": budget, "narrower": True, "least_importance": 0.9}
        widest = HYBRID.model_copy(update={"feature_multiple": 4})
        found = allocate(donor(), rows, widest, SETTINGS.model_copy(update=wanted))
        (layer,) = (index for index, heads in enumerate(found.linear_heads) if heads)
        assert found.hybrid.for_layer(layer).feature_multiple == width
        model = hybridize(donor(), found.hybrid)
        assert mixers_of(model)[layer].config.features(8) == 8 * width
        assert found.state_bytes == state_bytes(model)
        assert budget - 4 * 32 < found.state_bytes <= budget or max(map(max, found.windows)) == 20

    def test_a_dimension_given_in_numbers_is_no_width_to_choose(self, rows: dict[str, Tensor]) -> None:
        given = HYBRID.model_copy(update={"feature_dim": 6})
        plain = allocate(donor(), rows, given, SETTINGS)
        found = allocate(donor(), rows, given, SETTINGS.model_copy(update={"narrower": True}))
        assert found.hybrid == plain.hybrid

    def test_states_elsewhere_are_as_wide_as_was_paid_for(self, rows: dict[str, Tensor]) -> None:
        wanted = {
            "state_bytes": 12_000, "narrower": True, "least_importance": 0.9, "linear_share": 0.03,
            "elsewhere": {"mixing": "competing"},
        }  # fmt: skip
        widest = HYBRID.model_copy(update={"feature_multiple": 4})
        found = allocate(donor(), rows, widest, SETTINGS.model_copy(update=wanted))
        (layer,) = (index for index, heads in enumerate(found.linear_heads) if heads)
        multiples = [found.hybrid.for_layer(index).feature_multiple for index in (layer, 1 - layer)]
        assert multiples == [1, 4]
        assert found.state_bytes == state_bytes(hybridize(donor(), found.hybrid)) <= found.budget

    @pytest.mark.parametrize("weigh_lookups", [False, True])
    def test_rows_too_short_to_look_past_windows(self, weigh_lookups: bool, rows: dict[str, Tensor]) -> None:
        """In float32, where a window as long as the text and full attention differ by rounding."""
        plain = SETTINGS.model_copy(update={"state_bytes": 6_000, "least_importance": 0.3})
        inputs = {"input_ids": rows["input_ids"][:, :12]}
        model = donor().float()
        found = allocate(model, inputs, HYBRID, plain.model_copy(update={"weigh_lookups": weigh_lookups}))
        expected = allocate(model, inputs, HYBRID, plain)
        assert found.linear_heads == expected.linear_heads
        assert found.importance == expected.importance

    def test_moves_make_it_better(self, rows: dict[str, Tensor]) -> None:
        settings = SETTINGS.model_copy(update={"state_bytes": 1_500})
        plain = allocate(donor(), rows, HYBRID, settings)
        done: list[tuple[int, int]] = []
        found = allocate(
            donor(), rows, HYBRID, settings.model_copy(update={"moves": 80}),
            seen=lambda now, total: done.append((now, total)),
        )  # fmt: skip
        assert found.divergence["moved"] < min(plain.divergence.values())
        assert found.state_bytes == plain.state_bytes
        assert done[-1][0] <= done[-1][1] == 3 * 6 + 2 + 81

    @pytest.mark.parametrize("moves", [0, 60])
    def test_fewer_sinks(self, moves: int, rows: dict[str, Tensor]) -> None:
        """A donor without sinks gives their bytes to windows, and all else stays as it was."""
        settings = SETTINGS.model_copy(update={"state_bytes": 1_500, "moves": moves})
        plain = allocate(donor(), rows, HYBRID, settings)
        done: list[tuple[int, int]] = []
        found = allocate(
            donor(), rows, HYBRID, settings.model_copy(update={"fewer_sinks": True}),
            seen=lambda now, total: done.append((now, total)),
        )  # fmt: skip
        assert plain.sinks == [2, 2]
        assert sum(found.sinks) < 4
        assert found.linear_heads == plain.linear_heads
        assert found.state_bytes == plain.state_bytes == state_bytes(hybridize(donor(), found.hybrid))
        shares = ("shared", "even")
        assert [found.divergence[of] for of in shares] == [plain.divergence[of] for of in shares]
        assert found.divergence["fewer_sinks"] < min(found.divergence[of] for of in shares)
        last = found.divergence["moved" if moves else "fewer_sinks"]
        model = hybridize(donor(), HybridConfig(window=4, feature_map=None), check=False)
        measured = DonorDivergence(model, rows, batch_size=4)
        assert measured.windowed(found.windows, sinks=found.sinks) == pytest.approx(last)
        assert [found.hybrid.for_layer(index).sinks for index in (0, 1)] == found.sinks
        assert done[-1][0] <= done[-1][1]

    def test_the_donor_is_as_it_was(self, rows: dict[str, Tensor]) -> None:
        model = donor().train()
        kind, weights = type(model), {n: p.clone() for n, p in model.named_parameters()}
        done: list[tuple[int, int]] = []
        allocate(model, rows, HYBRID, SETTINGS, seen=lambda now, total: done.append((now, total)))
        assert type(model) is kind
        assert model.training
        assert all(p.requires_grad and torch.equal(p, weights[n]) for n, p in model.named_parameters())
        assert done[-1][0] == done[-1][1]
        assert [now for now, _ in done] == sorted(now for now, _ in done)

    @pytest.mark.parametrize(
        ("hybrid", "words"),
        [
            ({"per_layer": {0: {"window": 3}}}, "leave them out"),
            ({"layout": "terraced", "sinks": 0}, "sliding"),
            ({"feature_map": None}, "two branches"),
            ({"mixing": "shared"}, "linear_heads needs mixing"),
        ],
    )
    def test_what_it_cannot_share(self, hybrid: Any, words: str, rows: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match=words):
            allocate(donor(), rows, parse(HybridConfig, {"window": 10, "sinks": 2, **hybrid}))

    def test_layers_without_chosen_heads_get_small_states(self, rows: dict[str, Tensor]) -> None:
        model = donor()
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
        small = {"feature_map": "constant", "feature_dim": 1, "mixing": "calibrated", "gate": "per_token"}
        settings = SETTINGS.model_copy(update={"state_bytes": 1_500})
        plain = allocate(model, rows, HYBRID, settings)
        found = allocate(model, rows, HYBRID, settings.model_copy(update={"elsewhere": small}))
        assert found.linear_heads == plain.linear_heads
        first, second = (found.hybrid.for_layer(index) for index in (0, 1))
        assert (first.feature_map, first.features(8), first.mixing) == ("constant", 1, "calibrated")
        assert first.linear_heads == (0, 1, 2, 3)
        assert (second.feature_map, second.mixing) == ("hedgehog", "convex")
        # 4 states of 1 x (8 + 1) numbers are paid for by windows
        own = [state_bytes(hybridize(donor(), each.hybrid)) for each in (plain, found)]
        assert own == [plain.state_bytes, found.state_bytes]
        assert 1_500 - 32 < found.state_bytes <= 1_500
        # what the test below says, and states of 8 heads
        settings = settings.model_copy(update={"elsewhere": small, "state_bytes": 1_100})
        with pytest.raises(ConfigError, match=f"at least {1_088 + 8 * (8 + 1) * 4:,} bytes"):
            allocate(model, rows, HYBRID, settings)

    @pytest.mark.parametrize(
        ("own", "words"),
        [
            ({"window": 3}, "elsewhere: window cannot be set there"),
            ({"mixing": "shared"}, "linear_heads needs mixing"),
            ({"feature_mpa": "constant"}, "feature_mpa"),
        ],
    )
    def test_small_states_that_cannot_be(self, own: Any, words: str, rows: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match=words):
            allocate(donor(), rows, HYBRID, AllocationConfig(elsewhere=own))

    def test_too_few_bytes(self, rows: dict[str, Tensor]) -> None:
        with pytest.raises(ConfigError, match=r"at least 1,088 bytes .* got 900: raise --state-bytes"):
            allocate(donor(), rows, HYBRID, SETTINGS.model_copy(update={"state_bytes": 900}))


def test_predictions_that_are_too_many_are_made_again(
    rows: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hybridize(donor(), HybridConfig(window=4, feature_map=None), check=False)
    kept = DonorDivergence(model, rows, batch_size=2)
    first = kept.windowed([3, 2], sinks=1)
    assert len(kept.kept) == 2
    monkeypatch.setattr(measuring, "KEPT", 10)
    again = DonorDivergence(model, rows, batch_size=2)
    assert again.windowed([3, 2], sinks=1) == first == kept.windowed([3, 2], sinks=1)
    assert not again.kept
