"""Run as a program by the tests: generates eagerly and compiled, and prints what torch.compile counted.

A process of its own, since shapes are not checked here: the checks that tests run under break graphs.
Arguments: backend, families (comma-separated), dtype, how many of the configurations.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import CompileConfig

from equipoise import HybridConfig, hybridize
from support import random_tokens, tiny_model

CONFIGS = {
    "convex": HybridConfig(window=5, gate="per_head", layers="all"),
    "per token, disjoint": HybridConfig(window=5, gate="per_token", overlap=False, layers="all"),
    "shared": HybridConfig(
        window=5, mixing="shared", overlap=False, sinks=2, layout="terraced", layers="all"
    ),
    # what layers of the recipe `equipoise` are
    "delta rule, windows by head": HybridConfig(
        window=5, head_windows=(5, 3), sinks=0, linear_heads=(0, 1), map_heads="key_value",
        feature_map="trilinear", feature_multiple=2, state_update="delta", value_divisor=2, rotary="undone",
        write_gate="quadratic", gate="quadratic", layers="all",
    ),
    "means": HybridConfig(
        window=5, linear_heads=(0, 1, 2, 3), map_heads="key_value", feature_map="constant", feature_dim=1,
        mixing="calibrated", write_gate="per_token", gate="per_token", layers="all",
    ),
}  # fmt: skip


def compiling(backend: str) -> CompileConfig:
    """On any device, and without a single graph break."""
    config: Any = CompileConfig(fullgraph=True, backend=backend, mode=None)  # pyright: ignore
    config._compile_all_devices = True
    return config


def case(family: str, config: HybridConfig, backend: str, dtype: torch.dtype) -> dict[str, Any]:
    """Two prompts of different lengths, one of them padded, and the graphs made for both."""
    torch._dynamo.reset()
    counters.clear()
    model: Any = hybridize(tiny_model(family, dtype=dtype), config)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    same: list[bool] = []
    for tokens, given in ((random_tokens(2, 14), mask), (random_tokens(2, 9), torch.ones_like(mask[:, :9]))):
        options: dict[str, Any] = {"attention_mask": given, "max_new_tokens": 16, "do_sample": False}
        eager = model.generate(tokens, **options)
        static = model.generate(
            tokens, **options, cache_implementation="static", compile_config=compiling(backend)
        )
        same.append(torch.equal(eager, static))
    return {
        "same": same,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": len(counters["graph_break"]),
        "recompiles": len(counters["recompiles"]),
    }


if __name__ == "__main__":
    backend, families, dtype, count = sys.argv[1:]
    torch.set_num_threads(1)
    found = {
        f"{family} {name}": case(family, config, backend, getattr(torch, dtype))
        for family in families.split(",")
        for name, config in list(CONFIGS.items())[: int(count)]
    }
    print(json.dumps(found))
