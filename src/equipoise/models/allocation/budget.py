"""Choosing windows and linear heads under a byte budget, by measurements on the donor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from equipoise.config import AllocationConfig, ConfigError, HybridConfig
from equipoise.models.allocation.choosing import Costs, Curve, chosen_heads, even_windows, share_windows
from equipoise.models.allocation.measuring import DonorDivergence
from equipoise.models.branches import converted_mixers
from equipoise.models.layout import KV_BYTES, STATE_BYTES
from equipoise.models.surgery import hybridize, revert

STEPS = 6
"""Points of the path along which heads' importance is integrated."""


@dataclass(frozen=True)
class Allocation:
    """What each layer was given, and what that rests on.

    Attributes:
        hybrid: the settings, with ``per_layer`` filled in.
        state_bytes, budget: what the state takes, and what it might.
        layers: indices of the converted layers, in the order of the lists below.
        windows, linear_heads: what each was given.
        importance: nats per token that full softmax restores in each head, a list for each layer.
        curves: divergence from the donor by window of one layer alone, in nats per token.
        divergence: from the donor, in nats per token, of untrained windows ``shared`` by the curves and in
            ``even`` parts; heads that get a linear branch with ``linear_credit`` of full softmax.
    """

    hybrid: HybridConfig
    state_bytes: int
    budget: int
    layers: list[int]
    windows: list[int]
    linear_heads: list[list[int]]
    importance: list[list[float]]
    curves: list[dict[int, float]]
    divergence: dict[str, float] = field(default_factory=dict[str, float])


