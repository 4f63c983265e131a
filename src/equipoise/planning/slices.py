"""Slices of a donor to time: one or two layers with random weights, made of its configuration alone."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from equipoise.config import RunConfig
from equipoise.models.surgery import hybridize
from equipoise.train.stages import finetune, transfer

Kind = Literal["converted", "local", "softmax"]
Stage = Literal["transfer", "finetune"]
STEPS = 3
"""Optimiser steps that are timed, after one that is not; their median counts."""
QUICK = 2.0
"""Seconds: where a whole micro batch takes less than this, it is timed instead of one row."""


@dataclass(frozen=True)
class Cost:
    """Of one optimiser step on one micro batch.

    Attributes:
        seconds: it takes.
        saved_bytes: activations held for the backward pass at once, at their most.
    """

    seconds: float
    saved_bytes: float

    def scaled(self, factor: float) -> Cost:
        """As many times that."""
        return Cost(self.seconds * factor, self.saved_bytes * factor)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.saved_bytes + other.saved_bytes)

    def beyond(self, other: Cost) -> Cost:
        """What it takes more than the other; noise must not make that negative."""
        return Cost(max(0.0, self.seconds - other.seconds), max(0.0, self.saved_bytes - other.saved_bytes))


def stage_cost(
    config: Any, run: RunConfig, stage: Stage, kinds: Sequence[Kind], *, rows: int, length: int, device: str
) -> Cost:
    """Extrapolate one micro batch of a stage to all layers.

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
    chosen = {kind: kinds.index(kind) for kind in ("converted", "local", "softmax") if kind in kinds}
    first = next(iter(chosen))

    def measure(indices: list[int], count: int) -> Cost:
        return slice_cost(config, run, stage, indices, kinds, rows=count, length=length, device=device)

    count = 1
    base = measure([chosen[first]], 1)
    if rows > 1 and base.seconds * rows < QUICK:
        count, base = rows, measure([chosen[first]], rows)
    total = base
    for kind, index in chosen.items():
        more = kinds.count(kind) - (kind == first)
        if more:
            both = measure([chosen[first], index], count)
            total += both.beyond(base).scaled(float(more))
    return total.scaled(rows / count)


def slice_cost(
    config: Any,
    run: RunConfig,
    stage: Stage,
    indices: Sequence[int],
    kinds: Sequence[Kind],
    *,
    rows: int,
    length: int,
    device: str,
) -> Cost:
    """Run a few steps of a stage on some of the layers, by the code that trains the whole model."""
    model = make_slice(config, indices, device)
    if run.hybrid is not None:
        converted = tuple(i for i, index in enumerate(indices) if kinds[index] == "converted")
        hybridize(model, run.hybrid.model_copy(update={"layers": converted}), check=False)
    settings = _short(run, rows)
    data = RandomRows(rows, length, config.get_text_config(decoder=True).vocab_size)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder, SavedBytes(model) as saved:
        if stage == "transfer":
            transfer(model, settings, data, Path(folder), callbacks=[clock])
        else:
            finetune(model, settings, data, None, Path(folder), callbacks=[clock])
    return Cost(statistics.median(clock.seconds[1:]), float(saved.peak))


def make_slice(config: Any, indices: Sequence[int], device: str) -> PreTrainedModel:
    """A model of these layers only, weights random; settings that are lists over layers are cut likewise."""
    cut = copy.deepcopy(config)
    text: Any = cut.get_text_config(decoder=True)
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, [value[index] for index in indices])
    text.num_hidden_layers = len(indices)
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


class SavedBytes:
    """Counts the bytes that autograd holds for backward passes, and the most it held at once (`peak`).

    A storage counts once, however many tensors share it; the model's own weights do not count.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # frozen weights are known by their place, those that train (LoRA comes later) by being leaves
        self._own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self._held: dict[int, int] = {}
        self._now, self.peak = 0, 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)

    def take(self, tensor: Tensor) -> None:
        """One more tensor is held."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._own or (tensor.is_leaf and tensor.requires_grad):
            return
        if place not in self._held:
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
        self._held[place] = self._held.get(place, 0) + 1

    def release(self, tensor: Tensor) -> None:
        """One less."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self._held:
            return
        self._held[place] -= 1
        if not self._held[place]:
            del self._held[place]
            self._now -= storage.nbytes()


class _Held:
    """A saved tensor; dies with the part of the graph that needed it."""

    def __init__(self, counter: SavedBytes, tensor: Tensor) -> None:
        counter.take(tensor)
        # detached: an output that held itself through its own graph would never be freed
        self.counter, self.tensor = counter, tensor.detach()

    def __del__(self) -> None:
        self.counter.release(self.tensor)
