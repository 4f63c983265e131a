"""A tiny hybrid, packed rows of random tokens and recipes in a line, for the training suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.config import RunConfig, merge, parse
from equipoise.data.packing import PackedDataset
from equipoise.data.token_cache import TokenStream
from equipoise.models.surgery import hybridize
from support import tiny_model

CONTEXT = 24


def make_rows(count: int = 16, *, context: int = CONTEXT, document: int = 17, seed: int = 0) -> PackedDataset:
    """Rows of documents of one length, in which each token all but fixes the next."""
    generator = np.random.default_rng(seed)
    total = count * context
    tokens = (np.cumsum(generator.integers(1, 3, total)) % 61 + 3).astype(np.int32)
    starts = np.arange(0, total, document, dtype=np.int64)
    return PackedDataset(
        TokenStream(tokens=tokens, trained=np.ones(total, np.bool_), starts=starts), context_length=context
    )


def make_run(**settings: Any) -> RunConfig:
    """A recipe of both branches, window 4; sections given are merged over it."""
    base = {"name": "test", "hybrid": {"window": 4}, "precision": "float32"}
    return parse(RunConfig, merge(base, settings))


def make_hybrid(run: RunConfig, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny Llama converted as the recipe says."""
    assert run.hybrid is not None
    return hybridize(tiny_model(dtype=dtype, **overrides), run.hybrid)


@pytest.fixture
def rows() -> PackedDataset:
    return make_rows()


@pytest.fixture
def packed() -> Callable[..., PackedDataset]:
    return make_rows


@pytest.fixture
def recipe() -> Callable[..., RunConfig]:
    return make_run


@pytest.fixture
def hybrid() -> Callable[..., Any]:
    return make_hybrid
