"""Where a stage's log goes beside `run.json`: TensorBoard or W&B, through transformers' own callbacks."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from equipoise.config import ConfigError

LOGS = "logs"
"""Sub-folder of the output with TensorBoard's files, one folder a stage."""


def check_reporter(name: str) -> None:
    """Make sure that the reporter is installed, before anything runs.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(f"report_to: {name} is not installed. Run `pip install {name}`, or report to none.")


@contextmanager
def reporting(
    reporter: str, directory: Path, *, resumed_at: int | None = None
) -> Generator[list[TrainerCallback]]:
    """Callbacks that send one stage's log to a reporter, which is closed at the end.

    Args:
        reporter: none, tensorboard or wandb.
        directory: of TensorBoard's files; made where it is missing.
        resumed_at: the step a killed stage goes on from: what it had logged after that is taken back.
    """
    if reporter == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(
            log_dir=str(directory), purge_step=None if resumed_at is None else resumed_at + 1
        )
        try:
            yield [TensorBoardCallback(writer)]
        finally:
            writer.close()
    elif reporter == "wandb":
        wandb: Any = importlib.import_module("wandb")
        try:
            yield [WandbCallback()]
        finally:
            wandb.finish()  # or the next stage would go on in this one's run
    else:
        yield []
