"""Draw the figures of docs/method.md with the operators they explain: `python tools/method_figures.py`.

Attention weights are read off an operator by giving it the identity as values. Equal input gives equal text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise import HybridConfig, hybrid_attention, hybridize, linear_attention, reach, state_bytes
from equipoise import window_attention as window_only
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.models.layout import KV_BYTES
from equipoise.pages.plotting import (
    BOTH,
    CONTROL,
    FONT,
    INK,
    LINEAR,
    NEUTRAL,
    UNTRAINED_COLOUR,
    WINDOW,
    as_svg,
    canvas,
)  # fmt: skip
from equipoise.train.recipes import load_recipe
from equipoise.train.schedules import window_dropout_probability

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "figures" / "method"
TOKENS, WINDOW_SIZE, HEAD_DIM = 20, 5, 8


def figures() -> dict[str, str]:
    """The SVG of every figure, by file name."""
    drawn: dict[str, Callable[[], Figure]] = {
        "branches": draw_branches, "reach": draw_reach, "state": draw_state, "dropout": draw_dropout,
        "objectives": draw_objectives,
    }  # fmt: skip
    return {f"{name}.svg": as_svg(draw(), salt=name) + "\n" for name, draw in drawn.items()}


def draw_branches() -> Figure:
    """What each query (row) takes from each key (column): area is weight."""
    q, k = torch.randn(2, 1, 1, TOKENS, HEAD_DIM, generator=_generator(), dtype=torch.float64).unbind()
    phi = FEATURE_MAPS["hedgehog"](heads=1, head_dim=HEAD_DIM, feature_dim=2 * HEAD_DIM).double()
    phi.reset_parameters(_generator())
    phi_q, phi_k = phi(2 * q).detach(), phi(2 * k).detach()
    one_hot = torch.eye(TOKENS, dtype=torch.float64)[None, None]
    donor, _ = window_only(q, k, one_hot, window=TOKENS)
    window, _ = window_only(q, k, one_hot, window=WINDOW_SIZE)
    linear, _ = linear_attention(q, k, one_hot, phi_q, phi_k)
    hybrid, _ = hybrid_attention(q, k, one_hot, phi_q, phi_k, window=WINDOW_SIZE, gate=0.5)
    panels = (
        ("donor: softmax", donor, BOTH), (f"window, w = {WINDOW_SIZE}", window, WINDOW),
        ("linear", linear, LINEAR), ("hybrid, g = 0.5", hybrid, CONTROL),
    )  # fmt: skip
    figure = Figure(figsize=(7.2, 2.3), facecolor="white", layout="constrained")
    for axes, (title, weights, colour) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _weights(axes, weights[0, 0], title, colour)
    figure.supxlabel("key", fontsize=FONT - 1, color=INK)
    figure.supylabel("query", fontsize=FONT - 1, color=INK)
    return figure


def _weights(axes: Axes, weights: Tensor, title: str, colour: str) -> None:
    rows, columns = torch.nonzero(weights > 1e-4, as_tuple=True)
    axes.scatter(columns, rows, s=34 * weights[rows, columns], marker="s", color=colour, linewidths=0)
    axes.set_title(title, fontsize=FONT, color=INK)
    axes.set(xlim=(-1, TOKENS), ylim=(TOKENS, -1), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_color(NEUTRAL)


def draw_reach() -> Figure:
    """How far back the last token hears through stacked windows: layer by layer, w - 1 further."""
    layers, window, length = 4, 5, 24
    sees = torch.zeros(length, dtype=torch.bool)
    sees[-1] = True
    figure, axes = canvas(2.2, width=6.4)
    axes.grid(visible=False)
    for depth in range(layers + 1):
        places = np.arange(length)
        axes.scatter(
            places, [depth] * length, s=42, marker="s", linewidths=0,
            color=[WINDOW if seen else "#e4e4e4" for seen in sees.tolist()],
        )  # fmt: skip
        weights, _ = window_only(*_uniform(length), window=window)
        sees = (weights[0, 0] > 0)[sees].any(0)
    model = _one_layer(window=window, layers=layers)
    distance = reach(model)
    assert distance is not None
    axes.set_yticks(range(layers + 1), ["output", *(f"below layer {layers - i}" for i in range(layers))])
    axes.set_xticks([length - 1 - distance, length - 1], [f"{distance} tokens back", "last token"])
    axes.set_ylim(layers + 0.6, -0.6)
    return figure


def draw_state() -> Figure:
    """Bytes of decode state against context, in the shapes of Llama 3 8B."""
    layers, contexts = 32, np.geomspace(64, 131_072, 60)
    figure, axes = canvas(3.2)
    axes.plot(contexts, layers * 2 * 8 * 128 * KV_BYTES * contexts / 2**20, color=BOTH, label="softmax donor")
    for multiple, colour in ((2, LINEAR), (1, UNTRAINED_COLOUR)):
        size = layers * state_bytes(_one_llama_layer(multiple=multiple)) / 2**20
        axes.axhline(size, color=colour, label=f"hybrid, w = 64, {multiple}D features: {size:.0f} MiB")
    size = layers * state_bytes(_one_llama_layer(map_heads="key_value")) / 2**20
    axes.axhline(size, color=CONTROL, label=f"the same 2D, one map per key/value head: {size:.0f} MiB")
    axes.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="decode state, MiB")
    axes.set_xticks([64, 1024, 8192, 131_072], ["64", "1k", "8k", "128k"])
    axes.legend(fontsize=FONT - 2, frameon=False)
    return figure


def draw_dropout() -> Figure:
    """With what probability a training sample runs without its window, in the `ssd` recipe."""
    tuned = load_recipe("ssd").finetune
    assert tuned is not None
    assert tuned.window_dropout is not None
    steps, probabilities = 300, tuned.window_dropout.probabilities
    drawn = [window_dropout_probability(probabilities, step, steps) for step in range(steps)]
    figure, axes = canvas(2.2)
    axes.step(np.arange(steps) / steps, drawn, where="post", color=LINEAR)
    axes.fill_between(np.arange(steps) / steps, drawn, step="post", color=LINEAR, alpha=0.15)
    axes.set(ylim=(0, 1), xlim=(0, 1), xlabel="share of stage 2", ylabel="windows dropped")
    return figure


def draw_objectives() -> Figure:
    """What the linear branch recovers alone after each transfer objective (docs/results/objectives.json)."""
    rows: list[Any] = json.loads((DOCS / "results" / "objectives.json").read_text(encoding="utf-8"))["rows"]
    figure, axes = canvas(2.4)
    for place, row in enumerate(reversed(rows)):
        alone = row["values"]["linear_alone"]
        low, high = alone["ci95"]
        axes.plot([100 * low, 100 * high], [place, place], color=LINEAR, linewidth=2)
        axes.plot(100 * alone["value"], place, "o", color=LINEAR)
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axes.set(xlim=(0, 100), ylim=(-0.6, len(rows) - 0.4), xlabel="recovered by the linear branch alone, %")
    return figure


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _uniform(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k that score everything alike, and one-hot values."""
    nothing = torch.zeros(1, 1, length, HEAD_DIM, dtype=torch.float64)
    return nothing, nothing, torch.eye(length, dtype=torch.float64)[None, None]


def _one_llama_layer(*, multiple: int = 2, map_heads: str = "query") -> Any:
    return _one_layer(window=64, heads=32, kv_heads=8, head_dim=128, multiple=multiple, map_heads=map_heads)


def _one_layer(
    *,
    window: int,
    layers: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    head_dim: int = HEAD_DIM,
    multiple: int = 2,
    map_heads: str = "query",
) -> Any:
    """A converted Llama with attention of these shapes and next to nothing else."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=heads, intermediate_size=8, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
    )  # fmt: skip
    hybrid = HybridConfig.model_validate(
        {"window": window, "feature_multiple": multiple, "map_heads": map_heads}
    )
    return hybridize(LlamaForCausalLM(config), hybrid, check=False)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file, svg in figures().items():
        (FOLDER / file).write_text(svg, encoding="utf-8", newline="\n")
        print(FOLDER / file)
