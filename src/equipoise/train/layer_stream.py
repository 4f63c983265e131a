"""Stage 1 layer by layer, on models larger than memory, by one process or several that share a folder.

The work is cut into tasks: embed all micro batches; then for each layer *train* its maps on what it gets, and
push that *forward* to the next layer. What a layer gets is the donor's alone, so any process may train any
layer whose inputs are there. A task is claimed by a file lock, and done once its last file is written.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from equipoise.config import ConfigError, RunConfig
from equipoise.files import make_directory, remove_directory, write_text
from equipoise.layers.interface import mixer_of
from equipoise.models.branches import branches
from equipoise.models.layer_running import LayerRunner
from equipoise.models.layout import attention_modules
from equipoise.models.storage import load_tensors
from equipoise.models.surgery import make_mixer
from equipoise.train.layer_inputs import InputStore
from equipoise.train.layer_trainer import LayerTrainer, RowOrder, layer_arguments
from equipoise.train.stage_files import FINISHED, TRAINED, StageResult, finished_result
from equipoise.train.stages import run_stage
from equipoise.train.trainer import training_arguments

POLL = 0.5
"""Seconds between two looks for work that another process may have made possible."""
INPUTS = "inputs"
"""In the work folder: what layers get, locks, and marks of what is done."""


@dataclass(frozen=True)
class Extent:
    """How much there is to do in every layer: optimiser steps, micro batches, and tokens of a micro batch."""

    steps: int
    count: int
    tokens: int


@dataclass(frozen=True)
class Task:
    """One piece of work on one layer."""

    kind: Literal["train", "forward"]
    layer: int

    @property
    def name(self) -> str:
        """Of its lock and mark."""
        return f"{self.kind}-{self.layer:04d}"


class LayerStream:
    """The tasks of one conversion.

    Args:
        model: a converted skeleton.
        runner: of that model.
        run: the recipe; ``hybrid`` and ``transfer`` must be set.
        work: folder for everything on disk, shared by all processes.
        seed: of maps and row order.
        callbacks: of every layer's training.
    """

    def __init__(
        self, model: PreTrainedModel, runner: LayerRunner, run: RunConfig, work: Path, *, seed: int,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:  # fmt: skip
        assert run.hybrid is not None
        assert run.transfer is not None
        self.model, self.runner, self.run, self.work, self.seed = model, runner, run, work, seed
        self.callbacks = list(callbacks)
        self.hybrid = run.hybrid
        self.inputs = InputStore(work / INPUTS)
        self._known: set[Task] = set()
        self._text: Any = model.config.get_text_config(decoder=True)
        self.modules = attention_modules(model)
        mixers = {
            i: mixer for i, module in enumerate(self.modules) if (mixer := mixer_of(module)) is not None
        }
        # a layer that was given a window only has nothing to learn in stage 1
        self.learning = [i for i, mixer in mixers.items() if mixer.phi_q is not None]
        self.idle = [i for i in mixers if i not in self.learning]
        if not self.learning:
            raise ConfigError(
                "hybrid.per_layer leaves no layer with a linear branch: there is nothing to train."
            )
        self.tasks = [
            task for layer in range(self.learning[-1] + 1)
            for task in (Task("train", layer), Task("forward", layer))
            if (layer in self.learning if task.kind == "train" else layer < self.learning[-1])
        ]  # fmt: skip

    def directory(self, layer: int) -> Path:
        """Checkpoints and result of a layer."""
        return self.work / f"layer-{layer:04d}"

    # ---- what is done

    def _mark(self, name: str) -> Path:
        return self.work / INPUTS / "done" / name

    def extent(self) -> Extent | None:
        """How much there is to do; None before the first task is done."""
        place = self._mark("embed")
        return Extent(**json.loads(place.read_text(encoding="utf-8"))) if place.is_file() else None

    def is_done(self, task: Task) -> bool:
        """Whether nobody needs to do it any more; trained weights are held against their hash once."""
        if task not in self.tasks or task in self._known:
            return True
        if task.kind == "train":
            place = self.directory(task.layer)
            done = (place / FINISHED).is_file() and finished_result(place, tell=True) is not None
        else:
            done = self._mark(task.name).is_file()
        if done:
            self._known.add(task)
        return done

    def finished(self) -> list[int]:
        """Converted layers that are trained."""
        return [layer for layer in self.learning if self.is_done(Task("train", layer))]

    # ---- doing it

    def embed(self, rows: Dataset[Any]) -> None:
        """The first task: what the first layer gets of every micro batch, in the order of training.

        Raises:
            DataError: fewer rows than one step takes.
            ConfigError: the disk has not the room.
        """
        if self._mark("embed").is_file() and not self._lacks_inputs():
            return
        order = RowOrder(self.run, rows, seed=self.seed, directory=self.work)
        seen, shape = torch.zeros(0, dtype=torch.long), torch.Size(())
        for micro, batch in enumerate(order):
            shape = batch["input_ids"].shape
            if not micro:
                self._check_room(order.count, shape.numel())
            seen = torch.cat([seen, batch["input_ids"].flatten().cpu()]).unique()
            if not self.inputs.has_batch(micro):
                self.inputs.put_batch(micro, {n: t for n, t in batch.items() if n != "labels"})
        device = self.runner.loader.device
        with self.runner.embedding_loaded(seen) as embed, self._precision():
            for micro in range(order.count):
                if not self.inputs.has(0, micro):
                    batch = self.inputs.batch(micro, device)
                    self.inputs.put(0, micro, embed(batch["input_ids"], **layer_arguments(batch)))
        self._note("embed", json.dumps({"steps": order.steps, "count": order.count, "tokens": shape.numel()}))

    def _lacks_inputs(self) -> bool:
        """Whether what a task needs is gone, as of a layer that was damaged; all is made again then."""
        extent = self.extent()
        assert extent is not None
        for task in self.tasks:
            if self.is_done(task) or not self._is_ready(task):
                continue
            layers = (task.layer, task.layer + 1) if task.kind == "forward" else (task.layer,)
            there = all(any(self.inputs.has(i, micro) for i in layers) for micro in range(extent.count))
            if not there and not self.is_done(task):
                remove_directory(self.work / INPUTS / "done")
                self._known = {known for known in self._known if known.kind == "train"}
                return True
        return False

    def work_off(self) -> None:
        """Do tasks, the lowest layer's first, until none is left; waits for those that others do.

        Raises:
            TrainingDiverged, CheckpointError: names the layer; layers that are finished stay finished.
        """
        while self._mark("embed").is_file():
            pending = [task for task in self.tasks if not self.is_done(task)]
            if not pending:
                return
            if not any(self._is_ready(task) and self._attempt(task) for task in pending):
                time.sleep(POLL)

    def _is_ready(self, task: Task) -> bool:
        return task.layer == 0 or self.is_done(Task("forward", task.layer - 1))

    def _attempt(self, task: Task) -> bool:
        """Do a task unless another process does."""
        place = self.work / INPUTS / "locks" / f"{task.name}.lock"
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        try:
            if not self.is_done(task):
                self._train(task.layer) if task.kind == "train" else self._forward(task.layer)
        finally:
            lock.release()
        if self.is_done(Task("train", task.layer)) and self.is_done(Task("forward", task.layer)):
            self.inputs.drop(task.layer)
        return True

    def _train(self, layer: int) -> None:
        extent, module, directory = self.extent(), self.modules[layer], self.directory(layer)
        assert extent is not None
        untrained = module.hybrid
        with self.runner.layer_loaded(layer):
            module.hybrid = make_mixer(module, self._text, self.hybrid, layer, self.seed)
            module.hybrid.requires_grad_(True)
            try:
                trainer = LayerTrainer(
                    self.runner, layer, self.inputs, self.run, directory, steps=extent.steps,
                    tokens=extent.tokens, seed=self.seed, callbacks=self.callbacks,
                )  # fmt: skip
                one: Any = trainer.model
                run_stage(trainer, one, directory, True)
            finally:
                module.hybrid = untrained
        for checkpoint in directory.glob("checkpoint-*"):
            remove_directory(checkpoint)

    def _forward(self, layer: int) -> None:
        extent, device = self.extent(), self.runner.loader.device
        assert extent is not None
        trained = Task("train", layer)
        with self.runner.layer_loaded(layer), branches(self.model, "softmax"), self._precision():
            for micro in range(extent.count):
                if not self.inputs.has(layer + 1, micro):
                    arguments = layer_arguments(self.inputs.batch(micro, device))
                    hidden = self.inputs.get(layer, micro, device)
                    self.inputs.put(layer + 1, micro, self.runner.run_layer(layer, hidden, **arguments))
                if self.is_done(trained):
                    self.inputs.drop(layer, micro)
        self._note(Task("forward", layer).name, "")

    # ---- what came of it

    def install(self) -> None:
        """Put the maps of all layers into the model, trained where they learn."""
        device, text = self.runner.loader.device, self._text
        for layer in self.idle:
            module = self.modules[layer]
            module.hybrid = make_mixer(module, text, self.hybrid, layer, self.seed, device).requires_grad_(
                False
            )
        for layer in self.learning:
            weights = load_tensors(self.directory(layer) / TRAINED)
            own = {name.partition(".hybrid.")[2]: tensor for name, tensor in weights.items()}
            mixer = self.modules[layer].hybrid
            mixer.load_state_dict(own, assign=True)
            mixer.to(device).requires_grad_(False).eval()

    def results(self) -> dict[int, StageResult]:
        """What the training of each converted layer left."""
        found = {layer: finished_result(self.directory(layer)) for layer in self.learning}
        return {layer: result for layer, result in found.items() if result is not None}

    def _check_room(self, count: int, tokens: int) -> None:
        """Two layers' inputs at most are on disk at once with one process, and each more holds one more."""
        size = count * tokens * int(self._text.hidden_size) * self.model.dtype.itemsize
        there = sum(path.stat().st_size for path in self.inputs.folder(0).glob("*"))
        free = shutil.disk_usage(self.work).free + there
        if size > free:
            raise ConfigError(
                f"{self.work}: what a layer gets of {count * tokens:,} tokens takes {size:,} bytes on disk, "
                f"and {free:,} are free. Choose an --output elsewhere, or train on less (transfer.max_steps, "
                "transfer.epochs, data.max_tokens)."
            )

    def _note(self, name: str, text: str) -> None:
        place = self._mark(name)
        make_directory(place.parent)
        write_text(place, text)

    @contextmanager
    def _precision(self) -> Generator[None]:
        """Autocast as Trainer's, where the recipe trains in bfloat16."""
        assert self.run.transfer is not None
        arguments = training_arguments(self.run, self.run.transfer, self.work, seed=self.seed)
        kind = self.runner.loader.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=bool(arguments.bf16)):
            yield
