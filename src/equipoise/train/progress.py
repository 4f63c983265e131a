"""Progress of a stage: bar, ETA, loss, the linear branch's share; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from equipoise.bars import BAR, WIDE, fitted
from equipoise.layers.guards import warnings_of

LINES = 10
"""About how many lines a stage prints where there is no terminal to draw on."""


class ProgressReport(TrainerCallback):
    """Show one stage as it trains.

    Args:
        console: where to write.
        label: what the stage is called.
    """

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, label
        self.started, self.first = time.monotonic(), 0
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.status, self.seen = "", ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if not self.console.is_terminal:
            return
        drawn = [BarColumn(bar_width=None)] if self.console.width >= WIDE else []
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), *drawn, MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[status]}", markup=False), console=self.console,
            transient=True,
        )  # fmt: skip
        done, label = state.global_step, fitted(self.label, self._room(state.max_steps, ""))
        self.task = self.bar.add_task(label, total=state.max_steps, completed=done, status="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None and self.task is not None:
            status = fitted(self._words(short=True), self._room(state.max_steps, self.label))
            self.bar.update(self.task, completed=state.global_step, status=status)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        self.seen = describe_look(logs or {}, state.global_step) or self.seen
        if not logs or "loss" not in logs:
            return
        self.status = describe(logs)
        every = max(args.logging_steps, state.max_steps // LINES)
        if self.bar is None and (state.global_step % every < args.logging_steps or state.global_step <= 1):
            step = state.global_step
            a_step = (time.monotonic() - self.started) / max(1, step - self.first)
            left = f"eta {a_step * (state.max_steps - step):.0f}s"
            self.console.print(
                f"{self.label} {step}/{state.max_steps} {self._words()} {left}",
                highlight=False,
                soft_wrap=True,
            )

    def _room(self, steps: int, label: str) -> int:
        """Columns beside count, time and label; rich would cut all of them where one is too long."""
        bar = BAR + 1 if self.console.width >= WIDE else 0
        return self.console.width - bar - len(f"{steps}/{steps} ") - len("0:00:00 ") - len(label) - 1

    def _words(self, *, short: bool = False) -> str:
        """The last log and the last look; a bar has room for the loss and the look alone."""
        status = self.status.partition(",")[0] if short and self.seen else self.status
        return ", ".join(part for part in (status, self.seen) if part)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        taken = time.monotonic() - self.started
        kept = state.best_global_step if args.load_best_model_at_end else None
        stopped = "stopped" if state.global_step < state.max_steps else "done"
        parts = [f"{state.global_step} steps", f"{taken:.0f}s", self._words()]
        if kept is not None and kept != state.global_step:
            parts.append(f"weights of step {kept} kept")
        self.console.print(
            f"{self.label} {stopped}: {', '.join(part for part in parts if part)}",
            highlight=False,
            soft_wrap=True,
        )

        for line in warnings_of(state.log_history):
            self.console.print(
                f"warning: {self.label}: {line}", style="yellow", highlight=False, soft_wrap=True
            )

    def close(self) -> None:
        """Take the bar down; safe to call twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@contextmanager
def reported(console: Console, label: str) -> Generator[list[TrainerCallback]]:
    """Callbacks that show a stage; the bar is taken down also when the stage fails."""
    report = ProgressReport(console, label)
    try:
        yield [report]
    finally:
        report.close()


def describe(logs: dict[str, float]) -> str:
    """Loss, linear attention's part of the layers' output, the branches' gradient norms, in a few words."""
    parts = [f"loss {float(logs['loss']):.4g}"]
    if "linear_output_share" in logs:
        parts.append(f"linear {logs['linear_output_share']:.2f} of output")
    if "linear_gradient" in logs:
        window, linear = logs.get("window_gradient", 0.0), logs["linear_gradient"]
        parts.append(f"grad window {window:.2g} linear {linear:.2g}")
    return ", ".join(parts)


def describe_look(logs: dict[str, float], step: int) -> str:
    """What a look at held-out rows saw of the branches; nothing where the log is not of a look."""
    parts = [
        f"{words} {logs[name]:.1%}"
        for name, words in (
            ("eval_linear_share", "linear share"), ("eval_linear_recovered", "linear alone"),
            ("eval_recall", "recall"),
        ) if name in logs
    ]  # fmt: skip
    if not parts and "eval_nll" in logs:
        parts = [f"nll {logs['eval_nll']:.4g}"]
    return f"held out at {step}: {', '.join(parts)}" if parts else ""
