"""What tests of whole conversions look at."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console


def quiet() -> Console:
    return Console(file=io.StringIO())


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None], use_cache=False).logits
