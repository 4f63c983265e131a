"""What a state of F features can look up, if lookups are all it sees: docs/research/02-equal-bytes.md.

    python tools/lookup_maps.py docs/results/lookup-maps.json            # run what the file lacks
    python tools/lookup_maps.py docs/results/lookup-maps.json --tables   # print the table

The head of donor `source` that looks pairs up, its q, k and v untouched, and of each text the pairs alone:
every value is written with one learned strength, nothing else is, and every key that was shown before is
asked. What is asked of the maps is then only to tell keys apart. An answer is right where the read is nearest
to a value of the right word among all shown before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from equipoise import hybridize
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.branches import capture
from equipoise.ops.delta import delta_attention
from equipoise.recall_donor import PairText
from frontier_shapes import even
from frontier_texts import MORE_PAIRS, Setting, rows_of, with_more_pairs
from tables import heading, line, measure_or_print, over_seeds, write

LAYER, HEAD = 3, 2
LENGTH, LEARNED, JUDGED = 1024, 300, 48
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """A map of F features, and what it is trained on: texts a step, steps, and up to how many pairs."""

    feature_map: str
    features: int
    texts: int = 24
    steps: int = 300
    pairs: int = 10
    rate: float = 1e-2

    @property
    def name(self) -> str:
        """As the table says it."""
        seen = f"{self.steps} steps of {self.texts} texts"
        return f"{self.feature_map}, F = {self.features}, {seen}, {self.pairs} pairs"


ARMS = (
    Arm("unit", 32), Arm("hedgehog-joint", 64), Arm("dpfp", 32), Arm("dpfp", 64), Arm("dpfp", 128),
    Arm("dpfp", 64, pairs=MORE_PAIRS), Arm("dpfp", 64, texts=2, steps=75), Arm("dpfp", 64, texts=2),
    Arm("dpfp", 64, texts=2, rate=3e-2),
)  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts in order, P at most.

    Attributes:
        q: of the key before each value [B, P, D].
        k, v: of the value [B, P, D].
        word: of the value [B, P]; -1 where a text has no more pairs.
        again: whether its key was shown before [B, P].
        last: which pair showed it last [B, P].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    word: Tensor
    again: Tensor
    last: Tensor

    def some(self, rows: Tensor) -> Pairs:
        """Of some texts."""
        return Pairs(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


@torch.no_grad()
def taken(model: Any, texts: PairText, count: int) -> Pairs:
    """What the head sees of the pairs of ``count`` texts."""
    seen: list[LayerInputs] = []

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if mixer.layer_idx == LAYER:
            seen.append(inputs)

    found: list[tuple[Tensor, ...]] = []
    for batch in torch.from_numpy(rows_of(texts, count)).split(4):
        seen.clear()
        with capture(model, observer):
            model.get_decoder()(input_ids=batch, use_cache=False)
        q, k, v = (getattr(seen[0], name)[:, HEAD] for name in "qkv")
        for row, *own in zip(batch.numpy(), q, k, v, strict=True):
            places = np.flatnonzero(np.isin(row, texts.words))
            before: dict[int, int] = {}
            last = list[int]()
            for pair, key in enumerate(row[places - 1].tolist()):
                last.append(before.get(key, -1))
                before[key] = pair
            at, shown = torch.from_numpy(places), torch.tensor(last)
            word = torch.from_numpy(row[places])
            found.append((own[0][at - 1], own[1][at], own[2][at], word, shown >= 0, shown.clamp(min=0)))
    q, k, v, word, again, last = zip(*found, strict=True)
    words = pad_sequence(list(word), batch_first=True, padding_value=-1)
    q, k, v, again, last = (pad_sequence(list(of), batch_first=True) for of in (q, k, v, again, last))
    return Pairs(q, k, v, words, again, last)


class State(nn.Module):
    """Maps of queries and keys, and one writing strength."""

    def __init__(self, arm: Arm, head_dim: int, seed: int) -> None:
        super().__init__()
        make = FEATURE_MAPS[arm.feature_map]
        self.phi_q, self.phi_k = make(1, head_dim, arm.features), make(1, head_dim, arm.features).for_keys()
        self.strength = nn.Parameter(torch.tensor(2.0))
        generator = torch.Generator().manual_seed(seed)
        self.phi_q.reset_parameters(generator)
        self.phi_k.reset_parameters(generator)

    def forward(self, pairs: Pairs) -> Tensor:
        """What is read before each pair is written [B, P, D]."""
        asked, written = self.phi_q(pairs.q[:, None]), self.phi_k(pairs.k[:, None])
        written = nn.functional.normalize(written, dim=-1) * self.strength.sigmoid().sqrt()
        written = written * (pairs.word >= 0)[:, None, :, None]
        nothing = torch.zeros_like
        queries = torch.stack([nn.functional.normalize(asked, dim=-1), nothing(asked)], 3).flatten(2, 3)
        keys = torch.stack([nothing(written), written], 3).flatten(2, 3)  # ask, then write
        values = pairs.v[:, None].repeat_interleave(2, 2)
        return delta_attention(values, values, values, queries, keys)[0][:, 0, ::2]


def train(arm: Arm, pairs: Pairs, seed: int) -> State:
    """By Adam with a cosine decay, towards the value that was shown with the key."""
    state = State(arm, pairs.q.shape[-1], seed)
    optimizer = torch.optim.AdamW(state.parameters(), lr=arm.rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arm.steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(arm.steps):
        part = pairs.some(torch.randint(len(pairs.q), (arm.texts,), generator=generator))
        wanted = part.v.gather(1, part.last[..., None].expand_as(part.v))
        loss = (state(part) - wanted).square()[part.again].mean() / part.v.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return state


def right(read: Tensor, pairs: Pairs) -> float:
    """Share of the keys asked again whose read is nearest to the right word's value."""
    alike = torch.einsum("bpd,bsd->bps", read, nn.functional.normalize(pairs.v, dim=-1))
    earlier = torch.ones(alike.shape[1:], dtype=torch.bool).tril(-1)
    nearest = alike.masked_fill(~earlier, -torch.inf).argmax(-1)
    return float((pairs.word.gather(1, nearest) == pairs.word)[pairs.again].double().mean())


