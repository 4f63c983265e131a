"""Where the linear branch comes near the ends of its numbers, counted on a batch.

Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.ops.mix import EPSILON
from equipoise.ops.types import accumulation_dtype

PREFIX = "guard_"
"""Of these counts in a log."""
MEANINGS: Mapping[str, str] = {
    "features": "features past the largest number of the model's dtype, or not numbers at all",
    "denominators": "queries whose denominator phi(q) . z vanishes: linear attention reads noise or 0",
    "state": "share of the last keys' mass that is rounded away when it is added to z",
}
"""What is counted; all should be 0."""
STATE_LIMIT = 0.01
"""Share of lost mass from which the state counts as saturated; rounding alone loses less."""


@dataclass
class NumericalGuard:
    """Counts over the layers of one batch; to be called with each layer's inputs.

    Attributes:
        sums: features, denominators (see `MEANINGS`); lost, mass: of what the last key of each row would add
            to z, in the dtype z is kept in. Empty where no linear branch was seen.
        layers: the counts of each layer by its index.
    """

    sums: dict[str, float] = field(default_factory=dict[str, float])
    layers: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])

    @torch.no_grad()
    def __call__(self, mixer: HybridMixer, inputs: LayerInputs) -> None:
        # the delta rule has no denominators, and its features are of length 1
        if mixer.phi_q is None or mixer.phi_k is None or mixer.config.state_update == "delta":
            return
        seen, (phi_q, phi_k) = mixer.linear_inputs(inputs), mixer.features(inputs)
        dtype = accumulation_dtype(seen.q.dtype)
        lag = 0 if mixer.config.overlap or mixer.config.window is None else mixer.config.window
        features = features_past(phi_q, seen.q.dtype) + features_past(phi_k, seen.q.dtype)
        vanishing, lost, mass = 0, 0.0, 0.0
        for row in range(phi_q.shape[0]):
            valid = None if seen.key_mask is None else seen.key_mask[row]
            segments = None if seen.segment_ids is None else seen.segment_ids[row]
            for head in range(phi_q.shape[1]):
                keys = phi_k[row, head * phi_k.shape[1] // phi_q.shape[1]]
                keys = keys if valid is None else keys.masked_fill(~valid[:, None], 0)
                denominators, read = denominators_of(phi_q[row, head], keys, segments, lag=lag)
                vanishing += int((denominators & (read if valid is None else read & valid)).sum())
                one = lost_mass(keys, dtype)
                lost, mass = lost + one[0], mass + one[1]
        add_sums(
            self.sums,
            {"features": float(features), "denominators": float(vanishing), "lost": lost, "mass": mass},
        )
        counts = {"features": float(features), "denominators": float(vanishing)}
        self.layers[mixer.layer_idx] = {**counts, "state": lost / mass if mass > 0 else 0.0}

    def results(self) -> dict[str, float]:
        """The counts by the names they have in a log; empty where no linear branch was seen."""
        return guard_results(self.sums)


def add_sums(total: dict[str, float], sums: Mapping[str, float]) -> None:
    """Add values up by name, in place."""
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + value


def guard_results(sums: Mapping[str, float]) -> dict[str, float]:
    """The counts by the names they have in a log, of sums over layers, micro batches and ranks."""
    if "mass" not in sums:
        return {}
    state = sums["lost"] / sums["mass"] if sums["mass"] > 0 else 0.0
    values = {"features": sums["features"], "denominators": sums["denominators"], "state": state}
    return {PREFIX + name: value for name, value in values.items()}


def features_past(features: Tensor, dtype: torch.dtype) -> int:
    """How many features are no numbers, or larger than any of ``dtype``."""
    return int((~(features.abs() <= torch.finfo(dtype).max)).sum())


def denominators_of(
    phi_q: Tensor, phi_k: Tensor, segments: Tensor | None = None, *, lag: int = 0
) -> tuple[Tensor, Tensor]:
    """(vanishing, read): which of T queries' denominators vanish, and which have keys to read at all [T].

    A denominator vanishes where the operators clamp it, or where, of maps that change sign, what is left
    after cancelling is no more than rounding.

    Args:
        phi_q, phi_k: features [T, F] of one head.
        segments: of packed documents [T].
        lag: newest keys that a query's state leaves out.
    """
    length, dtype = phi_q.shape[0], phi_q.dtype
    index = torch.arange(length, device=phi_q.device)
    start = torch.zeros_like(index)
    if segments is not None:
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[1:] = segments[1:] != segments[:-1]
        start = torch.where(begins, index, 0).cummax(0).values
    stop = (index + 1 - lag).clamp_min(0)

    def sums(features: Tensor) -> Tensor:
        total = nn.functional.pad(features.double().cumsum(0), (0, 0, 1, 0))
        return total[stop] - total[torch.minimum(start, stop)]

    denominator = (phi_q.double() * sums(phi_k)).sum(-1)
    scale = (phi_q.double().abs() * sums(phi_k.abs())).sum(-1)
    least = (scale * torch.finfo(dtype).eps).clamp_min(EPSILON)
    return ~(denominator.abs() > least), stop > start


def lost_mass(phi_k: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(lost, all) of what the last of T keys [T, F] adds to z, kept as one number per feature of ``dtype``.

    What is lost is what rounding takes off the sum; where it nears all, z has stopped growing.
    """
    total, last = phi_k[:-1].double().sum(0).to(dtype), phi_k[-1].to(dtype)
    gained = (total + last).double() - total.double()
    return float((last.double() - gained).clamp_min(0).sum()), float(last.double().abs().sum())


def nonfinite_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """Elements of gradients that are not finite, by parameter; empty where all are."""
    found = [(name, p.grad.detach()) for name, p in parameters if p.grad is not None]
    if not found or bool(torch.stack([g.isfinite().all() for _, g in found]).all()):
        return {}
    counts = {name: int((~g.isfinite()).sum()) for name, g in found}
    return {name: count for name, count in counts.items() if count}


def warnings_of(history: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a stage's log says of the counts, in a line each; nothing where all is well."""
    entries, lines = list(history), list[str]()
    for name, meaning in MEANINGS.items():
        seen = [(entry[PREFIX + name], entry.get("step", 0)) for entry in entries if PREFIX + name in entry]
        over = [(value, step) for value, step in seen if value > (STATE_LIMIT if name == "state" else 0)]
        if over:
            value, step = max(over)
            lines.append(
                f"{PREFIX}{name}: in {len(over)} of {len(seen)} logged steps, at most {value:.4g} (step "
                f"{step:.0f}): {meaning}"
            )
    return lines
