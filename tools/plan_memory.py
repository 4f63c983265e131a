"""Hold `equipoise plan` to conversions: `python tools/plan_memory.py --output docs/results/plan-memory.json`.

Each run makes a donor of random weights, asks for the plan, converts in a process of its own and reads that
process's VmHWM, the most it ever had resident. Linux only. `--set calibration` runs those that the constants
of `equipoise.planning.memory` were fitted on; no run is in both sets.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from equipoise.config import parse_assignments
from equipoise.planning.plan import plan_conversion
from equipoise.train.recipes import load_recipe

STEPS = 1
CHILD = """
import sys
from pathlib import Path
from equipoise.cli import app
try:
    app(sys.argv[2:], standalone_mode=False)
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    Path(sys.argv[1]).write_text(str(1024 * int(peak)))
"""


@dataclass(frozen=True)
class Run:
    """A donor's configuration, its dtype on disk, a recipe and settings."""

    family: str
    sizes: dict[str, Any]
    dtype: str
    recipe: str
    settings: list[str] = field(default_factory=list)


def sizes(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    """The fields that most families share; heads of 64."""
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 64,
        "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def batch(rows: int, length: int, *more: str) -> list[str]:
    """Settings of both stages' micro batch, and others."""
    stages = [f"{stage}.batch_size={rows}" for stage in ("transfer", "finetune")]
    return [f"data.context_length={length}", *stages, *more]


UNWATCHED, CHECKPOINTING = "watch=null", "gradient_checkpointing=true"
TESTED = {
    "llama-ssd": Run("llama", sizes(32_000, 512, 1376, 12, 8, 2), "float32", "ssd", batch(4, 512, UNWATCHED)),
    "qwen2-hedgecats": Run(
        "qwen2", sizes(151_936, 256, 704, 6, 4, 1, tie_word_embeddings=True), "bfloat16", "hedgecats",
        batch(4, 256, "watch.rows=2"),
    ),
    "gpt-neox-lolcats": Run(
        "gpt_neox", sizes(50_304, 384, 1536, 10, 6, 6), "float32", "lolcats",
        batch(2, 1024, UNWATCHED, CHECKPOINTING),
    ),
    "llama-lora-only": Run(
        "llama", sizes(16_000, 512, 1376, 10, 8, 8), "bfloat16", "lora-only", batch(2, 2048, UNWATCHED)
    ),
    "gemma3-ssd": Run(
        "gemma3_text", sizes(64_000, 320, 1024, 7, 5, 1, sliding_window=128, query_pre_attn_scalar=64),
        "bfloat16", "ssd", batch(8, 256, UNWATCHED, CHECKPOINTING),
    ),
    "qwen3-hedgecats": Run(
        "qwen3", sizes(24_000, 384, 1024, 8, 6, 2), "float32", "hedgecats", batch(1, 2048, "watch.rows=1")
    ),
}  # fmt: skip
CALIBRATION = {
    "nothing": Run("llama", sizes(512, 64, 64, 1, 1, 1), "float32", "ssd", batch(1, 32, UNWATCHED)),
    "llama-ssd-bf16": Run(
        "llama", sizes(32_000, 1024, 2816, 8, 16, 4), "bfloat16", "ssd", batch(2, 512, UNWATCHED)
    ),
    "llama-ssd-float32": Run(
        "llama", sizes(32_000, 1024, 2816, 6, 16, 4), "float32", "ssd", batch(4, 256, UNWATCHED)
    ),
    "gpt2-lolcats": Run(
        "gpt2", {"vocab_size": 50_257, "n_embd": 384, "n_layer": 6, "n_head": 6}, "float32", "lolcats",
        batch(2, 512, UNWATCHED),
    ),
}  # fmt: skip
SETS = {"tested": TESTED, "calibration": CALIBRATION}


def make_donor(run: Run, folder: Path) -> Path:
    """Write a donor of random weights, a tokenizer of bytes, and as much text as gives few held-out rows."""
    config = AutoConfig.for_model(run.family, **run.sizes)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, run.dtype))
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


def write_text(path: Path, length: int, rows: int) -> Path:
    """Documents of 400 bytes, each a token; 5% are held out, a little more than ``rows`` rows."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(20 * (rows + 1) * length // 400):
            words = " ".join(f"{draw.getrandbits(24):06x}" for _ in range(57))
            file.write(json.dumps({"text": words}) + "\n")
    return path


def settings_of(run: Run) -> list[str]:
    """The settings; without those of a stage that the recipe has not."""
    return [s for s in run.settings if run.recipe != "lora-only" or not s.startswith("transfer.")]


def measure(run: Run, folder: Path, environment: dict[str, str]) -> int:
    """Bytes that a conversion had resident at its most."""
    settings = parse_assignments(run.settings)
    rows = settings["finetune"]["batch_size"]
    text = write_text(folder / "text.jsonl", settings["data"]["context_length"], rows)
    given = [part for setting in settings_of(run) for part in ("--set", setting)]
    arguments = [
        "convert", str(folder), "--recipe", run.recipe, "--output", str(folder / "out"), "--data", str(text),
        "--max-steps", str(STEPS), *given,
    ]  # fmt: skip
    peak = folder / "peak"
    subprocess.run([sys.executable, "-c", CHILD, str(peak), *arguments], check=True, env=environment)
    return int(peak.read_text(encoding="ascii"))


def main() -> None:
    """Run a set, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=tuple(SETS), default="tested")
    parser.add_argument("--only", nargs="*", help="names of runs; all where none are given")
    parser.add_argument("--output", type=Path, help="JSON to write")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, run in SETS[given.set].items():
        if given.only and name not in given.only:
            continue
        rows.append(row_of(name, run))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if given.output is not None:
        given.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| run | predicted, MiB | measured, MiB | ratio | ratio above the libraries |",
        "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        sizes = f"{row['predicted'] / 2**20:,.0f} | {row['measured'] / 2**20:,.0f}"
        lines.append(f"| {row['name']} | {sizes} | {row['ratio']:.2f} | {row['ratio_above_libraries']:.2f} |")
    return "\n".join(lines)


def row_of(name: str, run: Run) -> dict[str, Any]:
    """Predicted and measured peak of one run, in bytes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_donor(run, Path(temporary))
        overrides = parse_assignments(settings_of(run))
        plan = plan_conversion(str(folder), load_recipe(run.recipe, overrides), probe=False)
        measured = measure(run, folder, os.environ | {"EQUIPOISE_CACHE": str(folder / "cache")})
    predicted = plan.memory_bytes
    assert predicted is not None
    return {
        "name": name, "family": run.family, "recipe": run.recipe, "dtype": run.dtype,
        "parameters": plan.parameters, "settings": run.settings, "predicted": predicted,
        "measured": measured, "ratio": predicted / measured, "libraries": plan.libraries_bytes,
        "ratio_above_libraries": (predicted - plan.libraries_bytes) / (measured - plan.libraries_bytes),
    }  # fmt: skip


if __name__ == "__main__":
    main()
