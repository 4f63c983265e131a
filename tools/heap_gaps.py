"""What glibc's heap takes over what is in use in it: `python tools/heap_gaps.py llama-lora-only`.

Steps of stage 2 of a run of tools/plan_memory.py, in this process, on a model of random weights and packed
documents of 150 tokens (`--document`). At every operator glibc's mallinfo2 is asked how much of its heap is
in use, how much lies free between, and how much is mapped apart. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise.config import RunConfig, parse_assignments
from equipoise.layers.interface import mixers_of
from equipoise.models.surgery import hybridize
from equipoise.planning import simulate
from equipoise.train.recipes import load_recipe
from plan_memory import TESTED, settings_of

STEPS, MIB = 2, 2**20


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2; arena: bytes of heaps, hblkhd: mapped apart, uordblks: of heaps in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
            "keepcost",
        )
    ]  # fmt: skip


def asked() -> dict[str, int]:
    """MiB of glibc's heaps, of what is in use in them, and mapped apart."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallInfo
    found = ask()
    return {"heap": found.arena // MIB, "in use": found.uordblks // MIB, "apart": found.hblkhd // MIB}


class Watched(TorchDispatchMode):
    """Remembers what glibc says when it holds most."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        now = asked()
        if now["heap"] + now["apart"] > sum(self.most.get(name, 0) for name in ("heap", "apart")):
            self.most = now
        return result


def model_of(name: str) -> tuple[Any, RunConfig]:
    """A run's model, ready for stage 2, and its recipe."""
    chosen = TESTED[name]
    run = load_recipe(chosen.recipe, parse_assignments(settings_of(chosen)))
    config = AutoConfig.for_model(chosen.family, **chosen.sizes)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if run.hybrid is not None:
        hybridize(model, run.hybrid, check=False)
    simulate._prepare(model, run, "finetune")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model, run


def main() -> None:
    """Take steps, and print what was held when most was held, beside what was held before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=tuple(TESTED))
    parser.add_argument("--document", type=int, default=150, help="tokens of a document")
    given = parser.parse_args()
    model, run = model_of(given.name)
    assert run.finetune is not None
    rows, length = run.finetune.batch_size, run.data.context_length
    place = torch.arange(length).expand(rows, length)
    tokens = torch.randint(0, model.config.vocab_size, (rows, length))
    batch = {
        "input_ids": tokens, "labels": tokens, "segment_ids": (place // given.document).contiguous(),
        "position_ids": (place % given.document).contiguous(),
    }  # fmt: skip
    before = asked()
    print(f"layers {model.config.num_hidden_layers}, mixers {len(mixers_of(model))}; before: {before}")
    with simulate.Counted() as nothing:
        pass
    for step in range(STEPS):
        with Watched() as watched:
            simulate._run(model, run, "finetune", batch, nothing)
        most = {name: value - before[name] for name, value in watched.most.items()}
        ratio = most["heap"] / most["in use"]
        print(f"step {step + 1}, MiB at its most above that: {most}; heap over in use {ratio:.2f}")


if __name__ == "__main__":
    main()
