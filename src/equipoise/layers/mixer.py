"""The one new module of a converted layer: feature maps, gate, and the mode they run in.

Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.config import ConfigError, HybridConfig
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.layers.gate_scores import gate_scores
from equipoise.layers.inputs import LayerInputs as LayerInputs
from equipoise.layers.rotary import RotaryLayout
from equipoise.layers.value_maps import NarrowValues
from equipoise.layers.write_gates import WriteGate, WriteStrength
from equipoise.ops import MIXING_RULES, AttentionState, Branches, hybrid_attention, window_attention
from equipoise.ops.eviction import Eviction, evicting_attention
from equipoise.ops.head_subset import heads_of, read_by, subset_attention
from equipoise.ops.head_windows import head_windows_attention
from equipoise.ops.mix import SCORED_RULES
from equipoise.ops.types import accumulation_dtype

SINKS_STATE_KEYS = 8
"""Keys that the ``sinks`` ablation leaves: the first eight (arXiv 2510.05901)."""


@dataclass(frozen=True)
class Blend:
    """A weighted sum of attention over windows of several sizes, head by head.

    Attributes:
        windows: J sizes in tokens, None for the donor's own attention.
        weights: of each of them in each head [J, H]; gradients reach them.
    """

    windows: tuple[int | None, ...]
    weights: Float[Tensor, "J H"]


@dataclass(frozen=True)
class AttentionMode:
    """How converted layers attend.

    Attributes:
        kind: ``hybrid``; ``softmax`` (the donor's own attention); ``swa`` (training-free window and sinks);
            ``blend`` (a weighted sum of windows and the donor's attention, for measuring what a head needs);
            ``evicting`` (softmax over a cache that evicts, for scoring whole texts); ``none`` (outputs 0).
        branches: which branches of the hybrid run.
        window, sinks: what ``swa`` sees, or a window size that replaces the configured one in ``hybrid``;
            the sinks of every window of a ``blend``.
        head_windows: of ``swa``, for whole texts: a window for each key/value head instead of ``window``.
        blend: of ``blend``: the windows and their weights.
        eviction: of ``evicting``: budget and rule.

    Raises:
        ValueError: ``evicting`` without an eviction, ``blend`` without a blend.
    """

    kind: Literal["hybrid", "softmax", "swa", "blend", "evicting", "none"] = "hybrid"
    branches: Branches = field(default_factory=Branches)
    window: int | None = None
    sinks: int = 0
    head_windows: tuple[int, ...] | None = None
    blend: Blend | None = None
    eviction: Eviction | None = None

    def __post_init__(self) -> None:
        if self.kind == "evicting" and self.eviction is None:
            raise ValueError("mode 'evicting' needs an eviction: a budget, and what is kept within it.")
        if self.kind == "blend" and self.blend is None:
            raise ValueError("mode 'blend' needs a blend: windows, and their weights in each head.")

    @property
    def of_whole_texts(self) -> bool:
        """Whether the mode measures whole texts, and no cache can be kept in it."""
        return self.kind in ("blend", "evicting") or self.head_windows is not None

    def same_as(self, other: AttentionMode) -> bool:
        """Whether both run the same; `==` cannot say so where branches differ by row."""
        if self is other:
            return True
        ours, theirs = self.branches, other.branches
        return (self.kind, self.window, self.head_windows, self.sinks, self.eviction, ours.reading) == (
            other.kind, other.window, other.head_windows, other.sinks, other.eviction, theirs.reading,
        ) and _same_flag(ours.window, theirs.window) and _same_flag(ours.linear, theirs.linear)  # fmt: skip


def _same_flag(one: bool | Tensor, other: bool | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return one is other


def _window_alone(branches: Branches | None) -> bool:
    """Whether the window runs at weight 1 in every row and head."""
    return (
        branches is not None
        and branches.window is True
        and branches.linear is False
        and branches.reading == "renormalised"
    )


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _for_rows(branches: Branches | None, rows: int) -> Branches | None:
    """The same with flags of [1, H] repeated for every row of the batch."""
    if branches is None:
        return None

    def repeated(flag: bool | Tensor) -> bool | Tensor:
        if isinstance(flag, Tensor) and flag.ndim == 2 and flag.shape[0] == 1:
            return flag.expand(rows, -1)
        return flag

    return Branches(repeated(branches.window), repeated(branches.linear), branches.reading)


Observer = Callable[["HybridMixer", LayerInputs, Tensor], None]
"""Called with a layer's mixer, its inputs and its attention output [B, H, T, E]."""


class HybridMixer(nn.Module):
    """Feature maps and gate of one layer, attached as ``self_attn.hybrid``.

    Args:
        config: what to compute.
        heads, kv_heads, head_dim: H, N, D of the layer.
        layer_idx: index of the layer in the model.
        rotary: how the layer rotates q and k; None where it does not. Kept as `rotary` where maps want it
            undone.

    Raises:
        UnknownNameError: no such feature map or mixing rule.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        layer_idx: int,
        rotary: RotaryLayout | None = None,
    ) -> None:
        super().__init__()
        MIXING_RULES[config.mixing]
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rotary = rotary if config.rotary == "undone" and config.feature_map is not None else None
        self.phi_q: nn.Module | None = None
        self.phi_k: nn.Module | None = None
        self.phi_v: NarrowValues | None = None
        if config.linear_heads is not None and config.linear_heads[-1] >= heads:
            raise ConfigError(
                f"linear_heads: expected heads between 0 and {heads - 1}, got {list(config.linear_heads)}."
            )
        if config.head_windows is not None and len(config.head_windows) != kv_heads:
            raise ConfigError(
                f"head_windows: expected a window for each of {kv_heads} key/value heads, got "
                f"{list(config.head_windows)}."
            )
        if config.feature_map is not None:
            feature_map, features = FEATURE_MAPS[config.feature_map], config.features(head_dim)
            try:
                read_by(self.linear_indices, heads // kv_heads, config.map_heads)
            except ValueError as error:
                raise ConfigError(f"linear_heads: {error}") from None
            self.phi_q = feature_map(self.linear_heads, head_dim, features)
            self.phi_k = feature_map(self.states, head_dim, features).for_keys()
            if config.state_update == "delta" and not feature_map.unit_length:
                fitting = ", ".join(name for name in FEATURE_MAPS if FEATURE_MAPS[name].unit_length)
                raise ConfigError(
                    f"state_update delta: expected a feature map of length 1 ({fitting}), got "
                    f"{config.feature_map}."
                )
            if config.write_gate != "none":
                gated = WriteStrength if config.state_update == "delta" else WriteGate
                self.phi_k = gated(self.phi_k, squares=config.write_gate == "quadratic")
            if (narrow := config.value_size(head_dim)) < head_dim:
                self.phi_v = NarrowValues(self.linear_heads, self.states, head_dim, narrow)
        self.gate_logit = nn.Parameter(torch.empty(heads, 1)) if config.gate != "fixed" else None
        looks = config.gate in ("per_token", "quadratic")
        self.gate_weight = nn.Parameter(torch.empty(heads, head_dim)) if looks else None
        squares = config.gate == "quadratic"
        self.gate_squares = nn.Parameter(torch.empty(heads, head_dim)) if squares else None
        self.mode = AttentionMode()
        self.observer: Observer | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Initialise from a seed and the layer's index, whatever the global random state; nothing on meta."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        generator = torch.Generator().manual_seed(seed * 100_003 + self.layer_idx)
        for phi in (self.phi_q, self.phi_k, self.phi_v):
            if phi is not None:
                phi.reset_parameters(generator)  # pyright: ignore[reportCallIssue]
        if self.gate_logit is not None:
            self.gate_logit.fill_(_logit(self.config.gate_value))
        for weight in (self.gate_weight, self.gate_squares):
            if weight is not None:  # every token starts at its head's weight
                weight.zero_()

    def gate_parameters(self) -> list[nn.Parameter]:
        """Those of a gate that is a weight in (0, 1), which can shut; none where it is fixed, or a score."""
        of = (self.gate_logit, self.gate_weight, self.gate_squares)
        return [p for p in of if p is not None and self.config.mixing not in SCORED_RULES]

    @property
    def has_both(self) -> bool:
        """Whether the layer has a window and a linear branch."""
        return self.config.window is not None and self.config.feature_map is not None

    @property
    def summarises(self) -> bool:
        """Whether the linear branch is a mean of the past, of which queries ask nothing."""
        name = self.config.feature_map
        return name is not None and not FEATURE_MAPS[name].looks_up

    def gate(self, q: Float[Tensor, "B H T D"]) -> float | Tensor:
        """The window's weight: a number, one per head [H, 1], or the sigmoid of b + `gate_scores`.

        For mixing rules that want a score (``competing``, ``calibrated``) it is that, without the sigmoid.
        """
        scored = self.config.mixing in SCORED_RULES
        if self.gate_logit is None:
            return _logit(self.config.gate_value) if scored else self.config.gate_value
        squash = torch.clone if scored else torch.sigmoid
        if self.gate_weight is None:
            return squash(self.gate_logit)
        with torch.autocast(q.device.type, enabled=False):
            q = q.to(torch.promote_types(q.dtype, self.gate_weight.dtype))
            scores = gate_scores(q, self.gate_weight, self.gate_squares)
            return squash(scores + self.gate_logit.to(q.dtype))

    def attend(
        self,
        inputs: LayerInputs,
        *,
        mode: AttentionMode,
        state: AttentionState | None = None,
        keep_state: bool = False,
        reuse_state: bool = True,
    ) -> tuple[Tensor, AttentionState | None]:
        """Attention of this layer in any mode but ``softmax`` [B, H, T, E], and the state if kept.

        With ``reuse_state`` the tensors of ``state`` may be changed where no gradients are recorded.
        """
        reuse_state = reuse_state and not torch.is_grad_enabled()
        if mode.kind == "none":
            q, v = inputs.q, inputs.v
            return q.new_zeros(*q.shape[:3], v.shape[-1]), None
        if mode.kind == "swa":
            seen: dict[str, Any] = {
                "sinks": mode.sinks, "scale": inputs.scale, "softcap": inputs.softcap,
                "key_mask": inputs.key_mask, "segment_ids": inputs.segment_ids, "reuse_state": reuse_state,
                "sink_logits": inputs.sink_logits, "initial_state": state, "output_final_state": keep_state,
            }  # fmt: skip
            if mode.head_windows is not None:
                return head_windows_attention(
                    inputs.q, inputs.k, inputs.v, None, None, windows=mode.head_windows, **seen
                )
            return window_attention(inputs.q, inputs.k, inputs.v, window=mode.window or 0, **seen)
        if mode.kind == "evicting":
            assert mode.eviction is not None
            return evicting_attention(
                inputs.q, inputs.k, inputs.v, mode.eviction, scale=inputs.scale, softcap=inputs.softcap,
                key_mask=inputs.key_mask, segment_ids=inputs.segment_ids, sink_logits=inputs.sink_logits,
            ), None  # fmt: skip
        return self.hybrid(
            inputs, branches=mode.branches, window=mode.window, state=state, keep_state=keep_state,
            reuse_state=reuse_state,
        )  # fmt: skip

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of every query head [H]; empty without a window branch."""
        if self.config.window is None:
            return ()
        windows = self.config.head_windows or (self.config.window,) * self.kv_heads
        return tuple(window for window in windows for _ in range(self.heads // self.kv_heads))

    @property
    def linear_indices(self) -> tuple[int, ...]:
        """The query heads with a linear branch, where the layer has one."""
        return tuple(range(self.heads)) if self.config.linear_heads is None else self.config.linear_heads

    @property
    def linear_heads(self) -> int:
        """How many query heads have a linear branch, where the layer has one."""
        return len(self.linear_indices)

    @property
    def states(self) -> int:
        """How many states the layer's linear branch has: one a linear head, or one for all that share a
        key/value head."""
        return len(read_by(self.linear_indices, self.heads // self.kv_heads, self.config.map_heads))

    def of_linear_heads(self, values: Tensor) -> Tensor:
        """[B, H, ...] of all query heads as [B, h, ...] of those with a linear branch."""
        heads = self.config.linear_heads
        return values if heads is None else values[:, list(heads)]

    def on_all_heads(self, values: Tensor) -> Tensor:
        """The other way; undefined (NaN) for heads without a linear branch."""
        heads = self.config.linear_heads
        if heads is None:
            return values
        whole = values.new_full((values.shape[0], self.heads, *values.shape[2:]), torch.nan)
        whole[:, list(heads)] = values
        return whole

    def linear_inputs(self, inputs: LayerInputs) -> LayerInputs:
        """The same of the heads that have a linear branch."""
        if self.config.linear_heads is None:
            return inputs
        heads = self.config.linear_heads
        q, k, v = heads_of(heads, inputs.q, inputs.k, inputs.v, self.config.map_heads)
        sinks = None if inputs.sink_logits is None else inputs.sink_logits[list(heads)]
        return replace(inputs, q=q, k=k, v=v, sink_logits=sinks)

    def features(self, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        """phi(q) [B, h, T, F] and phi(k) [B, M, T, F] of the linear heads, in the precision of sums."""
        assert self.phi_q is not None
        assert self.phi_k is not None
        seen = self.linear_inputs(inputs).before_rotary()
        dtype = accumulation_dtype(inputs.q.dtype)
        with torch.autocast(inputs.q.device.type, enabled=False):
            return self.phi_q(seen.q.to(dtype)), self.phi_k(seen.k.to(dtype))

    def hybrid(
        self,
        inputs: LayerInputs,
        *,
        branches: Branches | None = None,
        window: int | None = None,
        phi_q: Tensor | nn.Module | None = None,
        phi_k: Tensor | nn.Module | None = None,
        state: AttentionState | None = None,
        keep_state: bool = False,
        reuse_state: bool = False,
    ) -> tuple[Tensor, AttentionState | None]:
        """The hybrid itself; features may be handed in where they are at hand already.

        A flag of ``branches`` that is [1, H] holds for every row, whatever the batch: branches by head.
        """
        config, linear_heads = self.config, self.config.linear_heads
        phi_q = self.phi_q if phi_q is None else phi_q
        phi_k = self.phi_k if phi_k is None else phi_k
        head_windows = config.head_windows if window is None else None
        window = config.window if window is None else window
        seen = inputs.before_rotary()
        common: dict[str, Any] = {
            "gate": self.gate(seen.q), "scale": inputs.scale, "softcap": inputs.softcap,
            "key_mask": inputs.key_mask, "segment_ids": inputs.segment_ids,
            "branches": _for_rows(branches, inputs.q.shape[0]), "sinks": config.sinks,
            # of softmax's denominator: linear attention alone has none that it could join
            "sink_logits": None if window is None else inputs.sink_logits,
            "initial_state": state, "output_final_state": keep_state, "reuse_state": reuse_state,
        }  # fmt: skip
        if state is None and not keep_state and window is not None and _window_alone(branches):
            phi_q = phi_k = linear_heads = common["branches"] = None  # nothing else is computed
        elif inputs.rotation is not None and isinstance(phi_q, nn.Module):
            phi_q, phi_k = self.features(seen)  # operators would map what they get, rotated
        value_maps = None if self.phi_v is None else self.phi_v.maps
        if head_windows is not None:
            return head_windows_attention(
                inputs.q, inputs.k, inputs.v, phi_q, phi_k, windows=head_windows,
                heads=linear_heads or (), map_heads=config.map_heads, mixing=config.mixing,
                update=config.state_update, value_maps=value_maps, **common,
            )  # fmt: skip
        if linear_heads is not None or (config.state_update == "delta" and phi_q is not None):
            assert phi_q is not None
            assert phi_k is not None
            assert window is not None
            return subset_attention(
                inputs.q, inputs.k, inputs.v, phi_q, phi_k, heads=self.linear_indices,
                map_heads=config.map_heads, window=window, mixing=config.mixing, update=config.state_update,
                value_maps=value_maps, layout=config.layout, **common,
            )  # fmt: skip
        return hybrid_attention(
            inputs.q, inputs.k, inputs.v, phi_q, phi_k, window=window, mixing=config.mixing,
            layout=config.layout, overlap=config.overlap, **common,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}, heads={self.heads}, kv_heads={self.kv_heads}, {self.config!r}"
