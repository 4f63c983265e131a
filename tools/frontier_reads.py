"""Where answers from afar go wrong in a hybrid: in what its state reads, or in what is made of it.

    python tools/frontier.py run narrow --donor source --length 1024 --tokens 20 --steps 600 \\
        --keep out/narrow
    python tools/frontier_reads.py out/narrow --donor source --length 1024 --tokens 20 --limit 102

For each head with a large state: how often, at an answer from beyond ``limit`` tokens, its read is nearest to
a value of the right word among all shown before, how much of the head's output is its (median over answers),
and how often the hybrid answers right where the read is right, and where it is not. With 10 pairs a text and
with 40.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.branches import converted_mixers, observe, rivals
from equipoise.recall_donor import PairText
from equipoise.train.heard import part_of
from equipoise.train.objectives import LINEAR_ALONE
from frontier_texts import MORE_PAIRS, Setting, asked, rows_of, with_more_pairs
from tables import heading, line

Outcome = tuple[bool, bool, float]
"""Of one question: is the read right, is the answer, and how much of the output is the read."""


def read_by(mixer: HybridMixer, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """What the states of a layer read, and the values of the same heads, both [B, h, T, D]."""
    read = mixer.of_linear_heads(mixer.hybrid(inputs, branches=LINEAR_ALONE)[0])
    values = mixer.linear_inputs(inputs).v
    return read, values.repeat_interleave(read.shape[1] // values.shape[1], 1)


def points_at(read: Tensor, values: Tensor) -> int:
    """Index of the value that a read is nearest to, by angle."""
    return int(torch.cosine_similarity(read[None], values, dim=-1).argmax())


@torch.no_grad()
def outcomes(model: Any, texts: PairText, count: int, limit: int) -> dict[tuple[int, int], list[Outcome]]:
    """Of each (layer, head) with a state that keeps to the delta rule."""
    layers = {m.layer_idx: m for m in rivals(converted_mixers(model)) if m.config.state_update == "delta"}
    found: dict[tuple[int, int], list[Outcome]] = {}
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if mixer.layer_idx in layers:
            seen[mixer.layer_idx] = (*read_by(mixer, inputs), part_of(mixer, inputs))

    for rows in np.array_split(rows_of(texts, count), max(1, count // 4)):
        with observe(model, observer):
            said = model(input_ids=torch.from_numpy(rows), use_cache=False).logits.argmax(-1)
        for text, row in enumerate(rows):
            shown = np.flatnonzero(np.isin(row, texts.words))
            for place, far in asked(row, texts.words):
                if far > limit:
                    earlier = shown[shown < place]
                    answer = bool(said[text, place - 1] == row[place])
                    for layer, (reads, values, parts) in seen.items():
                        for at, head in enumerate(layers[layer].linear_indices):
                            nearest = points_at(
                                reads[text, at, place - 1], values[text, at][torch.from_numpy(earlier)]
                            )
                            right = bool(row[earlier[nearest]] == row[place])
                            part = float(parts[text, at, place - 1])
                            found.setdefault((layer, head), []).append((right, answer, part))
    return found


def table(found: dict[int, dict[tuple[int, int], list[Outcome]]]) -> Iterator[str]:
    """By pairs in a text and head."""
    yield from heading(
        "pairs, layer and head", "reads right", "answers right", "read right", "read wrong", "part of output"
    )
    for pairs, heads in found.items():
        for (layer, head), of in sorted(heads.items()):
            reads, answers, parts = np.array(of).T
            where = [answers[reads == right] for right in (True, False)]
            shares = [reads.mean(), answers.mean(), *(w.mean() if len(w) else np.nan for w in where)]
            shares.append(np.median(parts))
            yield line(f"{pairs}, layer {layer}, head {head}", *(f"{share:.3f}" for share in shares))


def main(
    model: Path,
    donor: str = "demo",
    length: int = 512,
    tokens: int = 36,
    limit: Annotated[int, typer.Option(help="Tokens back beyond which answers count.")] = 0,
) -> None:
    """Print a table. Answers right where the read is right, and where it is wrong, have a column each."""
    at = Setting(donor, length, tokens)
    hybrid, search = AutoModelForCausalLM.from_pretrained(model).eval(), at.draw("search")
    texts = {10: search, MORE_PAIRS: with_more_pairs(search)}
    for text in table({pairs: outcomes(hybrid, of, at.texts, limit) for pairs, of in texts.items()}):
        print(text)


if __name__ == "__main__":
    typer.run(main)
