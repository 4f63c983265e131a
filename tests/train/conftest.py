"""A tiny hybrid, packed rows of random tokens, recipes in a line, a tiny donor and text to convert it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.config import RunConfig, merge, parse
from equipoise.data.packing import PackedDataset
from equipoise.data.token_cache import TokenStream
from equipoise.models.surgery import hybridize
from equipoise.train.recipes import load_recipe
from support import tiny_model, tiny_tokenizer

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


# ---- whole conversions

TEXT = "def window(size):\n    return size\n\nthe quick brown fox jumps over the lazy dog {}\n"


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("donor")
    tiny_model(vocab_size=300).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("data") / "text.jsonl"
    lines = [json.dumps({"text": TEXT.format(i) * 3}) for i in range(400)]
    place.write_text("\n".join(lines))
    return str(place)


@pytest.fixture
def small(text: str) -> Any:
    """A shipped recipe at two steps a stage."""

    def load(name: str, **overrides: Any) -> RunConfig:
        recipe = load_recipe(name)
        values: dict[str, Any] = {
            "data": {"source": text, "context_length": 32, "max_tokens": 3000}, "precision": "float32",
        }  # fmt: skip
        if recipe.hybrid is not None and recipe.hybrid.window is not None:
            values["hybrid"] = {"window": 4}
        if recipe.allocation is not None:
            values["allocation"] = {"state_bytes": 3_000, "smallest_window": 2, "rows": 2}
        for stage in ("transfer", "finetune"):
            if getattr(recipe, stage) is not None:
                values[stage] = {"max_steps": 2, "batch_size": 4, **overrides.pop(stage, {})}
        return load_recipe(name, {**values, **overrides})

    return load
