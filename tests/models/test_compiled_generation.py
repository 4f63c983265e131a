"""Static caches: tensors keep their place, and torch.compile makes one graph of the decoding step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_generation import CONFIGS
from equipoise import HybridConfig, branches, hybridize
from equipoise.layers.cache import CacheError
from equipoise.layers.static_cache import StaticHybridCache
from support import SINGLE_HEADS, random_tokens, tiny_model

TESTS = Path(__file__).parents[1]
CONFIG = HybridConfig(window=5, gate="per_head", layers="all")
SHARED = HybridConfig(window=5, mixing="shared", overlap=False, sinks=2, layout="terraced", layers="all")
SINGLE = HybridConfig(**SINGLE_HEADS, layers="all")
DELTA = CONFIGS["delta rule, windows by head"]
PROMPT, MASK = random_tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
MASK[0, :5] = 0


def compiled(backend: str, families: str, dtype: str, count: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "compiled_generation.py"), backend, families, dtype, str(count)],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("backend", "families", "dtype", "count"),
    [
        ("eager", "llama", "float32", 1),
        pytest.param("eager", "mistral,qwen3", "float64", 1, marks=pytest.mark.slow),
        pytest.param("eager", "gemma3_text", "float64", 3, marks=pytest.mark.slow),
        pytest.param("eager", "llama", "float64", 5, marks=pytest.mark.slow),
        pytest.param("aot_eager", "llama", "float32", 3, marks=pytest.mark.slow),
        pytest.param("inductor", "llama", "float32", 1, marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_all_tokens_and_prompts(backend: str, families: str, dtype: str, count: int) -> None:
    found = compiled(backend, families, dtype, count)
    assert len(found) == count * len(families.split(","))
    for case in found.values():
        assert case == {"same": [True, True], "graphs": 1, "breaks": 0, "recompiles": 0}


@pytest.mark.parametrize(
    "config", [CONFIG, SHARED, SINGLE, DELTA], ids=["convex", "shared", "single-heads", "delta"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_static_equals_dynamic(family: str, config: HybridConfig) -> None:
    model: Any = hybridize(tiny_model(family, dtype=torch.float64), config)
    options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 6}
    for more in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        dynamic = model.generate(PROMPT, **options, **more)
        assert torch.equal(model.generate(PROMPT, **options, **more, cache_implementation="static"), dynamic)


def test_tensors_keep_their_place() -> None:
    model: Any = hybridize(tiny_model(), CONFIG)
    out = model.generate(
        PROMPT, attention_mask=MASK, max_new_tokens=3, do_sample=False, cache_implementation="static",
        return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(out.past_key_values, StaticHybridCache)
    assert out.past_key_values.is_compileable
    cache: Any = out.past_key_values

    def places() -> list[int]:
        return [t.data_ptr() for layer in cache.layers for t in (*layer.tensors(), layer.read_so_far)]

    before = places()
    with torch.no_grad():
        model(PROMPT[:, :1], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert places() == before
    assert cache.get_seq_length() == 14 + 2 + 1
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].state.valid.shape[0] == 1
    cache.reset()
    assert (cache.get_seq_length(), cache.state_bytes()) == (0, 0)


def test_layers_that_keep_every_key_are_refused() -> None:
    local = hybridize(tiny_model("gemma3_text"), HybridConfig(window=5))
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static"}
    with pytest.raises(
        CacheError, match=r"static cache, got softmax attention in layers \[0\].*layers='all'"
    ):
        local.generate(PROMPT, **options)  # pyright: ignore
    model: Any = hybridize(tiny_model(), CONFIG)
    with branches(model, "softmax"), pytest.raises(CacheError, match=r"softmax attention in layers \[0, 1\]"):
        model.generate(PROMPT, **options)


def test_nothing_is_taken_back_from_a_static_cache() -> None:
    model: Any = hybridize(tiny_model(), CONFIG)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with pytest.raises(ValueError, match="not supported with Static cache"):
        model.generate(PROMPT[:1], **options, prompt_lookup_num_tokens=2)
    cache = model.generate(PROMPT[:1], **options, return_dict_in_generate=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(CacheError, match="cannot take tokens back"):
        cache.activate_past_recording()
