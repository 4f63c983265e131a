"""Which linear branches a hybrid listens to, where its windows are not enough.

A branch can know the answer and not be heard: its gate is shut, and another head says it. The loss does not
show that, nor does an average over ordinary text, where windows are enough for nearly every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from equipoise.data.packing import collate
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.branches import converted_mixers, observe, rivals
from equipoise.ops import Branches
from equipoise.train.losses import astray
from equipoise.train.watching import untouched

HARDLY = 0.05
"""Part of a head's output below which its linear branch is hardly heard."""
LEAST_ASTRAY = 1e-4
"""Mean square of what windows lose, in nats, below which they are enough for all that was asked."""
LISTED = 8
"""Heads that are told one by one."""

Heard = dict[int, dict[int, float]]
"""By layer and query head: the linear branch's part of the output."""


def part_of(mixer: HybridMixer, inputs: LayerInputs) -> Float[Tensor, "B h T"]:
    """|linear term| / (|window term| + |linear term|) of the heads with a linear branch, token by token."""
    linear, window = (
        mixer.of_linear_heads(mixer.hybrid(inputs, branches=one)[0]).norm(dim=-1).float()
        for one in (Branches(window=False), Branches(linear=False))
    )
    return linear / (linear + window).clamp_min(torch.finfo(linear.dtype).tiny)


@torch.no_grad()
def heard(model: PreTrainedModel, rows: Sequence[dict[str, Tensor]]) -> Heard:
    """How much of each head's output is its linear branch's, on average over tokens.

    Tokens weigh by the square of how far windows alone lead the donor astray there, KL in nats, as in the
    objective `far-reads`: lookups are few, and text hides them.

    Args:
        model: converted, with a window in every converted layer; unchanged when the call returns.
        rows: packed rows (see `equipoise.data.packing`), looked at one by one: of each, predictions over the
            whole vocabulary are held twice.

    Returns:
        Layers with both branches, but for means of the past where others look things up; nothing where
        windows are enough for all tokens (within their reach, they are).
    """
    asked = rivals(converted_mixers(model))
    if not asked:
        return {}
    sums, total, count = {mixer: torch.zeros(0) for mixer in asked}, 0.0, 0
    with untouched(model):
        model.eval()
        for row in rows:
            batch = collate([row])
            arguments = {name: t.to(model.device) for name, t in batch.items() if name != "labels"}
            weights = astray(model, arguments).square().cpu()
            total, count = total + float(weights.sum()), count + weights.numel()
            for mixer, part in _parts(model, asked, arguments).items():
                own = (weights[:, None] * part).sum((0, 2))
                sums[mixer] = sums[mixer] + own if len(sums[mixer]) else own
    if total < LEAST_ASTRAY * max(1, count):
        return {}
    return {
        mixer.layer_idx: dict(zip(mixer.linear_indices, (sums[mixer] / total).tolist(), strict=True))
        for mixer in asked
    }


def as_json(found: Heard) -> dict[str, dict[str, float]]:
    """The same as `run.json` holds it."""
    return {str(layer): {str(head): part for head, part in of.items()} for layer, of in found.items()}


def _parts(
    model: PreTrainedModel, asked: Sequence[HybridMixer], arguments: Mapping[str, Tensor]
) -> dict[HybridMixer, Tensor]:
    found: dict[HybridMixer, Tensor] = {}

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if mixer in asked:
            found[mixer] = part_of(mixer, inputs).cpu()

    with observe(model, observer, also=True):
        model.base_model(**arguments, use_cache=False)  # what is predicted is not asked
    return found


def tell(found: Heard, console: Console) -> None:
    """Say it in a line, and which heads are hardly heard, if some are and others are not."""
    parts = {(layer, head): part for layer, of in found.items() for head, part in of.items()}
    if not parts:
        return
    if len(parts) <= LISTED:
        each = ", ".join(f"{part:.2f} in layer {i} head {head}" for (i, head), part in parts.items())
    else:
        each = f"{min(parts.values()):.2f} to {max(parts.values()):.2f} in {len(parts)} heads"
    console.print(
        f"linear branch's part of the output where windows lose most: {each}", highlight=False, soft_wrap=True
    )
    deaf = [f"layer {i} head {head}" for (i, head), part in parts.items() if part < HARDLY]
    if deaf:
        shown = ", ".join(deaf[:LISTED]) + (f" and {len(deaf) - LISTED} more" if len(deaf) > LISTED else "")
        console.print(
            f"hardly heard: {shown}. The state is there and paid for, and next to nothing of it is in the "
            "output. Gates that learn stay open at a lower finetune.gate_learning_rate; elsewhere take an "
            "objective that asks the linear branch itself (docs/guides/choosing-a-recipe.md).",
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip
