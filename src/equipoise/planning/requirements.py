"""The stages of a plan with their memory, operations and bytes to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from equipoise.config import ConfigError, RunConfig, Schedule
from equipoise.planning.costs import Target, averaged_bytes, gathered_bytes, priced, streamed_bytes
from equipoise.planning.memory import Need, Weights, at_once, micro_batch, resident
from equipoise.planning.simulate import Footprint, Phase
from equipoise.planning.slices import Kind
from equipoise.train.convert import rows_at_once

if TYPE_CHECKING:
    from equipoise.planning.plan import StagePlan


@dataclass(frozen=True)
class Scene:
    """What every part of a plan looks at.

    Attributes:
        config: of the donor.
        run: the recipe.
        kinds: what each layer runs after conversion.
        length: tokens of a row.
        dtype: of the donor's weights in memory.
        device: cpu, cuda, or the name of an accelerator.
        weights: of the donor.
        held: bytes of them in a process.
        target: where it runs.
    """

    config: Any
    run: RunConfig
    kinds: Sequence[Kind]
    length: int
    dtype: torch.dtype
    device: str
    weights: Weights
    held: int
    target: Target

    def tensors(self, phase: Phase, rows: int, *, kinds: Sequence[Kind] | None = None) -> Footprint:
        """Of one micro batch; of all layers where ``kinds`` is None."""
        return micro_batch(
            self.config, self.run, phase, self.kinds if kinds is None else kinds, rows=rows,
            length=self.length, dtype=self.dtype,
        )  # fmt: skip

    def settings(self, stage: StagePlan) -> Schedule:
        """The stage's."""
        found = self.run.transfer if stage.name == "transfer" else self.run.finetune
        assert found is not None
        return found


def check_target(run: RunConfig, target: Target) -> None:
    """Make sure that a recipe can run where it is to.

    Raises:
        ConfigError: it cannot; says why.
    """
    if target.stream_layers and run.transfer is None:
        raise ConfigError(
            f"recipe {run.name} has no stage 1, and layers can be streamed in stage 1 only: stage 2's loss "
            "goes through all of them. Shard the model instead (--ranks N --parallel fsdp2)."
        )
    for name, stage in (("transfer", run.transfer), ("finetune", run.finetune)):
        if stage is not None and stage.batch_size % target.ranks:
            raise ConfigError(
                f"{name}.batch_size: expected a multiple of {target.ranks} ranks, got {stage.batch_size}; a "
                f"step's rows are shared out evenly. Give --set {name}.batch_size={target.ranks}, say."
            )


def required(
    stages: Sequence[StagePlan], scene: Scene, tokens: int
) -> tuple[tuple[StagePlan, ...], dict[str, int]]:
    """(the stages with memory and cost, bytes held at most in each part of the conversion).

    Args:
        stages: in order.
        scene: of the plan.
        tokens: of the training data.

    Raises:
        NotSimulatedError: the model's code cannot be followed without values.
    """
    needs: list[Need] = []
    costed: list[StagePlan] = []
    trains = bool(stages)
    if trains and not scene.target.stream_layers:
        # a look at held-out rows holds whole rows of logits, before training and after it
        looked_at = max(1, rows_at_once(scene.run) // scene.target.ranks)
        needs.append(Need("held-out rows", 0, scene.tensors("evaluation", looked_at)))
    for stage in stages:
        rows = at_once(scene.settings(stage), scene.target.ranks)
        phase: Phase = "transfer" if stage.name == "transfer" else "finetune"
        tensors = own = scene.tensors(phase, rows)
        if scene.run.watch is not None and stage.name == "transfer" and not scene.target.stream_layers:
            tensors = _most(own, scene.tensors("evaluation", rows))
        added = stage.weight_bytes - scene.held + stage.training_bytes
        if scene.target.stream_layers:  # one layer's mixer trains at a time
            added //= max(1, sum(kind in ("converted", "windowed") for kind in scene.kinds))
        needs.append(Need(stage.name, added, tensors))
        costed.append(
            replace(stage, activation_bytes=round(tensors.peak_bytes), cost=_cost(stage, scene, own, rows))
        )
    memory = resident(scene.weights, needs, held=scene.held, tokens=tokens, device=_where(scene.device))
    return tuple(replace(stage, memory_bytes=memory[stage.name]) for stage in costed), memory


def _where(device: str) -> str:
    return device if device == "cpu" else "accelerator"


def _most(one: Footprint, other: Footprint) -> Footprint:
    """The larger of each figure: one is done after the other."""
    return Footprint(
        max(one.peak_bytes, other.peak_bytes), max(one.small_bytes, other.small_bytes),
        max(one.large_bytes, other.large_bytes), one.flops,
    )  # fmt: skip


def _cost(stage: StagePlan, scene: Scene, tensors: Footprint, rows: int) -> Any:
    target, settings = scene.target, scene.settings(stage)
    micro_batches = settings.batch_size // rows  # of all ranks
    wire = averaged_bytes(stage.trainable, target.ranks)
    if target.parallel == "fsdp2":
        passes = (1 if stage.name == "transfer" else 2) * max(1, micro_batches // target.ranks)
        wire += gathered_bytes(scene.weights.total, target.ranks, passes=passes)
    disk = 0
    if target.stream_layers and stage.name == "transfer":
        disk = _streamed(stage, scene)
    return priced(tensors.flops * micro_batches, wire, disk, stage.steps, target)


def _streamed(stage: StagePlan, scene: Scene) -> int:
    """Bytes that stage 1 moves to and from the disk: weights once, hidden states of all layers."""
    if stage.tokens is None:
        return 0
    text: Any = scene.config.get_text_config(decoder=True)
    hidden = streamed_bytes(
        rows=stage.tokens // scene.length, length=scene.length, hidden=text.hidden_size,
        layers=len(scene.kinds), itemsize=scene.dtype.itemsize, passes=1.0,
    )  # fmt: skip
    return scene.weights.on_disk + hidden


def hidden_bytes(stages: Sequence[StagePlan], scene: Scene) -> int:
    """Bytes of hidden states that lie on disk at once where layers are streamed: what two layers get."""
    first = next((stage for stage in stages if stage.name == "transfer"), None)
    if not scene.target.stream_layers or first is None or first.tokens is None:
        return 0
    text: Any = scene.config.get_text_config(decoder=True)
    return 2 * first.tokens * int(text.hidden_size) * scene.dtype.itemsize
