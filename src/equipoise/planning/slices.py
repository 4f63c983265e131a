"""Slices of a donor to time: one or two layers with random weights, made of its configuration alone."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from equipoise.config import HybridConfig, RunConfig
from equipoise.models.surgery import hybridize
from equipoise.train.stages import finetune, transfer

Kind = Literal["converted", "windowed", "local", "softmax"]
"""What a layer runs: a hybrid with a linear branch (or as all others are), one that was given a window only
while others have both, the donor's own window, the donor's softmax."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Stage = Literal["transfer", "finetune"]
STEPS = 3
"""Optimiser steps that are timed, after one that is not; their median counts."""
QUICK = 2.0
"""Seconds: where a whole micro batch takes less than this, it is timed instead of one row."""


def stage_seconds(
    config: Any, run: RunConfig, stage: Stage, kinds: Sequence[Kind], *, rows: int, length: int, device: str
) -> float:
    """Seconds of a stage's optimiser step on one micro batch, extrapolated to all layers.

    A slice of one layer has what all share (embeddings, head, loss); a second layer of each kind says what
    such a layer adds.

    Args:
        config: of the donor.
        run: the recipe.
        stage: which of its stages.
        kinds: what each layer of the whole model is after conversion.
        rows, length: of the micro batch.
        device: to run on.
    """
    # what takes long is converted layers; start with one of those where there are any
    chosen = representatives(kinds, run.hybrid)
    first = next(iter(chosen))

    def measure(indices: list[int], count: int) -> float:
        return slice_seconds(config, run, stage, indices, kinds, rows=count, length=length, device=device)

    count = 1
    base = measure([chosen[first]], 1)
    if rows > 1 and base * rows < QUICK:
        count, base = rows, measure([chosen[first]], rows)
    total = base
    for kind, index in chosen.items():
        more = kinds.count(kind) - (kind == first)
        if more:  # noise must not make a layer's time negative
            total += more * max(0.0, measure([chosen[first], index], count) - base)
    return total * rows / count


def slice_seconds(
    config: Any,
    run: RunConfig,
    stage: Stage,
    indices: Sequence[int],
    kinds: Sequence[Kind],
    *,
    rows: int,
    length: int,
    device: str,
) -> float:
    """Seconds of a step on some of the layers, by the code that trains the whole model."""
    model = make_slice(config, indices, device)
    if run.hybrid is not None:
        hybridize(model, slice_settings(run.hybrid, indices, kinds), check=False)
    settings = _short(run, rows)
    data = RandomRows(rows, length, config.get_text_config(decoder=True).vocab_size)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        if stage == "transfer":
            transfer(model, settings, data, Path(folder), callbacks=[clock])
        else:
            finetune(model, settings, data, None, Path(folder), callbacks=[clock])
    return statistics.median(clock.seconds[1:])


def representatives(kinds: Sequence[Kind], hybrid: HybridConfig | None) -> dict[Kind, int]:
    """A layer of each kind there is: of several the one with the largest window."""

    def window(index: int) -> int:
        return 0 if hybrid is None else hybrid.for_layer(index).window or 0

    found: dict[Kind, int] = {}
    for kind in KINDS:
        indices = [index for index, other in enumerate(kinds) if other == kind]
        if indices:
            found[kind] = max(indices, key=window)
    return found


def slice_settings(hybrid: HybridConfig, indices: Sequence[int], kinds: Sequence[Kind]) -> HybridConfig:
    """The settings of a slice, whose layers are counted anew."""
    converted = tuple(i for i, index in enumerate(indices) if kinds[index] in ("converted", "windowed"))
    own = {i: hybrid.per_layer[indices[i]] for i in converted if indices[i] in hybrid.per_layer}
    return hybrid.model_copy(update={"layers": converted, "per_layer": own})


def make_slice(
    config: Any, indices: Sequence[int], device: str, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model of these layers only, weights random; settings that are lists over layers are cut likewise."""
    cut = copy.deepcopy(config)
    text: Any = cut.get_text_config(decoder=True)
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, [value[index] for index in indices])
    text.num_hidden_layers = len(indices)
    if dtype is None:
        dtype = config.dtype if device != "cpu" and config.dtype is not None else torch.float32
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(cut, dtype=dtype)
    return model


def _short(run: RunConfig, rows: int) -> RunConfig:
    """The recipe for a few steps on one micro batch each, without looks."""
    few: dict[str, Any] = {"max_steps": 1 + STEPS, "batch_size": rows, "micro_batch_size": None}
    none: dict[str, Any] = {"early_stopping": None, "window_sizes": None}
    tuned = run.finetune
    return run.model_copy(
        update={
            "watch": None,
            "report_to": "none",
            "transfer": None if run.transfer is None else run.transfer.model_copy(update=few),
            "finetune": None if tuned is None else tuned.model_copy(update=few | none),
        }
    )


class RandomRows(Dataset[dict[str, Tensor]]):
    """Packed rows of random tokens, one document each; see `equipoise.data.packing.PackedDataset`."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.tokens = torch.randint(
            0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {
            "input_ids": tokens, "labels": tokens, "segment_ids": torch.zeros_like(tokens),
            "position_ids": torch.arange(len(tokens)),
        }  # fmt: skip


class _Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.since = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.since)
