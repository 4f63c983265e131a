"""A conversion in figures before it is run: parameters, memory, tokens, disk and time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from equipoise.config import HybridConfig, RunConfig, Schedule
from equipoise.data.preparing import HELD_OUT_ROWS
from equipoise.data.sources import absolute_source
from equipoise.layers.interface import mixers_of
from equipoise.models.adapters import add_lora
from equipoise.models.allocation import budget_of
from equipoise.models.families import check_family
from equipoise.models.layout import DROPOUTS, LayerReport, reach, report_layers, state_bytes
from equipoise.models.load import load_config
from equipoise.models.surgery import hybridize
from equipoise.planning.costs import ACCELERATORS, StageCost, Target
from equipoise.planning.data_size import DataSize, data_size
from equipoise.planning.memory import LIBRARIES, at_once, weights_of
from equipoise.planning.requirements import Scene, check_target, hidden_bytes, required
from equipoise.planning.simulate import NotSimulatedError
from equipoise.planning.slices import Kind, Stage, stage_seconds
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
        weight_bytes: of weights that a process holds.
        training_bytes: of gradients and the optimiser's state.
        activation_bytes: other tensors of a micro batch at their most, temporary ones too; None where the
            code cannot be followed without values (`equipoise.planning.simulate`).
        memory_bytes: what a process holds at its most in this stage; None likewise.
        step_seconds: of one optimiser step; None where it was not measured.
        seconds: of the stage.
        cost: operations, wire and disk; None like activations.
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
    cost: StageCost | None = None


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
        state_bytes: constant decode state of a sequence; what it may be at most where it is to be allocated.
        is_allocated: whether measurements will share it out between layers and heads. Memory and time are
            planned as if every head had a linear branch, which is more than comes of it.
        device, dtype: what it would run on here, and in.
        available_bytes: memory that is free there now.
        context_length: tokens of a row.
        data: size of the training data.
        stages: in order.
        download_bytes: the donor's weights as they are stored; 0 where they are here.
        output_bytes: of what is saved.
        work_bytes: of training checkpoints and tokenised text while it runs.
        seconds: of all stages; None where one is not known.
        target: where it is to run.
        libraries_bytes: of the memory, what Python and the libraries take; 0 on an accelerator.
        memory: bytes that a process holds at its most in each part of the conversion; empty where unknown.
        memory_bytes: the largest of them; None likewise.
        unmeasured: why nothing was timed; None where it was.
        unknown: why memory and operations are not known; None where they are.
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
    is_allocated: bool
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
    target: Target = field(default_factory=Target)
    libraries_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    unmeasured: str | None = None
    unknown: str | None = None


def plan_conversion(
    donor: str,
    run: RunConfig,
    *,
    probe: bool = True,
    trust_remote_code: bool = False,
    target: Target | None = None,
) -> Plan:
    """Plan a conversion from the donor's config.json; no weight is read or downloaded.

    Args:
        donor: directory with a config.json, or a name on the Hub.
        run: the recipe.
        probe: time slices of one and two layers with random weights, where this machine is the target.
        trust_remote_code: run code that comes with the donor.
        target: ranks, one layer at a time, another accelerator; one process on this machine where None.

    Raises:
        CheckpointError: no configuration.
        ConversionError: a donor or a layer that does not convert.
        DataError: local data that cannot be used.
        ConfigError: a target on which the recipe cannot run.
    """
    target = target or Target()
    check_target(run, target)
    config = load_config(donor, trust_remote_code=trust_remote_code, weights=False)
    check_family(str(config.model_type))
    for name in DROPOUTS:
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    device = target.accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    stored: torch.dtype = config.dtype or torch.bfloat16
    dtype = torch.float32 if device == "cpu" else stored
    weights = weights_of(model, dtype, stored)
    if run.hybrid is not None:
        hybridize(model, run.hybrid, check=False)
    text: Any = config.get_text_config(decoder=True)
    length = min(run.data.context_length, text.max_position_embeddings or run.data.context_length)
    size = _data_size(run, donor)
    held = weights.held(ranks=target.ranks if target.parallel == "fsdp2" else 1, layers=target.stream_layers)
    stages = tuple(_stages(model, run, size.tokens, length, held))
    kinds = _kinds(report_layers(model), run.hybrid)
    scene = Scene(config, run, kinds, length, dtype, device, weights, held, target)
    memory: dict[str, int] = {}
    unknown = None
    try:
        stages, memory = required(stages, scene, size.tokens or 0)
    except NotSimulatedError as error:
        unknown = str(error)
    unmeasured = "not asked for" if not probe else _elsewhere(target)
    if unmeasured is None and stages:
        unmeasured = _too_large(model, dtype, device)
    if unmeasured is None:
        stages = tuple(_timed(stage, config, run, kinds, length, device) for stage in stages)
    mixers = _count(mixers_of(model))
    local = Path(donor).is_dir()
    added = 4 * (mixers + _lora(model))
    times = [stage.seconds for stage in stages]
    return Plan(
        donor=donor, model_type=str(config.model_type), recipe=run.name, parameters=parameters,
        mixer_parameters=mixers, layers=report_layers(model),
        window=None if run.hybrid is None else run.hybrid.window, reach=reach(model),
        state_bytes=_state_bytes(model, run), is_allocated=run.allocation is not None, device=device,
        dtype=str(dtype).removeprefix("torch."),
        available_bytes=available(device), context_length=length, data=size, stages=stages,
        download_bytes=0 if local and any(Path(donor).glob("*.safetensors")) else weights.on_disk,
        output_bytes=added + (parameters * dtype.itemsize if run.checkpoint == "full" else 0),
        work_bytes=_work(stages, size.tokens) + hidden_bytes(stages, scene),
        seconds=None if None in times else math.fsum(t for t in times if t is not None),
        target=target, libraries_bytes=LIBRARIES if device == "cpu" else 0, memory=memory,
        memory_bytes=max(memory.values(), default=None), unmeasured=unmeasured, unknown=unknown,
    )  # fmt: skip


def _state_bytes(model: Any, run: RunConfig) -> int:
    if run.hybrid is None or run.allocation is None:
        return state_bytes(model)
    return budget_of(model, run.hybrid, run.allocation)


def _elsewhere(target: Target) -> str | None:
    """Why the slices are not timed; None where the target is one process on this machine."""
    if target.accelerator is not None:
        return f"an {target.accelerator} is not here"
    if target.stream_layers or target.ranks > 1:
        return "only one process that holds the whole model is timed"
    return None


def available(device: str) -> int:
    """Bytes of memory that are free on the device now; all of it on one that is not here."""
    if device in ACCELERATORS:
        return ACCELERATORS[device].memory
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


def _data_size(run: RunConfig, donor: str) -> DataSize:
    present = [stage for stage in (run.transfer, run.finetune) if stage is not None]
    if not present:
        return DataSize(0, "nothing is trained")
    if all(stage.max_steps is not None for stage in present):
        return DataSize(None, "not needed: every stage has its number of steps")
    source = run.data.source
    return data_size(run.data, donor, local=source == "stdlib" or Path(absolute_source(source)).is_absolute())


def _stages(model: Any, run: RunConfig, tokens: int | None, length: int, held: int) -> list[StagePlan]:
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
                weight_bytes=held + 4 * (_count(mixers_of(model)) + _lora(model)),
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


def _timed(
    stage: StagePlan, config: Any, run: RunConfig, kinds: list[Kind], length: int, device: str
) -> StagePlan:
    settings = run.transfer if stage.name == "transfer" else run.finetune
    assert settings is not None
    rows = at_once(settings)
    name: Stage = "transfer" if stage.name == "transfer" else "finetune"
    seconds = stage_seconds(config, run, name, kinds, rows=rows, length=length, device=device)
    a_step = seconds * (settings.batch_size // rows)
    return replace(stage, step_seconds=a_step, seconds=None if stage.steps is None else stage.steps * a_step)


def _kinds(layers: LayerReport, hybrid: HybridConfig | None) -> list[Kind]:
    """What each layer runs, in order."""
    found: dict[int, Kind] = dict.fromkeys(layers.converted, "converted")
    if hybrid is not None and hybrid.feature_map is not None:
        windowed = (index for index in layers.converted if hybrid.for_layer(index).feature_map is None)
        found |= dict.fromkeys(windowed, "windowed")
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
