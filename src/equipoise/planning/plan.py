"""A conversion in figures before it is run: parameters, memory, tokens, disk and time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from equipoise.config import RunConfig, Schedule
from equipoise.data.preparing import HELD_OUT_ROWS
from equipoise.data.sources import absolute_source
from equipoise.layers.interface import mixers_of
from equipoise.models.adapters import add_lora
from equipoise.models.families import check_family
from equipoise.models.layout import DROPOUTS, LayerReport, reach, report_layers, state_bytes
from equipoise.models.load import load_config
from equipoise.models.surgery import hybridize
from equipoise.planning.data_size import DataSize, data_size
from equipoise.planning.slices import Kind, Stage, stage_cost
from equipoise.train.stages import lora_targets

TRAINING = 3 * 4
"""Bytes of a parameter that trains, beside its own: gradient and Adam's two moments in float32."""
CHECKPOINTS = 2
"""Training checkpoints kept at a time."""
TOKEN = 4
"""Bytes of a token in the cache of tokenised text."""
STAGES: tuple[Stage, ...] = ("transfer", "finetune")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage.

    Attributes:
        name: transfer or finetune.
        steps, tokens: optimiser steps and the tokens they see; None where the data's size is not known.
        at_most: early stopping may end it sooner.
        trainable: parameters that train.
        weight_bytes: of all weights in memory.
        training_bytes: of gradients and the optimiser's state.
        activation_bytes: held for the backward pass at once; None where it was not measured.
        memory_bytes: the sum; None likewise. Temporary buffers and the libraries come on top.
        step_seconds: of one optimiser step; None where it was not measured.
        seconds: of the stage.
    """

    name: str
    steps: int | None
    tokens: int | None
    at_most: bool
    trainable: int
    weight_bytes: int
    training_bytes: int
    activation_bytes: int | None = None
    memory_bytes: int | None = None
    step_seconds: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion, as far as it is known before any weight is read.

    Attributes:
        donor, model_type, recipe: what is converted, and how.
        parameters: of the donor.
        mixer_parameters: feature maps and gates, which conversion adds.
        layers: layer numbers by what they will run.
        window: the recipe's.
        reach: tokens that stacked windows relay information over; None for no limit.
        state_bytes: constant decode state of a sequence.
        device, dtype: what it would run on here, and in.
        available_bytes: memory that is free there now.
        context_length: tokens of a row.
        data: size of the training data.
        stages: in order.
        download_bytes: the donor's weights as they are stored; 0 where they are here.
        output_bytes: of what is saved.
        work_bytes: of training checkpoints and tokenised text while it runs.
        seconds: of all stages; None where one is not known.
        unmeasured: why nothing was timed; None where it was.
    """

    donor: str
    model_type: str
    recipe: str
    parameters: int
    mixer_parameters: int
    layers: LayerReport
    window: int | None
    reach: int | None
    state_bytes: int
    device: str
    dtype: str
    available_bytes: int
    context_length: int
    data: DataSize
    stages: tuple[StagePlan, ...]
    download_bytes: int
    output_bytes: int
    work_bytes: int
    seconds: float | None
    unmeasured: str | None = None


