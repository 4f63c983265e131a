"""What the tests of both training stages share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def weights(model: nn.Module, part: str = "") -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


def donor_weights(model: nn.Module) -> dict[str, Tensor]:
    own = weights(model)
    return {
        n.replace(".base_layer", ""): p for n, p in own.items() if ".hybrid." not in n and "lora" not in n
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


STAGE1: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "learning_rate": 3e-2}
STAGE2: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2}
