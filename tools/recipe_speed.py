"""A model as the default recipe makes it, on the fast paths and on the general one: docs/performance.md.

    OMP_NUM_THREADS=1 python tools/recipe_speed.py              # a random Llama of 17 million parameters

The last layer has two large states; the others have means, and windows of a size for every key/value head,
with sinks in the first half of the layers. Everything that is compared runs by turns; the median of
``--rounds`` counts. Prints a line of JSON for each: seconds of a training step (forward and backward, one
text), of reading a text, and of a token after it; and how many times as long the general path and the donor
take.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from equipoise import hybridize
from equipoise.ops.dispatch import backend
from equipoise.train.recipes import load_recipe

SINKS = 4


def converted(donor: Any, window: int) -> Any:
    """The donor with the layers of the recipe, untrained."""
    layers, kv_heads = donor.config.num_hidden_layers, donor.config.num_key_value_heads
    shared = donor.config.num_attention_heads // kv_heads
    recipe = load_recipe("equipoise")
    assert recipe.allocation is not None
    assert recipe.allocation.elsewhere is not None
    windows = [max(2, window * (i + 1) // kv_heads) for i in range(kv_heads)]
    common: dict[str, Any] = {"window": max(windows), "head_windows": windows}
    means = {**recipe.allocation.elsewhere, "linear_heads": list(range(shared * kv_heads)), **common}
    own: dict[int, dict[str, Any]] = {
        layer: {**means, "sinks": SINKS if layer < layers // 2 else 0} for layer in range(layers - 1)
    }
    own[layers - 1] = {**common, "sinks": 0, "linear_heads": list(range(2 * shared))}
    hybrid = load_recipe("equipoise", {"hybrid": {"per_layer": own}, "allocation": None}).hybrid
    assert hybrid is not None
    return hybridize(copy.deepcopy(donor), hybrid, check=False)


def trained(model: Any, tokens: Tensor) -> Callable[[], object]:
    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def read(model: Any, tokens: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(input_ids=tokens, use_cache=True))


def decoded(model: Any, tokens: Tensor) -> Callable[[], object]:
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    return torch.no_grad()(lambda: model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True))


def median_times(ways: dict[str, Callable[[], object]], rounds: int, *, calls: int = 1) -> dict[str, float]:
    """Seconds of a call, each way in its turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            with backend("walk" if name == "general path" else "auto"):
                started = time.perf_counter()
                for _ in range(calls):
                    way()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(of) for name, of in times.items()}


def main(
    hidden: int = 384,
    layers: int = 6,
    heads: int = 6,
    kv_heads: int = 3,
    length: int = 2048,
    window: int = 128,
    rounds: int = 5,
) -> None:
    """Time a hybrid of random weights."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8 * length,
    )  # fmt: skip
    donor: Any = AutoModelForCausalLM.from_config(config).to(device, dtype)
    hybrid = converted(donor, window).to(device)
    for model in (donor, hybrid):
        model.requires_grad_(True).eval()  # in training, models keep no cache
    tokens = torch.randint(0, 8192, (1, length), device=device)
    for what, make, calls in (
        ("training step", trained, 1), ("reading", read, 1), ("a token", decoded, 20),
    ):  # fmt: skip
        ways = {name: make(model, tokens) for name, model in (
            ("fast paths", hybrid), ("general path", hybrid), ("donor", donor),
        )}  # fmt: skip
        found = median_times(ways, rounds, calls=calls)
        times = {name: round(value / found["fast paths"], 2) for name, value in found.items()}
        print(json.dumps({
            "what": what, "seconds": float(f"{found['fast paths']:.3g}"), "times as long": times,
            "threads": torch.get_num_threads(), "device": device,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
