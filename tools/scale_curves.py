"""Measure how memory and time grow with layers, width and tokens; fit the cost model of docs/scale.md.

`python tools/scale_curves.py` writes docs/results/scale-curves.json and draws docs/figures/scale; with
`--draw` it only draws. Time is the processor's, of the fastest of several steps on one thread (a busy machine
stretches the clock's, not that), and is compared with operations; memory is what the
resident set grows by at its most, compared with what `equipoise.planning` says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from equipoise import hybridize
from equipoise.bench.memory import measured
from equipoise.config import RunConfig
from equipoise.pages.plotting import FONT, INK, LINEAR, WINDOW, as_svg, canvas, style
from equipoise.planning.memory import GAPS
from equipoise.planning.simulate import Phase, footprint
from equipoise.planning.slices import Kind, RandomRows
from equipoise.train.recipes import load_recipe
from equipoise.train.stages import finetune, transfer

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, FOLDER = DOCS / "results" / "scale-curves.json", DOCS / "figures" / "scale"
BASE = {"layers": 2, "width": 256, "tokens": 256}
SWEEPS = {"layers": (1, 2, 4, 8), "width": (256, 512, 768), "tokens": (128, 256, 512, 1024)}
ROWS, VOCABULARY, STEPS = 2, 8192, 3
STAGES: tuple[Phase, ...] = ("transfer", "finetune")
COLOURS = {"transfer": WINDOW, "finetune": LINEAR}


class Clock(TrainerCallback):
    """Processor seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.since = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.since)


def config_of(layers: int, width: int) -> LlamaConfig:
    """A Llama with heads of 64, a quarter of them key/value heads, feed-forward 2.75 times as wide."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, head_dim=64,
        max_position_embeddings=4096,
    )  # fmt: skip


def recipe() -> RunConfig:
    """`ssd` with a few steps of one micro batch."""
    steps = {"max_steps": STEPS, "batch_size": ROWS}
    return load_recipe("ssd", {"transfer": steps, "finetune": steps, "watch": None})


def point(phase: Phase, layers: int, width: int, tokens: int) -> dict[str, Any]:
    """One setting: seconds of a step, operations, bytes measured and computed."""
    run, config, clock = recipe(), config_of(layers, width), Clock()
    assert run.hybrid is not None
    model: Any = hybridize(LlamaForCausalLM(config), run.hybrid)
    rows = RandomRows(ROWS, tokens, VOCABULARY)

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder:
            if phase == "transfer":
                transfer(model, run, rows, Path(folder), callbacks=[clock])
            else:
                finetune(model, run, rows, None, Path(folder), callbacks=[clock])

    _, grown = measured(train, "cpu")
    kinds: list[Kind] = ["converted"] * layers
    found = footprint(config, run, phase, kinds, rows=ROWS, length=tokens, dtype=torch.float32)
    return {
        "stage": phase, "layers": layers, "width": width, "tokens": tokens, "seconds": min(clock.seconds),
        "flops": found.flops, "bytes": grown, "tensors": found.peak_bytes,
        "predicted": max(GAPS * found.small_bytes + found.large_bytes, found.peak_bytes),
    }  # fmt: skip


def measure() -> dict[str, Any]:
    """Every sweep of one dimension around `BASE`, for both stages."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for dimension, values in SWEEPS.items():
        for value in values:
            for phase in STAGES:
                sizes = BASE | {dimension: value}
                key = (phase, *sizes.values())
                if key not in seen:
                    seen[key] = point(phase, **sizes)
                    print(json.dumps(seen[key]), flush=True)
    points = list(seen.values())
    return {"rows": ROWS, "threads": torch.get_num_threads(), "points": points, "fits": fits(points)}


def fits(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """seconds = fixed + operations / rate for each stage, by least squares of relative errors."""
    found: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        own = [p for p in points if p["stage"] == stage]
        seconds, flops = (np.array([p[name] for p in own]) for name in ("seconds", "flops"))
        matrix = np.stack([np.ones_like(flops), flops], axis=1) / seconds[:, None]
        (fixed, slope), *_ = np.linalg.lstsq(matrix, np.ones_like(seconds), rcond=None)
        residuals = (fixed + slope * flops) / seconds - 1
        found[stage] = {
            "fixed_seconds": float(fixed), "flops_per_second": float(1 / slope),
            "largest_residual": float(np.abs(residuals).max()),
            "rms_residual": float(np.sqrt((residuals**2).mean())),
        }  # fmt: skip
    return found


def draw(results: dict[str, Any]) -> None:
    """The figures of docs/scale.md."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, figure in {"memory": draw_memory(results), "time": draw_time(results)}.items():
        path = FOLDER / f"{name}.svg"
        path.write_text(as_svg(figure, salt=f"scale-{name}") + "\n", encoding="utf-8", newline="\n")
        print(path)


def draw_memory(results: dict[str, Any]) -> Figure:
    """Measured points and computed lines against each dimension."""
    figure = Figure(figsize=(7.2, 2.6), facecolor="white", layout="constrained")
    for axes, dimension in zip(figure.subplots(1, len(SWEEPS)), SWEEPS, strict=True):
        style(axes)
        for stage in STAGES:
            own = sweep(results, stage, dimension)
            at = [p[dimension] for p in own]
            axes.plot(at, [p["predicted"] / 2**20 for p in own], color=COLOURS[stage])
            axes.plot(at, [p["bytes"] / 2**20 for p in own], "o", color=COLOURS[stage], label=stage)
        axes.set_xlabel(dimension, fontsize=FONT - 1, color=INK)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("MiB beyond the weights", fontsize=FONT - 1, color=INK)
    figure.axes[0].legend(fontsize=FONT - 2, frameon=False)
    return figure


def draw_time(results: dict[str, Any]) -> Figure:
    """Seconds of a step against its operations, with the fitted lines."""
    figure, axes = canvas(3.0)
    for stage in STAGES:
        own = [p for p in results["points"] if p["stage"] == stage]
        axes.plot(
            [p["flops"] for p in own], [p["seconds"] for p in own], "o", color=COLOURS[stage], label=stage
        )
        fit = results["fits"][stage]
        at = np.geomspace(min(p["flops"] for p in own), max(p["flops"] for p in own), 40)
        axes.plot(at, fit["fixed_seconds"] + at / fit["flops_per_second"], color=COLOURS[stage])
    axes.set(
        xscale="log", yscale="log", xlabel="operations of a step", ylabel="processor seconds, one thread"
    )
    axes.legend(fontsize=FONT - 2, frameon=False)
    return figure


def sweep(results: dict[str, Any], stage: str, dimension: str) -> list[dict[str, Any]]:
    """The points that differ from `BASE` in one dimension only, in its order."""
    others = [name for name in BASE if name != dimension]
    own = [
        p for p in results["points"] if p["stage"] == stage and all(p[name] == BASE[name] for name in others)
    ]
    return sorted(own, key=lambda p: p[dimension])


def main() -> None:
    """Measure unless only drawing was asked for, then draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="draw from the results that are there")
    if not parser.parse_args().draw:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
