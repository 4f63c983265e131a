"""Progress of a conversion by layers: one bar over all layers' steps; a line a layer without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from equipoise.bars import BAR, WIDE, fitted


class LayerProgress(TrainerCallback):
    """Shows which layer trains, its loss, and how long all of them will take.

    Args:
        console: where to write.
        label: what the run is called.
        layers: converted ones.
        finished: says how many of them are trained, other processes' included.
    """

    def __init__(self, console: Console, label: str, layers: int, finished: Callable[[], int]) -> None:
        self.console, self.label, self.layers, self.finished = console, label, layers, finished
        self.started, self.at_start = time.monotonic(), finished()
        self.layer, self.done, self.loss = -1, 0, ""
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.layer = model.index
        self.done, self.loss = self.finished(), ""
        if self.bar is None and self.console.is_terminal:
            drawn = [BarColumn(bar_width=None)] if self.console.width >= WIDE else []
            self.bar = Progress(
                TextColumn("{task.description}", markup=False), *drawn, TimeRemainingColumn(),
                TextColumn("{task.fields[status]}", markup=False), console=self.console, transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task(self.label, total=self.layers * state.max_steps, status="")
            self.bar.start()
        self._draw(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.4g}"

    def _draw(self, state: Any) -> None:
        if self.bar is None or self.task is None:
            return
        room = (
            self.console.width
            - len(self.label)
            - len("0:00:00 ")
            - 2
            - (BAR if self.console.width >= WIDE else 0)
        )
        status = f"{self._words()} step {state.global_step}/{state.max_steps} {self.loss}"
        self.bar.update(
            self.task, completed=self.done * state.max_steps + state.global_step, status=fitted(status, room)
        )

    def _words(self) -> str:
        return f"layer {self.layer}, {self.done}/{self.layers} trained,"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done = self.finished() + 1
        left = self.layers - self.done
        here = max(1, self.done - self.at_start)
        eta = f", eta {(time.monotonic() - self.started) / here * left:.0f}s" if left > 0 else ""
        self.console.print(
            f"{self.label} {self._words()} {state.global_step} steps, {self.loss}{eta}", highlight=False,
            soft_wrap=True,
        )  # fmt: skip

    def close(self) -> None:
        """Take the bar down; safe to call twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
