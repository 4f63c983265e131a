"""The delta rule by chunks in PyTorch against flash-linear-attention's kernels: docs/performance.md.

    python tools/delta_speed.py                 # Llama-3-8B's heads, values halved, in bfloat16

Prints a line of JSON for each length: milliseconds, the best of ``--rounds``, and the largest difference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from equipoise.ops.delta import delta_attention
from equipoise.ops.delta_kernels import unsupported
from equipoise.ops.dispatch import backend


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """The best of some calls, after two that are not timed."""
    times: list[float] = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[2:])


def drawn(heads: int, kv_heads: int, length: int, features: int, value: int) -> list[Tensor]:
    """q, k, v, phi(q), phi(k) in bfloat16; keys of lengths below 1."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(count: int, size: int) -> Tensor:
        return torch.randn(1, count, length, size, generator=generator, device="cuda").bfloat16()

    units = torch.nn.functional.normalize(normal(kv_heads, features).float(), dim=-1)
    phi_k = (0.5 * units).bfloat16()
    return [normal(heads, 8), normal(kv_heads, 8), normal(kv_heads, value), normal(heads, features), phi_k]


def main(
    lengths: str = "2048,8192,32768",
    heads: int = 32,
    kv_heads: int = 8,
    features: int = 256,
    value: Annotated[int, typer.Option(help="Numbers of a value.")] = 64,
    rounds: int = 5,
) -> None:
    """Time both at each length, forward, and forward with backward."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU here.")
    if reason := unsupported(torch.device("cuda"), torch.bfloat16, features, value):
        raise typer.BadParameter(reason)
    for length in map(int, lengths.split(",")):
        inputs = [x.requires_grad_() for x in drawn(heads, kv_heads, length, features, value)]
        sys.stdout.write(json.dumps({"length": length, **compared(inputs, rounds)}) + "\n")
        sys.stdout.flush()


def compared(inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """Milliseconds of both, and how far apart they are."""

    def forward() -> Tensor:
        with torch.no_grad():
            return delta_attention(*inputs)[0]

    def train() -> object:
        out, _ = delta_attention(*inputs)
        return torch.autograd.grad(out.float().square().sum(), inputs[2:])

    found: dict[str, float] = {}
    outs: list[Tensor] = []
    for name, chosen in (("chunks", "walk"), ("kernels", "auto")):
        with backend(chosen):
            outs.append(forward().float())
            found[f"{name} forward"] = milliseconds(forward, rounds)
            found[f"{name} train"] = milliseconds(train, rounds)
    return {**found, "off": ((outs[1] - outs[0]).abs().max() / outs[0].abs().max()).item()}


if __name__ == "__main__":
    typer.run(main)