def plan_conversion(
    donor: str, run: RunConfig, *, probe: bool = True, trust_remote_code: bool = False
) -> Plan:
    """Plan a conversion from the donor's config.json; no weight is read or downloaded.

    Args:
        donor: directory with a config.json, or a name on the Hub.
        run: the recipe.
        probe: time a slice of one and two layers with random weights.
        trust_remote_code: run code that comes with the donor.

    Raises:
        CheckpointError: no configuration.
        ConversionError: a donor or a layer that does not convert.
        DataError: local data that cannot be used.
    """
    config = load_config(donor, trust_remote_code=trust_remote_code, weights=False)
    check_family(str(config.model_type))
    for field in DROPOUTS:
        if getattr(config, field, 0):
            setattr(config, field, 0.0)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    if run.hybrid is not None:
        hybridize(model, run.hybrid, check=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype if device == "cuda" and config.dtype is not None else torch.float32
    text: Any = config.get_text_config(decoder=True)
    length = min(run.data.context_length, text.max_position_embeddings or run.data.context_length)
    size = _data_size(run, donor)
    stages = tuple(_stages(model, run, size.tokens, length, parameters * dtype.itemsize))
    unmeasured = None if probe else "not asked for"
    if probe and stages:
        unmeasured = _too_large(model, dtype, device)
    if probe and unmeasured is None:
        kinds = _kinds(report_layers(model))
        stages = tuple(_measured(stage, config, run, kinds, length, device) for stage in stages)
    mixers = _count(mixers_of(model))
    local = Path(donor).is_dir()
    stored = parameters * (config.dtype or torch.bfloat16).itemsize
    added = 4 * (mixers + _lora(model))
    times = [stage.seconds for stage in stages]
    return Plan(
        donor=donor, model_type=str(config.model_type), recipe=run.name, parameters=parameters,
        mixer_parameters=mixers, layers=report_layers(model),
        window=None if run.hybrid is None else run.hybrid.window, reach=reach(model),
        state_bytes=state_bytes(model), device=device, dtype=str(dtype).removeprefix("torch."),
        available_bytes=available(device), context_length=length, data=size, stages=stages,
        download_bytes=0 if local and any(Path(donor).glob("*.safetensors")) else stored,
        output_bytes=added + (parameters * dtype.itemsize if run.checkpoint == "full" else 0),
        work_bytes=_work(stages, size.tokens),
        seconds=None if None in times else math.fsum(t for t in times if t is not None),
        unmeasured=unmeasured,
    )  # fmt: skip


def available(device: str) -> int:
    """Bytes of memory that are free on the device now."""
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


def _data_size(run: RunConfig, donor: str) -> DataSize:
    present = [stage for stage in (run.transfer, run.finetune) if stage is not None]
    if not present:
        return DataSize(0, "nothing is trained")
    if all(stage.max_steps is not None for stage in present):
        return DataSize(None, "not needed: every stage has its number of steps")
    source = run.data.source
    return data_size(run.data, donor, local=source == "stdlib" or Path(absolute_source(source)).is_absolute())


def _stages(
    model: Any, run: RunConfig, tokens: int | None, length: int, weight_bytes: int
) -> list[StagePlan]:
    """Steps and sizes; adapters are added to the model on the way, as training does."""
    stages: list[StagePlan] = []
    rows = None if tokens is None else tokens // length
    stops_early = run.finetune is not None and run.finetune.early_stopping is not None
    if rows is not None and stops_early and not run.data.streaming:
        rows -= min(HELD_OUT_ROWS, max(1, rows // 10))
    for name, settings in (("transfer", run.transfer), ("finetune", run.finetune)):
        if settings is None:
            continue
        trainable = _count(mixers_of(model)) if name == "transfer" or _trains_maps(run) else 0
        if name == "finetune":
            assert run.finetune is not None
            targets = lora_targets(model, run.finetune)
            add_lora(model, rank=run.finetune.rank, alpha=run.finetune.alpha, targets=targets)
            trainable += _lora(model)
        steps = steps_of(settings, rows)
        stages.append(
            StagePlan(
                name=name, steps=steps, trainable=trainable, training_bytes=trainable * TRAINING,
                tokens=None if steps is None else steps * settings.batch_size * length,
                at_most=name == "finetune" and getattr(settings, "early_stopping", None) is not None,
                weight_bytes=weight_bytes + 4 * (_count(mixers_of(model)) + _lora(model)),
            )
        )  # fmt: skip
    return stages


def _trains_maps(run: RunConfig) -> bool:
    return run.finetune is not None and run.finetune.train_maps


def steps_of(stage: Schedule, rows: int | None) -> int | None:
    """Optimiser steps of a stage on so many rows; whole batches only, as training takes them."""
    if stage.max_steps is not None:
        return stage.max_steps
    return None if rows is None else math.ceil(stage.epochs * (rows // stage.batch_size))


def _measured(
    stage: StagePlan, config: Any, run: RunConfig, kinds: list[Kind], length: int, device: str
) -> StagePlan:
    settings = run.transfer if stage.name == "transfer" else run.finetune
    assert settings is not None
    rows = settings.micro_batch_size or settings.batch_size
    name: Stage = "transfer" if stage.name == "transfer" else "finetune"
    cost = stage_cost(config, run, name, kinds, rows=rows, length=length, device=device)
    held = round(cost.saved_bytes)
    a_step = cost.seconds * (settings.batch_size // rows)
    return replace(
        stage, activation_bytes=held, step_seconds=a_step,
        memory_bytes=stage.weight_bytes + stage.training_bytes + held,
        seconds=None if stage.steps is None else stage.steps * a_step,
    )  # fmt: skip


def _kinds(layers: LayerReport) -> list[Kind]:
    """What each layer runs, in order."""
    found: dict[int, Kind] = dict.fromkeys(layers.converted, "converted")
    found |= dict.fromkeys(layers.local, "local")
    found |= dict.fromkeys(layers.softmax, "softmax")
    return [found[index] for index in sorted(found)]


def _too_large(model: Any, dtype: torch.dtype, device: str) -> str | None:
    """Why a slice of two layers is not run here; None where its weights fit into half of what is free."""
    layers = list(
        model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h
    )
    whole = sum(p.numel() for p in model.parameters())
    shared = whole - sum(p.numel() for layer in layers for p in layer.parameters())
    needed = (shared + 2 * (whole - shared) // len(layers)) * dtype.itemsize
    free = available(device)
    if needed <= free // 2:
        return None
    return f"two layers and the embeddings take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _work(stages: tuple[StagePlan, ...], tokens: int | None) -> int:
    """Weights and Adam's moments of the larger stage's checkpoints, finished weights, tokenised text."""
    largest = max((stage.trainable for stage in stages), default=0)
    return (CHECKPOINTS * 3 + 1) * 4 * largest + TOKEN * (tokens or 0)


def _count(modules: Any) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _lora(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
