"""transformers' Trainer, narrowed to what both stages need: save what trains, stop where a loss diverges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from equipoise.config import LOSS, EarlyStopping, RunConfig, Schedule
from equipoise.data.packing import collate
from equipoise.data.sources import DataError
from equipoise.data.streaming import StreamedRows
from equipoise.files import write_atomically
from equipoise.layers.guards import nonfinite_gradients
from equipoise.layers.interface import mixers_of
from equipoise.models.branches import observe
from equipoise.models.storage import CheckpointError, load_tensors
from equipoise.train.continuity import DataPosition, StageClock, UnloggedLoss
from equipoise.train.parallel import share_of_batch
from equipoise.train.probe import BranchProbe
from equipoise.train.rank_trainer import RankTrainer, TrainingDiverged
from equipoise.train.stage_files import (
    SAVING,
    STATE,
    TRAINED,
    StageResult,
    begin_checkpoint,
    checkpoint_at,
    checkpoint_damage,
    commit_checkpoint,
    write_finished,
)
from equipoise.train.stopping import StoppingRule
from equipoise.train.watching import PREFIX, Watcher, mean_nll, untouched


def training_arguments(
    run: RunConfig,
    stage: Schedule,
    directory: Path,
    *,
    seed: int,
    eval_steps: int | None = None,
    chooses: bool = False,
) -> TrainingArguments:
    """Trainer's arguments for a stage; it looks every ``eval_steps``, and may choose its weights by that.

    Raises:
        ConfigError: the batch does not divide among the processes.
    """
    micro, accumulated = share_of_batch(stage, directory.name)
    bf16 = run.precision == "bfloat16" or (
        run.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    evaluation: dict[str, Any] = {}
    if eval_steps is not None:
        evaluation = {
            "eval_strategy": "steps", "eval_steps": eval_steps, "load_best_model_at_end": chooses,
        }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=micro, per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulated, num_train_epochs=stage.epochs,
        max_steps=stage.max_steps or -1, learning_rate=stage.learning_rate, weight_decay=0.0, adam_beta2=0.99,
        max_grad_norm=stage.max_grad_norm, warmup_steps=stage.warmup,
        lr_scheduler_type="constant_with_warmup" if stage.decay == "constant" else stage.decay,
        bf16=bf16, use_cpu=not torch.cuda.is_available(), seed=seed, data_seed=seed,
        remove_unused_columns=False, label_names=["labels"],
        logging_strategy="steps", logging_steps=10, logging_nan_inf_filter=False,
        logging_first_step=True, report_to=[], disable_tqdm=True, save_strategy="steps",
        save_steps=eval_steps if chooses and eval_steps else stage.save_every,
        restore_callback_states_from_checkpoint=True, dataloader_pin_memory=torch.cuda.is_available(),
        run_name=f"{run.name}-{directory.name}",
        **evaluation,
    )  # fmt: skip
    if arguments.n_gpu > 1:  # Trainer would spread one process over them, and multiply the batch
        arguments._n_gpu = 1
    return arguments


class StageTrainer(RankTrainer):
    """What the two stages share.

    Args:
        model: the hybrid; parameters that require gradients train.
        arguments: of transformers.
        rows, held_out: packed rows to train on and to evaluate with.
        callbacks: progress and reporting.
        watchers: what an evaluation looks at; see `equipoise.train.watching`.
        stopping: when to stop; null for never.

    Raises:
        DataError: fewer rows than one step takes.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        rows: Dataset[Any],
        held_out: Dataset[Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        watchers: Sequence[Watcher] = (),
        stopping: EarlyStopping | None = None,
    ) -> None:
        count: int = len(rows)  # pyright: ignore[reportArgumentType]
        self.rows_a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
        self.rows_a_step *= arguments.world_size
        if count < self.rows_a_step:
            raise DataError(
                f"expected at least {self.rows_a_step} rows of training data, one step of {self.stage_name}, "
                f"got {count}. Give more data, or lower {self.stage_name}.batch_size or data.context_length."
            )
        own: list[TrainerCallback] = [StageClock(), UnloggedLoss(), DataPosition()]
        if stopping is not None:
            own.append(StoppingRule(stopping.model_dump(mode="json")))
        super().__init__(
            model=model, args=arguments, data_collator=collate, train_dataset=rows, eval_dataset=held_out,
            callbacks=[*(callbacks or []), *own],
        )  # fmt: skip
        self.watchers = tuple(watchers)
        self.remove_callback(PrinterCallback)
        self._micro_step, self._micro_of = 0, -1
        self._was_over = self._is_resumed = self._is_saving = False
        self.whole: list[int] = []
        """Steps of checkpoints known to be whole: the one resumed from, and those written since."""
        self._best_of_last: int | None = None

    @property
    def seconds(self) -> float:
        """Time spent training so far."""
        clock = self._callback(StageClock)
        assert clock is not None
        return clock.total()

    @property
    def rule(self) -> StoppingRule | None:
        """When to stop."""
        return self._callback(StoppingRule)

    # ---- steps

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        """Whole steps only: what is left of an epoch would make a smaller step, and how small would be up to
        micro_batch_size. Streamed rows are in a seeded order already."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        whole = self._whole_rows(rows)
        if isinstance(rows, StreamedRows):
            return SequentialSampler(range(whole))
        return RandomSampler(rows, num_samples=whole)

    def _whole_rows(self, rows: Any) -> int:
        return len(rows) // self.rows_a_step * self.rows_a_step

    def _data_position(self) -> tuple[DataPosition, StreamedRows] | None:
        """Where streamed rows are noted in checkpoints; None for rows in memory."""
        noted = self._callback(DataPosition)
        rows: object = self.train_dataset
        return (noted, rows) if noted is not None and isinstance(rows, StreamedRows) else None

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

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self._best_of_last = self.state.best_global_step
        self._was_over, self._is_resumed = bool(self.control.should_training_stop), True
        streamed = self._data_position()
        if streamed is not None:
            streamed[0].give(streamed[1])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._was_over:  # resumed from its last checkpoint; Trainer would take one more step
            self.control.should_training_stop = True
            return
        if self._tr_loss.device.type != "mps":  # Trainer adds up in float32 whatever the model is held in
            self._tr_loss = self._tr_loss.double()
        unlogged = self._callback(UnloggedLoss)
        if self._is_resumed and unlogged is not None:  # Trainer begins a new mean where it is resumed
            self._is_resumed = False
            self._tr_loss += unlogged.total
            self._globalstep_last_logged = unlogged.since
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        unlogged = self._callback(UnloggedLoss)
        if unlogged is not None:
            unlogged.total, unlogged.since = self._mean_loss(), self._globalstep_last_logged
        streamed = self._data_position()
        if streamed is not None:
            noted, rows = streamed
            noted.take(rows, self.state.global_step * self.rows_a_step % self._whole_rows(rows))
        directory, state = Path(str(self.args.output_dir)), self.state
        if self.args.should_save:
            begin_checkpoint(directory)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._is_saving = False
        best = state.best_global_step
        if best:  # Trainer noted where it was filled
            state.best_model_checkpoint = str(checkpoint_at(directory, best))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state.save_to_json(str(checkpoint_at(directory / SAVING, state.global_step) / STATE))
            commit_checkpoint(directory, state.global_step, [*self.whole[-1:], self._best_of_last, best])
        self._best_of_last = best
        self.whole.append(state.global_step)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any = None) -> str:
        """Where Trainer writes: checkpoints go where they are filled first."""
        directory = Path(str(self.args.output_dir))
        return str(directory / SAVING if self._is_saving else directory)

    def check_gradients(self) -> None:
        """Stop before clipping spreads a gradient that is not finite over all of them.

        Raises:
            TrainingDiverged: says how many numbers of which parameters.
        """
        found = nonfinite_gradients(self.trained().items())
        if not found:
            return
        first = next(iter(found))
        raise TrainingDiverged(
            f"{self.stage_name}: the gradient is not finite at step {self.state.global_step + 1}: "
            f"{sum(found.values())} elements in {len(found)} parameters, the first {first}; that step was "
            f"not taken. Lower {self.stage_name}.learning_rate (now {self.args.learning_rate:g}) or "
            f"{self.stage_name}.max_grad_norm (now {self.args.max_grad_norm:g})."
        )

    def keep_last_good(self) -> str:
        """Write the weights before the step that diverged as a checkpoint; says so, or why there is none."""
        step = self.state.global_step
        weights = [p for p in self.accelerator.unwrap_model(self.model).parameters() if p.requires_grad]
        if step == 0 or not all(bool(p.isfinite().all()) for p in weights):
            return " No weights of this stage are worth keeping."
        directory = checkpoint_at(Path(str(self.args.output_dir)), step)
        if step not in self.whole:
            self._save_checkpoint(cast(nn.Module, self.model), trial=None)
        return f" The weights of step {step} are in {directory}."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the branches' share and gradient norms to what is logged."""
        if "loss" in logs:
            logs = logs | self.branch_metrics
        # a look without Trainer's own loop has no rate
        logs = {name: value for name, value in logs.items() if value or not name.endswith("_per_second")}
        super().log(logs, start_time)

    def probed(self, model: nn.Module) -> Any:
        """A context that watches the branches of the steps that are logged."""
        return _Probing(self, model)

    # ---- looks: what an evaluation is here

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Look at the held-out rows; training goes on as if nobody had."""
        self.state.epoch = float(self.state.epoch or 0.0)  # before the first step Trainer has a whole 0 there
        with untouched(cast(nn.Module, self.model)):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The loss over all rows where early stopping looks at it, and what watchers see; shared by ranks."""
        output = EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics={}, num_samples=0)
        model: Any = self.accelerator.unwrap_model(self.model)
        model.eval()
        with torch.no_grad():
            if self.rule is not None and self.rule.watched == LOSS:
                held_out: Any = self.eval_dataset
                rows = [held_out[i] for i in range(len(held_out))]
                loss = mean_nll(model, rows, batch_size=int(self.args.eval_batch_size))
                cast(dict[str, float], output.metrics)[PREFIX + LOSS] = loss
            for watcher in self.watchers:
                values = watcher(model, self.state.global_step)
                # undefined values: JSON has no NaN, and plots no place for it
                seen = {PREFIX + name: float(v) for name, v in values.items() if math.isfinite(v)}
                cast(dict[str, float], output.metrics).update(seen)
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """By the stopping rule; a look at which its value is undefined does not count."""
        rule = self.rule
        value = None if rule is None else metrics.get(PREFIX + rule.watched)
        if rule is None or value is None:
            return False
        is_kept = rule.keeps(value)
        if is_kept:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        if rule.strikes:
            self.control.should_training_stop = True
        return is_kept

    # ---- checkpoints: only what trains

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().contiguous() for name, p in self.trained().items()}
        write_atomically(directory / TRAINED, lambda path: save_file(weights, path))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_tensors(Path(resume_from_checkpoint) / TRAINED)
        own = self.trained()
        if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in weights.items()}:
            raise CheckpointError(
                f"{resume_from_checkpoint}: was saved with other settings of {self.stage_name} than those "
                "given now. Go on with the settings the run was started with, or start anew."
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)

    def finish(self, directory: Path) -> StageResult:
        """Leave the trained weights and the result in the stage's directory, for a run killed later."""
        row: Any = self.train_dataset[0]  # pyright: ignore
        steps = self.state.global_step
        result = StageResult(
            steps=steps,
            tokens=steps * self.rows_a_step * len(row["input_ids"]),
            seconds=self.seconds,
            history=self.state.log_history,
            kept_step=None if self.rule is None else self.state.best_global_step,
        )
        if self.args.should_save:
            self._save(str(directory))
            write_finished(directory, result)
        return result

    def restore(self, directory: Path) -> None:
        """Take the weights that `finish` left."""
        self._load_from_checkpoint(str(directory))

    def _load_best_model(self) -> None:
        best = self.state.best_global_step
        if not best:
            return
        place = checkpoint_at(Path(str(self.args.output_dir)), best)
        fault = checkpoint_damage(place)
        if fault is not None:
            raise CheckpointError(
                f"{place}, the best weights of {self.stage_name}, is damaged: {fault}. The same command with "
                "--resume goes on from the last checkpoint before it, or trains the stage again."
            )
        self._load_from_checkpoint(str(place))


class _Probing:
    """Installs a `BranchProbe` for one training step, if that step is logged and nothing else observes."""

    def __init__(self, trainer: StageTrainer, model: nn.Module) -> None:
        self.trainer, self.model = trainer, model
        self.probe: BranchProbe | None = None
        self.context: Any = None

    def __enter__(self) -> None:
        if self.trainer.logs_this_step and mixers_of(self.model):
            self.probe = self.trainer.probe or BranchProbe()  # one for all micro batches of a step
            self.context = observe(self.model, self.probe)
            self.context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.probe is not None:
            self.context.__exit__(*error)
            self.trainer.probe = self.probe
