"""What Trainer leaves to us where several ranks train: gradients, the ends of a run, random states."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from equipoise.distributed import gathered, ranks
from equipoise.layers.guards import NumericalGuard
from equipoise.train.ending import EndWhenAsked
from equipoise.train.parallel import average_gradients, first_told, summed
from equipoise.train.probe import BranchProbe


class TrainingDiverged(RuntimeError):  # noqa: N818 (it tells what happened)
    """A loss or gradient is not a number any more; the message says where, and what to lower."""


Own = TypeVar("Own", bound=TrainerCallback)


class RankTrainer(Trainer):
    """A Trainer that gives what one process gives, whatever the number of ranks; with one it is Trainer."""

    stage_name = "training"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.branch_metrics: dict[str, float] = {}
        self.probe: BranchProbe | None = None
        self._trouble: str | None = None

    def _callback(self, kind: type[Own]) -> Own | None:
        """A callback of our own; Trainer restores those from a checkpoint as other objects."""
        return next((c for c in self.callback_handler.callbacks if isinstance(c, kind)), None)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def create_accelerator_and_postprocess(self) -> None:
        """No DistributedDataParallel around the model: what trains is little, and averaged once a step."""
        super().create_accelerator_and_postprocess()
        if ranks().count > 1:
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def meet_gradients(self) -> None:
        """Average this step's gradients over ranks, which agree here on what else has come up on one of them.

        Raises:
            TrainingDiverged: a loss was not finite, on any rank.
        """
        ending = self._callback(EndWhenAsked)
        asked, troubled = average_gradients(
            list(self.trained().values()),
            [ending is not None and ending.asked, self._trouble is not None],
        )
        if ending is not None:
            ending.agreed = asked
        if troubled:
            raise TrainingDiverged(str(first_told(self._trouble)))
        if self.probe is not None:
            # Trainer multiplies a rank's loss by their number, since gradients are averaged afterwards
            gradient = {n: v / ranks().count ** 2 for n, v in summed(self.probe.gradient).items()}
            guard = NumericalGuard(summed({} if self.probe.guard is None else self.probe.guard.sums))
            self.branch_metrics = BranchProbe(summed(self.probe.output), gradient, guard).results()
            self.probe = None

    def _save_rng_state(self, output_dir: str) -> None:
        """The leader's alone: ranks start from one seed and draw alike, so that their states are the same."""
        if self.args.should_save:
            super()._save_rng_state(output_dir)
            place = Path(output_dir)
            if (place / "rng_state_0.pth").is_file():
                os.replace(place / "rng_state_0.pth", place / "rng_state.pth")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """One state for all ranks, however many the run was started with."""
        if checkpoint is None or ranks().count == 1:
            return super()._load_rng_state(checkpoint)
        with tempfile.TemporaryDirectory() as place:  # where Trainer finds it under this rank's name
            kept = Path(checkpoint).resolve() / "rng_state.pth"
            Path(place, f"rng_state_{self.args.process_index}.pth").symlink_to(kept)
            super()._load_rng_state(place)

    def _mean_loss(self) -> float:
        """Losses added up since the last log, over all ranks."""
        return sum(gathered(float(self._tr_loss))) / ranks().count

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._tr_loss.fill_(self._mean_loss())
        return super()._finalize_training(*args, **kwargs)

    def check_finite(self, value: Tensor, what: str, *, everywhere: bool = False) -> None:
        """Stop before the optimiser takes in a gradient that is not finite.

        What is seen on one rank alone is noted, and ends all of them in `meet_gradients`; ``everywhere``
        marks what all ranks see.

        Raises:
            TrainingDiverged: names the step, and what to lower.
        """
        if bool(torch.isfinite(value)):
            return
        words = (
            f"{self.stage_name}: the {what} is {value.item()} at step {self.state.global_step + 1}; that "
            f"step was not taken. Lower {self.stage_name}.learning_rate (now {self.args.learning_rate:g}) or "
            f"{self.stage_name}.max_grad_norm (now {self.args.max_grad_norm:g})."
        )
        if everywhere or ranks().count == 1:
            raise TrainingDiverged(words)
        self._trouble = self._trouble or words
