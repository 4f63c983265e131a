"""What a stage shows while it trains, with and without a terminal."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from equipoise.train import progress
from equipoise.train.progress import ProgressReport, describe, reported

ARGS = SimpleNamespace(logging_steps=10, load_best_model_at_end=False)


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=100), text


def state(step: int, total: int = 200) -> Any:
    return SimpleNamespace(global_step=step, max_steps=total, log_history=[])


def drive(report: ProgressReport, steps: range) -> None:
    for step in steps:
        report.on_step_end(ARGS, state(step), None)
        if step == 1 or step % 10 == 0:
            report.on_log(ARGS, state(step), None, logs={"loss": 1 / step, "linear_output_share": 0.25})


def test_plain_lines_where_there_is_no_terminal() -> None:
    target, text = console(terminal=False)
    report = ProgressReport(target, "test transfer")
    report.on_train_begin(ARGS, state(0), None)
    drive(report, range(1, 201))
    report.on_train_end(ARGS, state(200), None)
    lines = text.getvalue().splitlines()
    assert len(lines) == 12  # the first step, every 20th, and the end
    assert lines[0].startswith("test transfer 1/200 loss 1, linear 0.25 of output eta ")
    assert lines[-1].startswith("test transfer done: 200 steps, ")
    assert report.bar is None


def test_remaining_time_of_a_resumed_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by the steps taken since, not by all of them."""
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    target, text = console(terminal=False)
    report = ProgressReport(target, "x")
    report.on_train_begin(ARGS, state(90), None)
    report.on_log(ARGS, state(100), None, logs={"loss": 1.0})
    assert text.getvalue() == "x 100/200 loss 1 eta 100s\n"


def test_bar_on_a_terminal_goes_when_the_stage_fails() -> None:
    target, text = console(terminal=True)

    def fail(report: ProgressReport) -> None:
        report.on_train_begin(ARGS, state(0), None)
        drive(report, range(1, 21))
        assert report.bar is not None
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"), reported(target, "x") as callbacks:
        fail(callbacks[0])  # type: ignore[arg-type]
    assert callbacks[0].bar is None  # type: ignore[attr-defined]
    assert "20/200" in text.getvalue()


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_narrow_terminal_keeps_the_figures_that_matter(width: int) -> None:
    """One line, never wider than the terminal; what gives way is the bar first, then the words."""
    text = io.StringIO()
    report = ProgressReport(Console(file=text, force_terminal=True, width=width), "hedgecats finetune")
    report.on_train_begin(ARGS, state(0, 2000), None)
    report.on_log(ARGS, state(10, 2000), None, logs={"loss": 1.25, "linear_output_share": 0.25})
    report.on_log(ARGS, state(10, 2000), None, logs={"eval_linear_share": 0.2, "eval_linear_recovered": 0.5})
    report.on_step_end(ARGS, state(11, 2000), None)
    assert report.bar is not None
    report.bar.refresh()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())  # without colours
    shown = re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", plain)
    report.close()
    lines = [line.strip() for line in shown if "11/2000" in line]
    assert lines
    assert max(map(len, lines)) <= width
    assert "hedgecats finetune" in lines[-1]
    assert "-:--:--" in lines[-1]
    assert ("loss 1.25" in lines[-1]) == (width > 40)
    assert ("━" in lines[-1]) == (width == 100)


def test_other_logs_are_not_shown() -> None:
    target, text = console(terminal=False)
    report = ProgressReport(target, "x")
    report.on_log(ARGS, state(10), None, logs={"eval_loss": 1.0})
    report.on_log(ARGS, state(10), None, logs=None)
    assert text.getvalue() == ""


def test_describe() -> None:
    assert describe({"loss": 1.23456}) == "loss 1.235"
    logs = {"loss": 2.0, "linear_output_share": 0.5, "window_gradient": 0.125, "linear_gradient": 3.0}
    assert describe(logs) == "loss 2, linear 0.50 of output, grad window 0.12 linear 3"
