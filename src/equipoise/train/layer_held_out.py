"""Held-out losses of a model larger than memory: donor and hybrid side by side, a layer at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from equipoise.data.packing import collate
from equipoise.models.branches import branches
from equipoise.models.layer_running import LayerRunner
from equipoise.train.layer_inputs import InputStore
from equipoise.train.layer_trainer import layer_arguments

SIDES = ("donor", "result")


@torch.no_grad()
def held_out_losses(
    runner: LayerRunner, rows: Sequence[dict[str, Tensor]], work: Path, *, batch_size: int
) -> dict[str, float]:
    """Mean next-token loss in nats per token of the donor and of the hybrid, whose maps must be installed.

    Goes on where a run that was killed had stopped.

    Args:
        runner: of the converted model.
        rows: packed rows.
        work: folder for hidden states.
        batch_size: rows at a time.

    Raises:
        CheckpointError: weights that cannot be read; names the layer.
    """
    batches = [collate(list(rows[i : i + batch_size])) for i in range(0, len(rows), batch_size)]
    sides = {side: InputStore(work / side) for side in SIDES}
    layers = len(runner.layers)
    start = _reached(sides, layers, len(batches))
    if start is None:
        _embed(runner, sides, batches)
        start = 0
    for layer in range(start, layers):
        with runner.layer_loaded(layer):
            for side, inputs in sides.items():
                for number, batch in enumerate(batches):
                    _push(runner, inputs, layer, number, batch, donor=side == "donor")
        for inputs in sides.values():
            inputs.drop(layer)
    totals = {side: [0.0, 0] for side in SIDES}
    with runner.head_loaded() as loss:
        for side, inputs in sides.items():
            for number, batch in enumerate(batches):
                total, count = loss(inputs.get(layers, number, runner.loader.device), batch["labels"])
                totals[side] = [totals[side][0] + total, totals[side][1] + count]
    shutil.rmtree(work, ignore_errors=True)
    return {side: total / max(1, count) for side, (total, count) in totals.items()}


def _reached(sides: dict[str, InputStore], layers: int, count: int) -> int | None:
    """The highest layer whose inputs are all there."""
    whole = [
        layer for layer in range(layers + 1)
        if all(inputs.has(layer, number) for inputs in sides.values() for number in range(count))
    ]  # fmt: skip
    return whole[-1] if whole else None


def _embed(runner: LayerRunner, sides: dict[str, InputStore], batches: list[dict[str, Tensor]]) -> None:
    with runner.embedding_loaded(torch.cat([batch["input_ids"].flatten() for batch in batches])) as embed:
        for number, batch in enumerate(batches):
            hidden = embed(batch["input_ids"], **_on(runner, batch))
            for inputs in sides.values():
                inputs.put(0, number, hidden)


def _push(
    runner: LayerRunner,
    inputs: InputStore,
    layer: int,
    number: int,
    batch: dict[str, Tensor],
    *,
    donor: bool,
) -> None:
    hidden = inputs.get(layer, number, runner.loader.device)
    with branches(runner.model, "softmax" if donor else "both"):
        inputs.put(layer + 1, number, runner.run_layer(layer, hidden, **_on(runner, batch)))


def _on(runner: LayerRunner, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(runner.loader.device) for name, tensor in layer_arguments(batch).items()}
