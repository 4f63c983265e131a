"""Converted tiny models, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from equipoise import HybridConfig, hybridize, record_donor
from support import tiny_model


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Logits without gradients and without a cache."""

    def run(model: Any, tokens: torch.Tensor, **extra: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, **{"use_cache": False, **extra}).logits

    return run


@pytest.fixture
def donor_path(tmp_path: Path) -> Path:
    """A saved tiny Llama."""
    tiny_model().save_pretrained(tmp_path / "donor")
    return tmp_path / "donor"


@pytest.fixture
def converted(donor_path: Path) -> Any:
    """That Llama, loaded and converted, its donor recorded."""
    model = AutoModelForCausalLM.from_pretrained(donor_path)
    hybridize(model, HybridConfig(window=5, gate="per_head"))
    record_donor(model, str(donor_path))
    return model
