"""Allocation as the first step of a conversion: measured once, noted, and read again by a resumed run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from equipoise.bars import counted
from equipoise.config import HybridConfig, RunConfig
from equipoise.data.packing import collate
from equipoise.distributed import from_leader, leader_does, ranks
from equipoise.files import make_directory, write_text
from equipoise.models.allocation import Allocation, allocate

NEAR = 0.01
"""Nats per token: where windows alone move the donor's predictions by less, little is left to add."""
ALLOCATION = "allocation.json"
"""In the working directory of a run: what was measured and chosen."""


def allocated(
    model: PreTrainedModel,
    run: RunConfig,
    rows: Any,
    work: Path,
    *,
    batch_size: int,
    console: Console,
) -> Allocation:
    """Measure where the bytes of ``run.allocation`` go; on the leader's machine, for all ranks.

    Args:
        model: the unconverted donor.
        run: the recipe; its ``hybrid`` and ``allocation`` must be set.
        rows: packed training rows; the first ones are measured on.
        work: where a run that was killed finds its allocation again.
        batch_size: rows at a time.
        console: where a bar goes.

    Raises:
        ConfigError: a budget or settings that cannot be, see `equipoise.allocate`.
    """
    place = work / ALLOCATION

    def measure() -> None:
        if place.is_file():
            return
        assert run.hybrid is not None
        assert run.allocation is not None
        count = min(run.allocation.rows, len(rows))
        batch = collate([rows[i] for i in range(count)])
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with counted(console) as bars:
            bar = bars.add_task(f"{run.name} allocation", total=None)
            found = allocate(
                model, inputs, run.hybrid, run.allocation, batch_size=batch_size,
                seen=lambda done, total: bars.update(bar, completed=done, total=total),
            )  # fmt: skip
        make_directory(work)
        write_text(place, json.dumps(as_dict(found), indent=2))

    leader_does(measure)
    text = from_leader(place.read_text(encoding="utf-8") if ranks().is_leader else "")
    allocation = from_dict(json.loads(text))
    for line in described(allocation):
        console.print(line, highlight=False, soft_wrap=True)
    return allocation


def as_dict(allocation: Allocation) -> dict[str, Any]:
    """For JSON."""
    return asdict(allocation) | {"hybrid": allocation.hybrid.model_dump(mode="json")}


def from_dict(values: dict[str, Any]) -> Allocation:
    """The other way."""
    known: dict[str, Any] = {**values, "hybrid": HybridConfig(**values["hybrid"])}
    return Allocation(**known)


def described(allocation: Allocation) -> list[str]:
    """What was chosen, for people."""
    lines = [
        f"allocation: {allocation.state_bytes:,} of {allocation.budget:,} bytes; these windows alone, "
        f"untrained: {allocation.divergence['shared']:.4f} nats/token from the donor, in even parts "
        f"{allocation.divergence['even']:.4f}"
    ]
    if min(allocation.divergence.values()) < NEAR:
        lines.append(
            "  note: these rows hardly look past the windows, so there is little that linear branches could "
            "learn from them. Give longer documents as --data, or fewer --state-bytes."
        )
    for index, windows, heads in zip(
        allocation.layers, allocation.windows, allocation.linear_heads, strict=True
    ):
        own = allocation.hybrid.for_layer(index)
        sinks = f" + {own.sinks} sink{'s' * (own.sinks > 1)}" if own.sinks else ""
        linear, size = "", f"{own.feature_multiple} D" if own.feature_dim is None else str(own.feature_dim)
        if heads:
            linear = f", linear attention of {size} features in heads {', '.join(map(str, heads))}"
        elif own.feature_map is not None:
            linear = f", states of {size} feature{'s' * (size != '1')} in all heads"
        sizes = f"window {windows[0]}" if len(set(windows)) == 1 else f"windows {' '.join(map(str, windows))}"
        lines.append(f"  layer {index}: {sizes}{sinks}{linear}")
    return lines
