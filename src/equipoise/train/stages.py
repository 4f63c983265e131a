"""The two stages: attention transfer, and LoRA fine-tuning with its schedules."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from equipoise.config import ConfigError, FinetuneConfig, RunConfig, Schedule
from equipoise.data.packing import collate
from equipoise.distributed import from_leader, leader_does, ranks
from equipoise.layers.guards import NumericalGuard, add_sums, guard_results
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.models.adapters import add_lora
from equipoise.models.branches import capture, rivals
from equipoise.models.layout import attention_modules
from equipoise.models.sharding import run_decoder
from equipoise.ops import Branches
from equipoise.train.losses import astray, finetune_loss, is_plain
from equipoise.train.objectives import LayerTarget, Objective, WeightedSum, weighted_sum
from equipoise.train.parallel import share_weights, summed
from equipoise.train.probe import BranchProbe
from equipoise.train.rank_trainer import TrainingDiverged
from equipoise.train.releasing import release_memory
from equipoise.train.schedules import draw_window_dropout, window_dropout_probability, window_size
from equipoise.train.scores import ROWS, fit_scores
from equipoise.train.stage_files import StageResult, clear, finished_result, latest_checkpoint, step_of
from equipoise.train.trainer import StageTrainer, training_arguments
from equipoise.train.watching import Attribution, Watcher

PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "dense", "c_attn", "c_proj",
)  # fmt: skip
"""Names of attention projections in the supported families; LoRA takes those a model has."""


class TransferTrainer(StageTrainer):
    """Stage 1: the donor runs under no_grad, and each layer's loss goes back while the forward pass is in it.

    So one layer's graph is held at a time, and layers cannot influence one another.
    """

    stage_name = "transfer"

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._share: dict[str, float] = {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        losses: list[Tensor] = []
        share, logs = self._share, self.logs_this_step
        guard = NumericalGuard()
        hybrid: Any = self.accelerator.unwrap_model(model)
        hybrid.get_decoder().eval()
        arguments = {k: v for k, v in inputs.items() if k != "labels"}
        far: Tensor | None = None
        if isinstance(self.objective, WeightedSum) and self.objective.is_far:
            with self.accelerator.autocast():
                far = astray(hybrid, arguments)

        def observer(mixer: HybridMixer, seen: LayerInputs, output: Tensor) -> None:
            if mixer.phi_q is None:  # a layer that was given a window only: nothing to learn
                return
            if logs:
                guard(mixer, seen.detach())
            # autocast is for the donor: maps run in float32 in every forward pass, and so must learn in it
            with torch.enable_grad(), torch.autocast(seen.q.device.type, enabled=False):
                loss = self.objective(LayerTarget(mixer, seen.detach(), output.detach(), far))
                self.check_finite(loss.detach(), f"loss of layer {mixer.layer_idx}")
                self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            losses.append(loss.detach())
            if logs:
                _add_share(share, mixer, seen)

        with capture(model, observer), torch.no_grad(), self.accelerator.autocast():
            run_decoder(hybrid, **arguments, use_cache=False)
        if logs:
            add_sums(share, guard.sums)
        return torch.stack(losses).mean() / self.current_gradient_accumulation_steps

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Layer by layer: a layer with large gradients must not slow the others down."""
        self.meet_gradients()
        if self.logs_this_step:
            sums = summed(self._share)
            self.branch_metrics = _transfer_metrics(sums, mixers_of(model)) | guard_results(sums)
            self._share.clear()
        norms: list[Tensor] = []
        self.check_gradients()
        for mixer in mixers_of(model):
            if not any(True for _ in mixer.parameters()):
                continue
            norms.append(nn.utils.clip_grad_norm_(mixer.parameters(), self.args.max_grad_norm))
            self.check_finite(norms[-1], f"gradient norm of layer {mixer.layer_idx}", everywhere=True)
        return torch.stack(norms).square().sum().sqrt()


def _add_share(share: dict[str, float], mixer: HybridMixer, seen: LayerInputs) -> None:
    probe = BranchProbe(guard=None)  # the layer's numbers are looked at before its loss
    probe(mixer, seen.detach(), seen.q.detach())
    for name, value in probe.output.items():
        share[name] = share.get(name, 0.0) + value


def _transfer_metrics(share: dict[str, float], mixers: list[HybridMixer]) -> dict[str, float]:
    """Shares as in stage 2; gradients are those of the parameters: maps (linear) and gate (window)."""

    def norm(parameters: list[nn.Parameter]) -> float:
        squares = [p.grad.float().square().sum().item() for p in parameters if p.grad is not None]
        return sum(squares) ** 0.5

    gates = [p for m in mixers for n, p in m.named_parameters() if n.startswith("gate")]
    maps = [p for m in mixers for n, p in m.named_parameters() if n.startswith("phi")]
    metrics = {"linear_gradient": norm(maps), "window_gradient": norm(gates)}
    window, linear = (share.get(name, 0.0) ** 0.5 for name in ("window", "linear"))
    if window + linear > 0:
        metrics["linear_output_share"] = linear / (window + linear)
    return metrics


