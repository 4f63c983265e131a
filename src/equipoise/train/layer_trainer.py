"""Stage 1 of one layer alone: `TransferTrainer` on a model of that layer, fed with what the layer gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import TrainingArguments

from equipoise.config import RunConfig
from equipoise.layers.interface import mixers_of
from equipoise.models.layer_running import LayerRunner
from equipoise.train.layer_inputs import InputStore
from equipoise.train.objectives import weighted_sum
from equipoise.train.stage_files import StageResult, write_finished
from equipoise.train.stages import TransferTrainer
from equipoise.train.trainer import training_arguments

NOT_FOR_LAYERS = ("input_ids", "labels")
"""Parts of a micro batch that layers do not see."""


def layer_arguments(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder is called with beside hidden states."""
    return {name: tensor for name, tensor in batch.items() if name not in NOT_FOR_LAYERS}


class MicroBatches(Dataset[dict[str, Tensor]]):
    """Numbers of micro batches in the order of training; what they hold is read when it is needed."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"micro": torch.tensor(index)}


class _OneLayer(nn.Module):
    """Stands in for the decoder: runs its layer on what that gets, up to the attention."""

    def __init__(self, runner: LayerRunner, index: int, inputs: InputStore) -> None:
        super().__init__()
        self.layer = runner.layers[index]
        self._run = (runner, index, inputs)

    def forward(self, micro: Tensor, **_: Any) -> None:
        runner, index, inputs = self._run
        device, number = runner.loader.device, int(micro)
        batch = inputs.batch(number, device)
        hidden = inputs.get(index, number, device)
        runner.run_attention(index, mixers_of(self)[0], hidden, **layer_arguments(batch))


class OneLayerModel(nn.Module):
    """A model of one layer, as `TransferTrainer` knows models."""

    def __init__(self, runner: LayerRunner, index: int, inputs: InputStore) -> None:
        super().__init__()
        self.index = index
        self.decoder = _OneLayer(runner, index, inputs)

    def get_decoder(self) -> nn.Module:
        """What runs."""
        return self.decoder


def _one_device(arguments: TrainingArguments) -> TrainingArguments:
    arguments._n_gpu = min(1, arguments.n_gpu)  # pyright: ignore[reportPrivateUsage]
    return arguments


class LayerTrainer(TransferTrainer):
    """Trains one layer's maps as joint training would: same batches, schedule, clipping and optimiser.

    Args:
        runner: with the layer loaded, and its mixer in place.
        index: of the layer.
        inputs: of that layer, all micro batches.
        run: the recipe.
        directory: of training checkpoints.
        steps: optimiser steps.
        tokens: of one micro batch.
        seed: of the run.
        callbacks: progress and reporting.
    """

    def __init__(
        self, runner: LayerRunner, index: int, inputs: InputStore, run: RunConfig, directory: Path, *,
        steps: int, tokens: int, seed: int, callbacks: list[Any],
    ) -> None:  # fmt: skip
        assert run.transfer is not None
        size = run.transfer.micro_batch_size or run.transfer.batch_size
        repeats = run.transfer.batch_size // size
        stage = run.transfer.model_copy(
            update={"max_steps": steps, "batch_size": repeats, "micro_batch_size": 1}
        )
        model: Any = OneLayerModel(runner, index, inputs)
        super().__init__(
            model, _one_device(training_arguments(run, stage, directory, seed=seed)),
            MicroBatches(steps * repeats), None, callbacks, objective=weighted_sum(run.transfer.objectives),
        )  # fmt: skip
        self.step_tokens = tokens * repeats

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Any:
        return SequentialSampler(MicroBatches(len(self.train_dataset)))  # pyright: ignore

    def finish(self, directory: Path) -> StageResult:
        """As `StageTrainer.finish`; tokens are those of the micro batches."""
        result = StageResult(
            steps=self.state.global_step, tokens=self.state.global_step * self.step_tokens,
            seconds=self.seconds, history=self.state.log_history,
        )  # fmt: skip
        self._save(str(directory))
        write_finished(directory, result)
        return result


class RowOrder:
    """The micro batches of joint training, in its order, without a model.

    Args:
        run: the recipe.
        rows: packed rows.
        seed: of their order.
        directory: where training would write.

    Raises:
        DataError: fewer rows than one step takes.
    """

    def __init__(self, run: RunConfig, rows: Dataset[Any], *, seed: int, directory: Path) -> None:
        assert run.transfer is not None
        nothing: Any = nn.Linear(1, 1)
        arguments = _one_device(training_arguments(run, run.transfer, directory, seed=seed))
        trainer = TransferTrainer(nothing, arguments, rows, objective=weighted_sum(run.transfer.objectives))
        self._loader: Any = trainer.get_train_dataloader()
        self.steps: int = trainer.set_initial_training_values(arguments, self._loader)[-1]
        self.count = self.steps * int(arguments.gradient_accumulation_steps)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        seen, epoch = 0, 0
        while seen < self.count:
            if hasattr(self._loader, "set_epoch"):
                self._loader.set_epoch(epoch)
            for batch in self._loader:
                yield batch
                seen += 1
                if seen == self.count:
                    return
            epoch += 1
