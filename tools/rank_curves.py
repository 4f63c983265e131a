"""Count what one rank holds and sends under FSDP2 as ranks grow, and hold two of the points to processes.

    python tools/rank_curves.py                     count, measure, draw
    python tools/rank_curves.py --only measured     or counted: the other part stays as it was
    python tools/rank_curves.py --only none         draw docs/results/rank-curves.json again

Counted are the shapes of Llama 3.1, by `equipoise.planning`, for an H100 that is not here. Measured is the
memory of one and two gloo ranks that convert a small donor, beside what is counted for them; nothing is
timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from matplotlib.figure import Figure
from transformers import LlamaConfig

from equipoise.config import parse_assignments
from equipoise.pages.plotting import FONT, INK, LINEAR, WINDOW, as_svg, style
from equipoise.planning import requirements
from equipoise.planning.costs import ACCELERATORS, Target
from equipoise.planning.plan import plan_conversion
from equipoise.train.recipes import load_recipe
from plan_memory import Run, batch, make_donor, sizes, write_text

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, FIGURE = DOCS / "results" / "rank-curves.json", DOCS / "figures" / "scale" / "ranks.svg"
SHAPES = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}
"""Width, feed-forward width, layers and heads of Llama 3.1."""
RANKS = (1, 2, 4, 8, 16, 32, 64)
COLOURS = {"8B": LINEAR, "70B": WINDOW, "405B": INK}
SMALL = Run("llama", sizes(8_000, 1024, 2816, 12, 16, 4), "float32", "ssd")
"""The donor that is converted: 200 million parameters in float32."""


def count() -> list[dict[str, Any]]:
    """Bytes of a rank for each shape and number of ranks; a row of 1,024 tokens a rank and step."""
    points: list[dict[str, Any]] = []
    for shape, (width, inner, layers, heads) in SHAPES.items():
        config = LlamaConfig(
            vocab_size=128_256, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=131_072,
            dtype="bfloat16", tie_word_embeddings=False,
        )  # fmt: skip
        known: dict[Any, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            for ranks in RANKS:
                points.append({"shape": shape, "ranks": ranks, **planned(folder, ranks, known)})
                print(json.dumps(points[-1]), flush=True)
    return points


def planned(folder: str, ranks: int, known: dict[Any, Any]) -> dict[str, Any]:
    """One point. Ranks do not change what is in a micro batch, so ``known`` keeps the ones of this shape."""
    settings = {name: {"batch_size": ranks, "max_steps": 1} for name in ("transfer", "finetune")}
    run = load_recipe("ssd", {**settings, "gradient_checkpointing": True})
    target = Target(ranks=ranks, parallel="fsdp2", accelerator="h100")
    counted = requirements.micro_batch

    @functools.wraps(counted)
    def once(config: Any, run: Any, phase: Any, kinds: Any, **more: Any) -> Any:
        key = (phase, *sorted((name, str(value)) for name, value in more.items()))
        if key not in known:
            known[key] = counted(config, run, phase, kinds, **more)
        return known[key]

    with patch.object(requirements, "micro_batch", once):
        plan = plan_conversion(folder, run, probe=False, target=target)
    return {
        "memory": plan.memory_bytes,
        "wire": {s.name: s.cost.wire_bytes for s in plan.stages if s.cost is not None},
    }


def measure(ranks: int) -> dict[str, Any]:
    """Peak of each rank's resident memory in a conversion of `SMALL`, beside what is counted for it.

    The first rank reads the whole donor before it deals it out; the others show what a shard takes.
    """
    settings = batch(2, 256, "watch=null")
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_donor(SMALL, Path(temporary))
        text = write_text(folder / "text.jsonl", 256, 2)
        arguments = [
            "convert", str(folder), "--recipe", "ssd", "--output", str(folder / "out"), "--data", str(text),
            "--max-steps", "2", "--parallel", "fsdp2",
        ]  # fmt: skip
        arguments += [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        run = load_recipe("ssd", parse_assignments(settings))
        target = Target(ranks=ranks, parallel="fsdp2" if ranks > 1 else "ddp")
        plan = plan_conversion(str(folder), run, probe=False, target=target)
        surroundings = os.environ | {"EQUIPOISE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        peaks = watched([*command, str(ranks), "-m", "equipoise", *arguments], surroundings)
    return {"ranks": ranks, "peaks": peaks, "planned": plan.memory_bytes}


def watched(command: list[str], surroundings: dict[str, str]) -> dict[str, int]:
    """Bytes at the peak (VmHWM) of each rank that a launcher starts, by its number; polled every 50 ms."""
    peaks: dict[str, int] = {}
    with subprocess.Popen(command, env=surroundings) as launcher:
        while launcher.poll() is None:
            for child in psutil.Process(launcher.pid).children(recursive=True):
                try:
                    rank = child.environ().get("RANK")
                    lines = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii").splitlines()
                except (psutil.Error, OSError):  # it has just ended
                    continue
                found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
                if rank is not None and found:
                    peaks[rank] = max(peaks.get(rank, 0), found[0])
            time.sleep(0.05)
    if launcher.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {launcher.returncode}")
    return peaks


def draw(points: list[dict[str, Any]]) -> Figure:
    """Memory of a rank, and what it gets and sends in a step of stage 2, against ranks."""
    figure = Figure(figsize=(7.2, 2.8), facecolor="white", layout="constrained")
    memory, wire = figure.subplots(1, 2)
    for axes in (memory, wire):
        style(axes)
        axes.set(xscale="log", yscale="log", xticks=RANKS, xticklabels=map(str, RANKS))
        axes.minorticks_off()
        axes.set_xlabel("ranks", fontsize=FONT - 1, color=INK)
    for shape in SHAPES:
        own = [p for p in points if p["shape"] == shape]
        line = {"color": COLOURS[shape], "label": shape, "marker": "o", "markersize": 3}
        memory.plot([p["ranks"] for p in own], [p["memory"] / 2**30 for p in own], **line)
        several = [p for p in own if p["ranks"] > 1]
        wire.plot([p["ranks"] for p in several], [p["wire"]["finetune"] / 2**30 for p in several], **line)
    memory.axhline(ACCELERATORS["h100"].memory / 2**30, color=INK, linewidth=0.7, linestyle=":")
    memory.set_ylabel("GiB of a rank (dotted: H100)", fontsize=FONT - 1, color=INK)
    wire.set_ylabel("GiB a stage 2 step and rank", fontsize=FONT - 1, color=INK)
    memory.legend(fontsize=FONT - 2, frameon=False)
    return figure


def main() -> None:
    """Do the parts that were asked for, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("counted", "measured", "none"))
    only = parser.parse_args().only
    parts = {"counted": count, "measured": lambda: [measure(ranks) for ranks in (1, 2)]}
    for name, part in parts.items():
        if only in (None, name):
            results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
            results[name] = part()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(results[name]), flush=True)
    points = json.loads(RESULTS.read_text(encoding="utf-8"))["counted"]
    FIGURE.write_text(as_svg(draw(points), salt="scale-ranks") + "\n", encoding="utf-8", newline="\n")
    print(FIGURE)


if __name__ == "__main__":
    main()