def softmax_read(pairs: Pairs) -> Tensor:
    """What the donor's attention reads over the pairs alone."""
    scores = (pairs.q @ pairs.k.mT) * pairs.q.shape[-1] ** -0.5
    earlier = torch.ones(scores.shape[1:], dtype=torch.bool).tril(-1)
    return scores.masked_fill(~earlier, -torch.inf).softmax(-1).nan_to_num() @ pairs.v


def measure(path: Path, console: Console) -> None:
    """Run what the file lacks."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    at = Setting("source", LENGTH, 20)
    done = {(row["donor"], row["arm"], row["seed"]) for row in found}
    model: Any = AutoModelForCausalLM.from_pretrained(at.donor).eval()
    model = hybridize(model, even(at.tokens), check=False)
    search = at.draw("search")
    judged = {10: taken(model, search, JUDGED), MORE_PAIRS: taken(model, with_more_pairs(search), JUDGED)}

    def add(arm: str, seed: int, features: int, reads: dict[int, Tensor]) -> None:
        shares = {f"right {count}": right(reads[count], pairs) for count, pairs in judged.items()}
        found.append({"donor": at.digest, "arm": arm, "seed": seed, "features": features, **shares})
        write(found, path)

    if (at.digest, "softmax", 0) not in done:
        add("softmax", 0, 0, {count: softmax_read(pairs) for count, pairs in judged.items()})
    for seed in SEEDS:
        texts = at.draw("train", seed=3000 + seed)
        few_or_many = replace(texts, shown_once=(4, MORE_PAIRS))
        learned = {10: taken(model, texts, LEARNED), MORE_PAIRS: taken(model, few_or_many, LEARNED)}
        for arm in (arm for arm in ARMS if (at.digest, name_of(arm), seed) not in done):
            start = time.perf_counter()
            state = train(arm, learned[arm.pairs], seed)
            with torch.no_grad():
                add(name_of(arm), seed, arm.features, {n: state(pairs) for n, pairs in judged.items()})
            console.print(f"{found[-1]} ({time.perf_counter() - start:.0f} s)", highlight=False)


def name_of(arm: Arm) -> str:
    """An arm's name, with its rate where that is not the others'."""
    return arm.name if arm.rate == ARMS[0].rate else f"{arm.name}, rate {arm.rate:g}"


def tables(found: list[dict[str, Any]]) -> Iterator[str]:
    """One table; the donor's softmax has no seeds."""
    yield from heading("map and training", "bytes", "right of 10 pairs", f"right of {MORE_PAIRS} pairs")
    columns = ("right 10", f"right {MORE_PAIRS}")
    for row in (row for row in found if row["arm"] == "softmax"):
        yield line("the donor's softmax", "", *(f"{row[name]:.3f}" for name in columns))
    for arm in ARMS:
        rows = [row for row in found if row["arm"] == name_of(arm)]
        if rows:
            values = [over_seeds(np.array([row[name] for row in rows])) for name in columns]
            yield line(name_of(arm), f"{arm.features * 32 * 4:,}", *values)


if __name__ == "__main__":
    measure_or_print(measure, tables)
