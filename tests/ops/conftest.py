"""Where the Triton kernels run: interpreted on the CPU, or on a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from equipoise.ops.dispatch import backend

DEVICES = [
    pytest.param(("cpu", torch.float64), id="interpreter"),
    pytest.param(("cuda", torch.float32), id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def device_and_dtype(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """(device, type of the inputs)."""
    device, dtype = request.param
    if (device == "cuda") != torch.cuda.is_available():
        pytest.skip(f"runs {'with' if device == 'cuda' else 'without'} CUDA only")
    return device, dtype


@pytest.fixture
def place(device_and_dtype: tuple[str, torch.dtype]) -> Iterator[tuple[str, torch.dtype]]:
    """(device, type of the inputs), with the kernels switched on."""
    with backend("triton"):
        yield device_and_dtype
