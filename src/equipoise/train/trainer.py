"""transformers' Trainer, narrowed to what both stages need: save only what trains, stop on a loss that is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from equipoise.config import RunConfig, Schedule
from equipoise.data.packing import collate
from equipoise.layers.interface import mixers_of
from equipoise.models.branches import observe
from equipoise.models.storage import load_tensors, write_atomically
from equipoise.train.probe import BranchProbe

TRAINED = "trained.safetensors"
"""The trained weights in a training checkpoint."""


class TrainingDiverged(RuntimeError):
    """The loss is not a number any more; the message says where, and what to lower."""


def training_arguments(
    run: RunConfig, stage: Schedule, directory: Path, *, seed: int, eval_steps: int | None = None
) -> TrainingArguments:
    """Trainer's arguments for one stage."""
    micro = stage.micro_batch_size or stage.batch_size
    bf16 = run.precision == "bfloat16" or (
        run.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    evaluation: dict[str, Any] = {}
    if eval_steps is not None:
        evaluation = {
            "eval_strategy": "steps", "eval_steps": eval_steps, "metric_for_best_model": "eval_loss",
            "greater_is_better": False, "load_best_model_at_end": True,
        }  # fmt: skip
    return TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=micro, per_device_eval_batch_size=micro,
        gradient_accumulation_steps=stage.batch_size // micro, num_train_epochs=stage.epochs,
        max_steps=stage.max_steps or -1, learning_rate=stage.learning_rate, weight_decay=0.0, adam_beta2=0.99,
        max_grad_norm=stage.max_grad_norm, warmup_steps=stage.warmup,
        lr_scheduler_type="constant_with_warmup" if stage.decay == "constant" else stage.decay,
        bf16=bf16, use_cpu=not torch.cuda.is_available(), seed=seed, data_seed=seed, remove_unused_columns=False,
        label_names=["labels"], logging_strategy="steps", logging_steps=10, logging_nan_inf_filter=False,
        logging_first_step=True, report_to=[], disable_tqdm=True, save_strategy="steps",
        save_steps=eval_steps or 200, save_total_limit=2, dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True, **evaluation,
    )  # fmt: skip


class StageTrainer(Trainer):
    """What the two stages share.

    Args:
        model: the hybrid; parameters that require gradients train.
        arguments: of transformers.
        rows, held_out: packed rows to train on and to evaluate with.
        callbacks: progress and early stopping.
    """

    stage_name = "training"

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: Dataset[Any],
        held_out: Dataset[Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model=model, args=arguments, data_collator=collate, train_dataset=rows, eval_dataset=held_out,
            callbacks=callbacks,
        )  # fmt: skip
        self.remove_callback(_default_printer())
        self.branch_metrics: dict[str, float] = {}
        self._micro_step, self._micro_of = 0, -1

    # ---- steps

    def micro_step(self) -> int:
        """Which micro batch of the present optimiser step this is; call once a training step."""
        if self._micro_of != self.state.global_step:
            self._micro_step, self._micro_of = -1, self.state.global_step
        self._micro_step += 1
        return self._micro_step

    @property
    def logs_this_step(self) -> bool:
        """Whether the step under way will be logged."""
        step = self.state.global_step + 1
        return step == 1 or step % int(self.args.logging_steps) == 0

    def check_finite(self, loss: Tensor, where: str = "") -> None:
        """Stop before the optimiser takes in a gradient that is not finite.

        Raises:
            TrainingDiverged: names the step, and what to lower.
        """
        if bool(torch.isfinite(loss)):
            return
        raise TrainingDiverged(
            f"{self.stage_name}: the loss{where} is {loss.item()} at step {self.state.global_step + 1}. The weights of "
            f"that step were not used. Lower {self.stage_name}.learning_rate (now {self.args.learning_rate:g}) or "
            f"{self.stage_name}.max_grad_norm (now {self.args.max_grad_norm:g})."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the branches' share and gradient norms to what is logged."""
        if "loss" in logs:
            logs = logs | self.branch_metrics
        super().log(logs, start_time)

    def probed(self, model: nn.Module) -> Any:
        """A context that watches the branches of the steps that are logged."""
        return _Probing(self, model)

    # ---- checkpoints: only what trains

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        weights = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        write_atomically(directory / TRAINED, lambda path: save_file(weights, path))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_tensors(Path(resume_from_checkpoint) / TRAINED)
        own = dict((model or self.model).named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Probing:
    """Installs a `BranchProbe` for one training step, if that step is logged and nothing else observes."""

    def __init__(self, trainer: StageTrainer, model: nn.Module) -> None:
        self.trainer, self.model = trainer, model
        self.probe: BranchProbe | None = None
        self.context: Any = None

    def __enter__(self) -> None:
        if self.trainer.logs_this_step and mixers_of(self.model):
            self.probe = BranchProbe()
            self.context = observe(self.model, self.probe)
            self.context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.probe is not None:
            self.context.__exit__(*error)
            self.trainer.branch_metrics = self.probe.results()


def _default_printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete training checkpoint of a stage; half-written ones are passed over."""
    found = [
        path
        for path in directory.glob("checkpoint-*")
        if (path / TRAINED).is_file() and (path / "trainer_state.json").is_file()
    ]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def steps_of(stage: Schedule, rows: int) -> int:
    """Optimiser steps a stage takes over so many packed rows."""
    return stage.max_steps or max(1, math.ceil(rows // stage.batch_size * stage.epochs))
