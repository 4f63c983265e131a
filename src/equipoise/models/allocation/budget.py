"""Choosing windows and linear heads under a byte budget, by measurements on the donor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from equipoise.config import AllocationConfig, ConfigError, HybridConfig
from equipoise.models.allocation.choosing import (
    Costs,
    curve_of,
    even_windows,
    improved,
    share_windows,
    widest_heads,
    with_fewer_sinks,
)
from equipoise.models.allocation.measured import Measured
from equipoise.models.allocation.measuring import NOTHING
from equipoise.models.branches import converted_mixers
from equipoise.models.layout import KV_BYTES, linear_head_bytes
from equipoise.models.surgery import hybridize, revert

WIDTHS = (1, 2, 4)
"""Of states, in multiples of head_dim."""
LADDER = 16
"""From this window on, sizes are measured between two doublings too."""


@dataclass(frozen=True)
class Allocation:
    """What each head was given, and what that rests on.

    Attributes:
        hybrid: the settings, with ``per_layer`` filled in.
        state_bytes, budget: what the state takes, and what it might.
        layers: indices of the converted layers, in the order of the lists below.
        windows: by layer, of each key/value head.
        sinks: by layer.
        linear_heads: by layer, the query heads that have a linear branch.
        importance: nats per token that what lies beyond even windows restores, by layer and query head; a
            weighted mean over tokens with ``weigh_lookups``.
        sizes: windows that were measured.
        worth: nats per token that each widening from one size to the next restores, the last one to
            full softmax; by layer and query head.
        divergence: from the donor, in nats per token, of untrained windows ``shared`` by worth, in ``even``
            parts, the better of these with ``fewer_sinks``, and that ``moved``; heads that get a linear
            branch with ``linear_credit`` of full softmax.
    """

    hybrid: HybridConfig
    state_bytes: int
    budget: int
    layers: list[int]
    windows: list[list[int]]
    linear_heads: list[list[int]]
    importance: list[list[float]]
    sizes: list[int]
    worth: list[list[list[float]]]
    divergence: dict[str, float] = field(default_factory=dict[str, float])
    sinks: list[int] = field(default_factory=list[int])


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

    Every head goes from the smallest window to full softmax by widenings, and the divergence's gradient along
    the way says what each of them restores (`DonorDivergence.worth`). The heads where most is restored beyond
    even windows get a linear branch, as many and as wide as ``linear_share`` of the bytes pay for. What is
    left buys windows, a token at a time where most is restored; in heads with a linear branch only the share
    counts that it is not credited with. Heads are not independent, so the result is measured against the same
    bytes shared evenly, and the better of the two is taken; ``fewer_sinks`` and ``moves`` improve it further.

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
    if settings.narrower and settings.elsewhere is not None:  # of these layers the width is not chosen
        small = {"feature_multiple": hybrid.feature_multiple, **settings.elsewhere}
        settings = settings.model_copy(update={"elsewhere": small})
    elsewhere = None if settings.elsewhere is None else _changed(hybrid, settings.elsewhere)
    windows_only = hybrid.model_copy(update={"feature_map": None, "write_gate": "none", "gate": "fixed"})
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    hybridize(model, windows_only, check=False)
    model.eval()
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        return _allocate(model, inputs, hybrid, elsewhere, settings, batch_size, seen)
    finally:
        for parameter, before in frozen:
            parameter.requires_grad_(before)
        revert(model)
        model.train(was_training)


def _check(hybrid: HybridConfig) -> None:
    if hybrid.per_layer or hybrid.linear_heads is not None or hybrid.head_windows is not None:
        raise ConfigError(
            "allocation chooses per_layer, linear_heads and head_windows itself: leave them out."
        )
    if hybrid.layout != "sliding":
        raise ConfigError("allocation shares sliding windows: set hybrid.layout to sliding.")
    if hybrid.window is None or hybrid.feature_map is None:
        raise ConfigError("allocation shares bytes between two branches, and this hybrid has one.")
    _changed(hybrid, {})


def _changed(hybrid: HybridConfig, own: Mapping[str, Any]) -> HybridConfig:
    """With some settings changed; refuses what single heads cannot have."""
    unknown = own.keys() & {"window", "head_windows", "linear_heads", "layers", "per_layer", "sinks"}
    if unknown:
        raise ConfigError(f"allocation.elsewhere: {', '.join(sorted(unknown))} cannot be set there.")
    values: dict[str, Any] = {**hybrid.model_dump(), **own, "linear_heads": (0,)}
    return HybridConfig(**values)


def _allocate(
    model: Any,
    inputs: Mapping[str, Tensor],
    hybrid: HybridConfig,
    elsewhere: HybridConfig | None,
    settings: AllocationConfig,
    batch_size: int,
    seen: Callable[[int, int], None],
) -> Allocation:
    mixers = converted_mixers(model)
    widths = _widths(hybrid, settings)
    hybrid = hybrid.model_copy(update={"feature_multiple": widths[0]})  # what has to be paid for
    costs, count = _costs(mixers, hybrid, elsewhere), sum(mixer.kv_heads for mixer in mixers)
    sharing = [_sharing(mixer, hybrid) for mixer in mixers]
    means = [0 if elsewhere is None else mixer.heads // _sharing(mixer, elsewhere) for mixer in mixers]
    budget = budget_of(model, hybrid, settings)
    floor = costs.windows([settings.smallest_window] * count) + costs.elsewhere * sum(means)
    if budget < floor + costs.head:
        raise ConfigError(
            f"expected a state of at least {floor + costs.head:,} bytes (windows of "
            f"{settings.smallest_window} + {hybrid.sinks} tokens in {len(mixers)} layers, and one linear "
            f"branch), got {budget:,}: raise --state-bytes, or lower hybrid.feature_multiple."
        )
    measured = Measured(model, inputs, hybrid.sinks, settings, batch_size, seen)
    sizes = _sizes(settings.smallest_window, inputs["input_ids"].shape[1], budget // costs.token)
    worth = measured.worth(sizes)
    even = _tokens_left(budget, costs, count) // count
    importance, states = _importance(measured, worth, sizes, even, sharing, settings.weigh_lookups)
    head_bytes = {
        width: linear_head_bytes(hybrid.model_copy(update={"feature_multiple": width}), mixers[0].head_dim)
        for width in widths
    }
    width, chosen = widest_heads(
        states, head_bytes, min(int(settings.linear_share * budget), budget - floor),
        least_share=settings.least_importance,
    )  # fmt: skip
    hybrid = hybrid.model_copy(update={"feature_multiple": width})
    costs = _costs(mixers, hybrid, elsewhere)
    linear = costs.linear(chosen, means)
    heads = [
        [unit * by + i for unit in of for i in range(by)] for of, by in zip(chosen, sharing, strict=True)
    ]
    tokens = _tokens_left(budget - linear, costs, count)
    curves = [
        curve_of(total, sizes)
        for mixer, row, linear in zip(mixers, worth, heads, strict=True)
        for total in _by_key_head(mixer, row, linear, settings.linear_credit)
    ]
    shapes = {
        "shared": _by_layer(mixers, share_windows(curves, tokens)),
        # longer than the rows cannot be told from as long, and may be more than the donor reads
        "even": _by_layer(mixers, [min(window, sizes[-1]) for window in even_windows(count, tokens)]),
    }
    windows, sinks, divergence = _improved(measured, shapes, heads, settings, longest=sizes[-1])
    own = _by_index(settings, mixers, windows, sinks, heads)
    return Allocation(
        hybrid=_whole(hybrid, windows, own),
        state_bytes=linear + costs.token * sum(
            window + own for of, own in zip(windows, sinks, strict=True) for window in of
        ),
        budget=budget, sinks=sinks, layers=list(own), windows=windows,
        linear_heads=[list(of) for of in heads], importance=importance, sizes=sizes, worth=worth,
        divergence=divergence,
    )  # fmt: skip


def _widths(hybrid: HybridConfig, settings: AllocationConfig) -> list[int]:
    """Of large states, as multiples of head_dim, the narrowest first."""
    narrower = settings.narrower and hybrid.feature_dim is None
    return [of for of in WIDTHS if narrower and of < hybrid.feature_multiple] + [hybrid.feature_multiple]


def _importance(
    measured: Measured,
    worth: Sequence[Sequence[Sequence[float]]],
    sizes: Sequence[int],
    even: int,
    sharing: Sequence[int],
    weigh_lookups: bool,
) -> tuple[list[list[float]], list[list[float]]]:
    """What full attention restores beyond even windows, by layer: of query heads, and of those of a state."""

    def of_states(importance: list[list[float]]) -> list[list[float]]:
        return [_summed(row, by) for row, by in zip(importance, sharing, strict=True)]

    importance = (
        measured.beyond(even)
        if weigh_lookups
        else [[_beyond(values, sizes, even) for values in row] for row in worth]
    )
    if max(map(max, of_states(importance))) <= NOTHING:  # rows too short to look past even windows
        importance = [[sum(values) for values in row] for row in worth]
    return importance, of_states(importance)


def _improved(
    measured: Measured,
    shapes: Mapping[str, list[list[int]]],
    heads: Sequence[Sequence[int]],
    settings: AllocationConfig,
    *,
    longest: int,
) -> tuple[list[list[int]], list[int], dict[str, float]]:
    """Windows and sinks by layer from the best of some shapes on, and the divergences on the way."""
    divergence = {name: measured.windows(windows, heads) for name, windows in shapes.items()}
    windows = shapes[min(shapes, key=lambda name: divergence[name])]
    sinks = [measured.sinks] * len(windows)
    if settings.fewer_sinks:
        windows, sinks = with_fewer_sinks(
            windows, measured.sinks, lambda tried, own: measured.windows(tried, heads, own), longest=longest
        )
        divergence["fewer_sinks"] = measured.windows(windows, heads, sinks)
    if settings.moves:
        mixers = measured.donor.mixers
        flat = improved(
            [window for of in windows for window in of],
            lambda tried: measured.windows(_by_layer(mixers, tried), heads, sinks),
            smallest=settings.smallest_window, longest=longest, measurements=settings.moves,
        )  # fmt: skip
        windows = _by_layer(mixers, flat)
        divergence["moved"] = measured.windows(windows, heads, sinks)
    return windows, sinks, divergence


def budget_of(model: Any, hybrid: HybridConfig, settings: AllocationConfig) -> int:
    """Bytes of decode state that an allocation may use, for a converted model of these shapes."""
    mixers = converted_mixers(model)
    assert hybrid.window is not None
    count = sum(mixer.kv_heads for mixer in mixers)
    return settings.state_bytes or _costs(mixers, hybrid).windows([hybrid.window] * count)


def _costs(mixers: Sequence[Any], hybrid: HybridConfig, elsewhere: HybridConfig | None = None) -> Costs:
    sizes = {mixer.head_dim for mixer in mixers}
    if len(sizes) > 1:
        raise ConfigError("allocation expects layers whose keys and values are of one size.")
    size = sizes.pop()
    others = 0 if elsewhere is None else linear_head_bytes(elsewhere, size)
    return Costs(
        token=2 * size * KV_BYTES, head=linear_head_bytes(hybrid, size), sinks=hybrid.sinks, elsewhere=others
    )


def _sharing(mixer: Any, config: HybridConfig) -> int:
    """Query heads that share a state."""
    return mixer.heads // mixer.kv_heads if config.map_heads == "key_value" else 1


def _summed(values: Sequence[float], by: int) -> list[float]:
    return [sum(values[start : start + by]) for start in range(0, len(values), by)]


def _tokens_left(budget: int, costs: Costs, heads: int) -> int:
    return budget // costs.token - heads * costs.sinks


def _sizes(smallest: int, length: int, tokens: int) -> list[int]:
    """Windows to measure, up to the text or what one head could have: 4, 8, 16, 24, 32, 48, 64, 96, ..."""
    most, sizes = min(length, tokens), [smallest]
    while sizes[-1] < most:
        doubled, last = 2 * sizes[-1], sizes[-1]
        if last >= LADDER:  # halfway there first
            sizes.append(min(3 * last // 2, most))
        if sizes[-1] < most:
            sizes.append(min(doubled, most))
    return sizes


def _beyond(worth: Sequence[float], sizes: Sequence[int], window: int) -> float:
    """Of widenings from a window on, the one around it in part."""
    stops = [*sizes[1:], sizes[-1] + 1]
    return sum(
        value * min(1.0, max(0.0, (stop - window) / (stop - start)))
        for value, start, stop in zip(worth, sizes, stops, strict=True)
    )


def _by_key_head(
    mixer: Any, worth: Sequence[Sequence[float]], linear: Sequence[int], credit: float
) -> list[list[float]]:
    """What widenings restore in the query heads that share a window, less what linear branches will."""
    shared = mixer.heads // mixer.kv_heads
    owed = [[value * (1 - credit * (head in linear)) for value in worth[head]] for head in range(mixer.heads)]
    return [
        [sum(values) for values in zip(*owed[start : start + shared], strict=True)]
        for start in range(0, mixer.heads, shared)
    ]


def _by_layer(mixers: Sequence[Any], windows: Sequence[int]) -> list[list[int]]:
    left = iter(windows)
    return [[next(left) for _ in range(mixer.kv_heads)] for mixer in mixers]


def _by_index(
    settings: AllocationConfig,
    mixers: Sequence[Any],
    windows: Sequence[Sequence[int]],
    sinks: Sequence[int],
    heads: Sequence[Sequence[int]],
) -> dict[int, dict[str, Any]]:
    """Each layer's own settings, by its index in the model."""
    none = {"feature_map": None, "gate": "fixed", "write_gate": "none"}
    own: dict[int, dict[str, Any]] = {}
    for mixer, of, kept, chosen in zip(mixers, windows, sinks, heads, strict=True):
        linear: dict[str, Any] = {"linear_heads": list(chosen)}
        if not chosen:
            all_heads = {"linear_heads": list(range(mixer.heads))}
            linear = none if settings.elsewhere is None else {**settings.elsewhere, **all_heads}
        by_head: dict[str, Any] = {"head_windows": list(of)} if len(set(of)) > 1 else {}
        own[mixer.layer_idx] = {"window": max(of), "sinks": kept, **by_head, **linear}
    return own


def _whole(
    hybrid: HybridConfig, windows: Sequence[Sequence[int]], own: dict[int, dict[str, Any]]
) -> HybridConfig:
    """The settings with each layer's own; the model's are those of the largest window."""
    values: dict[str, Any] = {**hybrid.model_dump(), "window": max(map(max, windows)), "per_layer": own}
    return HybridConfig(**values)