def allocate(
    model: PreTrainedModel,
    inputs: Mapping[str, Int[Tensor, "B T"]],
    hybrid: HybridConfig,
    settings: AllocationConfig | None = None,
    *,
    batch_size: int = 4,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Allocation:
    """Share the bytes of a state between a donor's layers and heads.

    First the heads: full softmax is blended into windows head by head, and the divergence's gradient along
    the way says what each head restores (`DonorDivergence.head_importance`). The most important ones get a
    linear branch, as many as ``linear_share`` of the bytes pay for. What is left buys windows: each layer's
    loss by window is measured with all other layers in full, and tokens go where those curves fall most.
    Heads with a linear branch count there as if it gave ``linear_credit`` of what full softmax would. Layers
    are not independent, so the result is measured against the same bytes shared evenly, and the better
    of the two is taken.

    Args:
        model: an unconverted donor; unchanged when the call returns.
        inputs: of the model, to measure on, each [B, T]: input_ids, and segment_ids and position_ids where
            rows are packed.
        hybrid: what all layers share: window (the budget where ``settings.state_bytes`` is null), sinks, map.
        settings: the budget and what may be done with it.
        batch_size: rows at a time.
        seen: called with batches done and batches in all.

    Raises:
        ConfigError: a budget too small for any split, or settings that have no linear branch in single heads.
        ConversionError: a donor that cannot be converted.
    """
    settings = settings or AllocationConfig()
    _check(hybrid)
    windows_only = hybrid.model_copy(update={"feature_map": None, "write_gate": "none", "gate": "fixed"})
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    hybridize(model, windows_only, check=False)
    model.eval()
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        return _allocate(model, inputs, hybrid, settings, batch_size, seen)
    finally:
        for parameter, before in frozen:
            parameter.requires_grad_(before)
        revert(model)
        model.train(was_training)


def _check(hybrid: HybridConfig) -> None:
    if hybrid.per_layer or hybrid.linear_heads is not None:
        raise ConfigError("allocation chooses per_layer and linear_heads itself: leave them out.")
    if hybrid.layout != "sliding":
        raise ConfigError("allocation shares sliding windows: set hybrid.layout to sliding.")
    if hybrid.window is None or hybrid.feature_map is None:
        raise ConfigError("allocation shares bytes between two branches, and this hybrid has one.")
    values: dict[str, Any] = {**hybrid.model_dump(), "linear_heads": (0,)}
    HybridConfig(**values)  # refuses what single heads cannot have


def _allocate(
    model: Any,
    inputs: Mapping[str, Tensor],
    hybrid: HybridConfig,
    settings: AllocationConfig,
    batch_size: int,
    seen: Callable[[int, int], None],
) -> Allocation:
    mixers = converted_mixers(model)
    costs = _costs(mixers, hybrid)
    budget = budget_of(model, hybrid, settings)
    floor = costs.windows([settings.smallest_window] * len(mixers))
    if budget < floor + costs.head:
        raise ConfigError(
            f"expected a state of at least {floor + costs.head:,} bytes (windows of "
            f"{settings.smallest_window} + {hybrid.sinks} tokens in {len(mixers)} layers, and one linear "
            f"branch), got {budget:,}: raise --state-bytes, or lower hybrid.feature_multiple."
        )
    sizes = _sizes(settings.smallest_window, inputs["input_ids"].shape[1], budget, costs)
    most = max(1, min(int(settings.linear_share * budget), budget - floor) // costs.head)
    measured = _Measured(model, inputs, hybrid.sinks, settings.linear_credit, batch_size, seen)
    measured.expect(2 * STEPS + len(mixers) * len(sizes) + 2)

    base = [_tokens_left(budget, 0, costs, len(mixers)) // len(mixers)] * len(mixers)
    importance = measured.importance(base)
    heads = chosen_heads(importance, most=most, least_share=settings.least_importance)
    tokens = _tokens_left(budget, sum(map(len, heads)), costs, len(mixers))
    curves = [measured.curve(layer, sizes, heads) for layer in range(len(mixers))]
    shapes = {
        "shared": share_windows(curves, tokens),
        "even": even_windows(len(mixers), tokens),
    }
    divergence = {name: measured.windows(windows, heads) for name, windows in shapes.items()}
    windows = shapes[min(shapes, key=lambda name: divergence[name])]
    indices = [mixer.layer_idx for mixer in mixers]
    return Allocation(
        hybrid=_settings(hybrid, indices, windows, heads),
        state_bytes=costs.windows(windows) + costs.head * sum(map(len, heads)), budget=budget,
        layers=indices, windows=windows, linear_heads=[list(of) for of in heads], importance=importance,
        curves=[dict(curve) for curve in curves], divergence=divergence,
    )  # fmt: skip


def budget_of(model: Any, hybrid: HybridConfig, settings: AllocationConfig) -> int:
    """Bytes of decode state that an allocation may use, for a converted model of these shapes."""
    mixers = converted_mixers(model)
    assert hybrid.window is not None
    return settings.state_bytes or _costs(mixers, hybrid).windows([hybrid.window] * len(mixers))


def _costs(mixers: Sequence[Any], hybrid: HybridConfig) -> Costs:
    token = {2 * mixer.kv_heads * mixer.head_dim * KV_BYTES for mixer in mixers}
    head = {hybrid.feature_multiple * m.head_dim * (m.head_dim + 1) * STATE_BYTES for m in mixers}
    if len(token) > 1 or len(head) > 1:
        raise ConfigError("allocation expects layers whose keys and values are of one size.")
    return Costs(token=token.pop(), head=head.pop(), sinks=hybrid.sinks)


def _tokens_left(budget: int, heads: int, costs: Costs, layers: int) -> int:
    return (budget - heads * costs.head) // costs.token - layers * costs.sinks


def _sizes(smallest: int, length: int, budget: int, costs: Costs) -> list[int]:
    """Windows to measure: doubling from the smallest, to the text's length or what one layer could have."""
    most = min(length, budget // costs.token)
    sizes = [smallest]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


class _Measured:
    """Measurements, and how many of their batches are done."""

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        sinks: int,
        credit: float,
        batch_size: int,
        seen: Callable[[int, int], None],
    ) -> None:
        self.done, self.total, self.seen, self.sinks, self.credit = 0, 0, seen, sinks, credit
        self.donor = DonorDivergence(model, inputs, batch_size=batch_size, tick=self._tick)
        self.layers = len(self.donor.mixers)

    def expect(self, measurements: int) -> None:
        """Say how many measurements will come, a step of importance counting two for its backward pass."""
        self.total = measurements * self.donor.batches

    def _tick(self, weight: int = 1) -> None:
        self.done += weight
        self.seen(min(self.done, self.total), self.total)

    def importance(self, windows: Sequence[int]) -> list[list[float]]:
        found = self.donor.head_importance(windows, sinks=self.sinks, steps=STEPS)
        self._tick(STEPS * self.donor.batches)
        return found.tolist()

    def curve(self, layer: int, sizes: Sequence[int], heads: Sequence[Sequence[int]]) -> Curve:
        def loss(window: int) -> float:
            windows: list[int | None] = [None] * self.layers
            windows[layer] = window
            return self._windowed(windows, heads)

        return {window: loss(window) for window in sizes}

    def windows(self, windows: Sequence[int], heads: Sequence[Sequence[int]]) -> float:
        return self._windowed(windows, heads)

    def _windowed(self, windows: Sequence[int | None], heads: Sequence[Sequence[int]]) -> float:
        return self.donor.windowed(windows, sinks=self.sinks, heads=heads, softmax_share=self.credit)


def _settings(
    hybrid: HybridConfig, layers: Sequence[int], windows: Sequence[int], heads: Sequence[Sequence[int]]
) -> HybridConfig:
    """The settings with each layer's own; the model's are those of the largest window."""
    own: dict[int, dict[str, Any]] = {}
    for index, window, chosen in zip(layers, windows, heads, strict=True):
        none = {"feature_map": None, "gate": "fixed", "write_gate": "none"}
        linear: dict[str, Any] = {"linear_heads": list(chosen)} if chosen else none
        own[index] = {"window": window, **linear}
    values: dict[str, Any] = {**hybrid.model_dump(), "window": max(windows), "per_layer": own}
    return HybridConfig(**values)