class FinetuneTrainer(StageTrainer):
    """Stage 2: next-token loss with the hybrid active; windows may drop out or change size by schedule."""

    stage_name = "finetune"

    def __init__(self, *args: Any, settings: FinetuneConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        micro = self.state.global_step * int(self.args.gradient_accumulation_steps) + self.micro_step()
        first = micro * int(self.args.world_size) + int(self.args.process_index)
        first *= int(self.args.per_device_train_batch_size)
        with self._scheduled(mixers_of(model), len(inputs["input_ids"]), first), self.probed(model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.check_finite(loss, "loss")
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objectives' sum; the next token alone is left to the model, which may fuse it."""
        if is_plain(self.settings.objectives):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = num_items_in_batch
        loss = finetune_loss(model, inputs, self.settings.objectives, count=count)
        # of all ranks' tokens, as Trainer counts them; gradients are averaged over ranks afterwards
        return loss if count is None else loss * int(self.args.world_size)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.meet_gradients()
        self.check_gradients()
        norm = super()._clip_grad_norm(model)
        self.check_finite(torch.as_tensor(norm), "gradient norm", everywhere=True)
        return norm

    @contextmanager
    def _scheduled(self, mixers: list[HybridMixer], batch_size: int, first_sample: int) -> Generator[None]:
        """The mode of each layer for one micro batch, gradient checkpointing's second forward included."""
        step, total = self.state.global_step, self.state.max_steps
        settings, dropout = self.settings, self.settings.window_dropout
        window = None if settings.window_sizes is None else window_size(settings.window_sizes, step, total)
        before, rivalling = [mixer.mode for mixer in mixers], set(rivals(mixers))
        for mixer in mixers:
            branches = Branches()
            if dropout is not None and mixer in rivalling:
                kept = draw_window_dropout(
                    window_dropout_probability(dropout.probabilities, step, total), batch_size=batch_size,
                    heads=mixer.heads, per=dropout.per, seed=int(self.args.seed), step=step,
                    layer=mixer.layer_idx, first_sample=first_sample,
                )  # fmt: skip
                branches = Branches(window=kept, reading=dropout.reading)
            mixer.mode = AttentionMode("hybrid", branches, window=window)
        try:
            yield
        finally:
            for mixer, mode in zip(mixers, before, strict=True):
                mixer.mode = mode

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW; maps may learn at a rate of their own, and gates at another."""
        if self.optimizer is None:
            model: Any = self.model
            rate, slow = self.settings.learning_rate, self.settings.gate_learning_rate
            of_mixers = [p for m in mixers_of(model) for p in m.parameters() if p.requires_grad]
            gates = [p for m in mixers_of(model) for p in m.gate_parameters() if p.requires_grad and slow]
            known, closing = {id(p) for p in of_mixers}, {id(p) for p in gates}
            others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
            groups: list[dict[str, Any]] = [{"params": others, "lr": rate}]
            if maps := [p for p in of_mixers if id(p) not in closing]:
                groups.append({"params": maps, "lr": self.settings.map_learning_rate or rate})
            if gates:
                groups.append({"params": gates, "lr": slow})
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99))
        return self.optimizer


def transfer(
    model: PreTrainedModel,
    run: RunConfig,
    rows: Dataset[Any],
    directory: Path,
    *,
    held_out: Dataset[Any] | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    watchers: Sequence[Watcher] = (),
    resume: bool = False,
) -> StageResult:
    """Stage 1 on packed rows: train the maps (and gates) of a converted model, nothing else.

    Args:
        model: a hybrid; changed in place.
        run: the recipe; its ``transfer`` must be set.
        rows: packed rows (see `equipoise.data.packing`).
        directory: where training checkpoints go.
        held_out: packed rows to look at where the recipe watches; None for not at all.
        seed: of the order of rows.
        callbacks: transformers' callbacks, for progress.
        watchers: what to look at beside the branches; needs a recipe that watches.
        resume: go on from the newest checkpoint in ``directory``, if there is one.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; the model keeps the weights from before that step,
            and checkpoints written before stay.
        DataError: fewer rows than one step takes.
        CheckpointError: the checkpoint to resume from is of other settings.
    """
    assert run.transfer is not None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for mixer in mixers_of(model):
        mixer.requires_grad_(True)
    if run.transfer.fit_scores:
        size = run.transfer.micro_batch_size or run.transfer.batch_size
        first = collate([rows[index] for index in range(min(ROWS, len(rows)))])  # pyright: ignore[reportArgumentType]
        first.pop("labels", None)
        fit_scores(model, first, batch_size=size)
    watchers = _watchers(run, run.transfer, held_out, watchers)
    every = run.watch.every if run.watch is not None and watchers else None
    trainer = TransferTrainer(
        model, training_arguments(run, run.transfer, directory, seed=seed, eval_steps=every), rows, held_out,
        callbacks, watchers=watchers, objective=weighted_sum(run.transfer.objectives),
    )  # fmt: skip
    return run_stage(trainer, model, directory, resume)


def finetune(
    model: PreTrainedModel,
    run: RunConfig,
    rows: Dataset[Any],
    held_out: Dataset[Any] | None,
    directory: Path,
    *,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    watchers: Sequence[Watcher] = (),
    resume: bool = False,
) -> StageResult:
    """Stage 2 on packed rows: LoRA on the attention projections, and the maps where the recipe says so.

    Arguments and errors as in `transfer`; ``held_out`` is what early stopping looks at, too.
    """
    settings = run.finetune
    assert settings is not None
    torch.manual_seed(seed)  # LoRA's own initialisation draws from the global state
    add_lora(model, rank=settings.rank, alpha=settings.alpha, targets=lora_targets(model, settings))
    for mixer in mixers_of(model):
        mixer.requires_grad_(settings.train_maps)
    watchers, stopping = _watchers(run, settings, held_out, watchers), settings.early_stopping
    every = run.watch.every if run.watch is not None and watchers else None
    arguments = training_arguments(
        run, settings, directory, seed=seed, eval_steps=every if stopping is None else stopping.every,
        chooses=stopping is not None,
    )  # fmt: skip
    trainer = FinetuneTrainer(
        model, arguments, rows, held_out, callbacks, watchers=watchers, stopping=stopping, settings=settings
    )
    with recomputing(model) if run.gradient_checkpointing else nullcontext():
        return run_stage(trainer, model, directory, resume)


def _watchers(
    run: RunConfig, stage: Schedule, held_out: Dataset[Any] | None, others: Sequence[Watcher]
) -> list[Watcher]:
    """What a stage looks at: the branches, where there is a hybrid, and what it was given."""
    if run.watch is None or held_out is None:
        return []
    size = stage.micro_batch_size or stage.batch_size
    own = [] if run.hybrid is None else [Attribution(run, held_out, batch_size=size)]
    return [*own, *others]


@contextmanager
def recomputing(model: Any) -> Generator[None]:
    """Activations recomputed in the backward pass; transformers 5.23 renamed the switch."""
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable, disable = (
        getattr(model, f"{'activation' if renamed else 'gradient'}_checkpointing_{verb}")
        for verb in ("enable", "disable")
    )
    enable()
    try:
        yield
    finally:
        disable()


def run_stage(trainer: StageTrainer, model: nn.Module, directory: Path, resume: bool) -> StageResult:
    """Train from the start, from a checkpoint, or not at all where the stage is done; then freeze all."""
    try:
        done = from_leader(finished_result(directory, tell=ranks().is_leader)) if resume else None
        if done is not None:
            trainer.restore(directory)
            return done
        if not resume:
            leader_does(partial(clear, directory))
        checkpoint = from_leader(latest_checkpoint(directory, tell=ranks().is_leader)) if resume else None
        if checkpoint is not None:
            trainer.whole.append(step_of(checkpoint))
        share_weights(list(trainer.trained().values()))
        # a resumed stage has looked at its start already
        trainer.args.eval_on_start = bool(trainer.watchers) and checkpoint is None
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except TrainingDiverged as error:
            kept = trainer.keep_last_good()
            raise TrainingDiverged(f"{error}{kept}") from None
        return trainer.finish(directory)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        model.eval()
        release_memory()


def lora_targets(model: nn.Module, settings: FinetuneConfig) -> tuple[str, ...]:
    """The names LoRA attaches to: those asked for, or the attention projections the model has.

    Raises:
        ConfigError: one that was asked for is the end of no module's name.
    """
    if settings.targets is not None:
        names = [f".{name}" for name, _ in model.named_modules()]
        for target in settings.targets:
            if not any(name.endswith(f".{target}") for name in names):
                raise ConfigError(
                    f"finetune.targets: expected names of modules, for instance q_proj, got {target!r}."
                )
        return settings.targets
    attention = {id(module) for module in attention_modules(model)}
    parents = {name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in attention}
    present = {name for module in attention_modules(model) for name, _ in module.named_children()}
    # GPT-2's MLP has a c_proj too: the name of the attention module tells them apart
    return tuple(
        f"{parent}.{name}" if name == "c_proj" else name
        for parent in sorted(parents)
        for name in PROJECTIONS
        if name in present
    )


__all__ = ["FinetuneTrainer", "StageResult", "TransferTrainer", "finetune", "transfer"]
