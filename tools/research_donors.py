"""Donors that recall over 2,048 tokens, for docs/research/02-equal-bytes.md.

    python tools/research_donors.py source          # or: docstrings
    python tools/frontier.py run donor --donor source --length 2048     # what it recalls

`source` is the demo's donor, trained on Python's sources, continued; `docstrings` is another: trained on
scipy's docstrings from the start, wider, with two query heads for each key/value head. Both still gain from
reading more, and so does whatever is converted of them; `settled-source` and `settled-docstrings` have read
on. `large` has 54M parameters, is meant for a GPU, and has not been trained yet. They are made on the spot
and cached, like the demo's. Texts get longer step by step, to 2,048 tokens, and have 4 to 40 pairs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import AutoConfig, LlamaForCausalLM, set_seed

from equipoise import __version__
from equipoise.data.sources import load_documents
from equipoise.data.token_cache import default_cache_dir
from equipoise.demo_donor import DonorSettings, cached_donor, train_donor, train_tokenizer
from equipoise.files import move_directory, write_text
from equipoise.recall_donor import PairText, loss_weights, pair_text, train_in_order

app = typer.Typer(add_completion=False, no_args_is_help=True)
WORDS, LONGEST = 64, 2048
"""Keys, and values, added to the vocabulary; tokens of the longest texts."""


@dataclass(frozen=True)
class Part:
    """Steps of one kind of text: ``repeated`` or ``pairs``."""

    kind: str
    steps: int
    rows: int
    length: int


CURRICULUM = (
    Part("repeated", 110, 8, 512), Part("pairs", 170, 8, 512), Part("pairs", 80, 4, 1024),
    Part("pairs", 240, 2, 2048),
)  # fmt: skip

READING = (Part("pairs", 35, 8, 512), Part("pairs", 5, 2, 2048)) * 40
"""What a donor that has settled has read besides: mostly of 512 tokens, as those of 2,048 take longer
a token; every eighth step of those, so that reach is not forgotten."""


@dataclass(frozen=True)
class ResearchDonor:
    """How a donor is made; `equipoise.recall_donor.RecallDonorSettings` says what the figures are."""

    text: str
    base: DonorSettings
    kv_heads: int
    curriculum: tuple[Part, ...] = CURRICULUM
    answer_weight: float = 0.5
    learning_rate: float = 1e-2
    embedding_learning_rate: float = 4e-3
    rope_theta: float = 1e5
    seed: int = 0


_ONCE = {
    "source": ResearchDonor("stdlib", DonorSettings(), kv_heads=4),
    "docstrings": ResearchDonor(
        "docstrings",
        DonorSettings(hidden_size=192, intermediate_size=512, heads=6, seed=1),
        kv_heads=3,
        curriculum=(
            Part("repeated", 240, 16, 256),
            Part("pairs", 260, 8, 512),
            Part("pairs", 80, 4, 1024),
            Part("pairs", 240, 2, 2048),
        ),
        learning_rate=6e-3, embedding_learning_rate=3e-3, seed=1,
    ),
    "large": ResearchDonor(
        "stdlib",
        DonorSettings(
            hidden_size=896, intermediate_size=2304, layers=6, heads=14, steps=900, batch_size=64,
            learning_rate=3e-3, embedding_learning_rate=2e-3, seed=2,
        ),
        kv_heads=7,
        curriculum=(
            Part("repeated", 240, 16, 512),
            Part("pairs", 260, 16, 512),
            Part("pairs", 80, 8, 1024),
            Part("pairs", 140, 4, 2048),
        ),
        learning_rate=4e-3, embedding_learning_rate=2e-3, seed=2,
    ),
}  # fmt: skip
DONORS = _ONCE | {
    f"settled-{name}": replace(_ONCE[name], curriculum=(*_ONCE[name].curriculum, *READING))
    for name in ("source", "docstrings")
}


def docstrings() -> Path:
    """A file of scipy's docstrings, one module a line; its text is prose with examples."""
    found = importlib.util.find_spec("scipy")
    if found is None or found.origin is None:
        raise typer.BadParameter(
            "scipy is not installed, and its docstrings are the text: pip install scipy."
        )
    root, lines = Path(found.origin).parent, list[str]()
    for path in sorted(root.rglob("*.py")):
        if "tests" not in path.parts and (parts := list(_docstrings_of(path))):
            lines.append(json.dumps({"text": "\n\n".join(parts)}))
    text = "\n".join(lines) + "\n"
    place = (
        default_cache_dir() / "donors" / f"docstrings-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    )
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, text)
    return place


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) > 200:
                yield text


def source_of(name: str) -> str:
    """What `equipoise.data.sources.load_documents` reads a donor's text from."""
    return str(docstrings()) if DONORS[name].text == "docstrings" else DONORS[name].text


def donor_text(name: str, place: Path, *, split: str, seed: int, length: int) -> PairText:
    """Texts in a donor's tokens."""
    return pair_text(place, split=split, seed=seed, source=source_of(name), words=WORDS, length=length)


class _Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One batch an item, in the order of the curriculum, as rows get longer."""

    def __init__(self, texts: PairText, donor: ResearchDonor) -> None:
        self.donor = donor
        self.steps = list[tuple[Part, int]]()  # and its first row: what comes back goes on where it was
        drawn = Counter[tuple[str, int]]()
        for part in donor.curriculum:
            for _ in range(part.steps):
                self.steps.append((part, drawn[part.kind, part.length]))
                drawn[part.kind, part.length] += part.rows
        self.texts = {
            length: replace(texts, length=length, shown_once=(4, 40) if length > 512 else (10, 10))
            for length in {part.length for part in donor.curriculum}
        }

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        part, first = self.steps[index]
        texts = self.texts[part.length]
        draw = texts.repeated if part.kind == "repeated" else texts.pairs
        rows = [draw(first + row) for row in range(part.rows)]
        weights = [loss_weights(row, texts.words, self.donor.answer_weight) for row in rows]
        return {
            "input_ids": torch.from_numpy(np.stack(rows)),
            "weights": torch.from_numpy(np.stack(weights)),
        }


def _as_it_is(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return items[0]


def research_donor(name: str, console: Console) -> Path:
    """Directory of a donor, trained if it is not in the cache yet."""
    donor, source = DONORS[name], source_of(name)
    folder = default_cache_dir() / "donors"
    known = json.dumps([asdict(donor), WORDS, source, torch.__version__, __version__])
    place = folder / f"research-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    if (place / "config.json").is_file():
        console.print(f"donor {name}: {place} (cached)", soft_wrap=True)
        return place
    base = (
        cached_donor(donor.base, console)
        if donor.base == DonorSettings()
        else _based_on(donor, source, place, console)
    )
    model, texts = _continued(name, base, console)
    staging = place.with_name(place.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    texts.tokenizer.save_pretrained(staging)
    move_directory(staging, place)
    return place


def _based_on(donor: ResearchDonor, source: str, place: Path, console: Console) -> Path:
    base = place.with_name(place.name + "-base")
    if not (base / "config.json").is_file():
        documents = load_documents(source, split="train")
        tokenizer = train_tokenizer(documents["text"], donor.base.vocabulary)
        train_donor(
            donor.base, tokenizer, console, documents=documents, kv_heads=donor.kv_heads
        ).save_pretrained(base)
        tokenizer.save_pretrained(base)
    return base


def _continued(name: str, base: Path, console: Console) -> tuple[LlamaForCausalLM, PairText]:
    donor = DONORS[name]
    set_seed(donor.seed)
    config: Any = AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_theta": donor.rope_theta, "rope_type": "default"}
    config.max_position_embeddings = LONGEST
    model = LlamaForCausalLM.from_pretrained(base, config=config)
    texts = donor_text(name, base, split="train", seed=donor.seed, length=LONGEST)
    model.resize_token_embeddings(len(texts.tokenizer), mean_resizing=False)
    batches = _Batches(texts, donor)
    rates = replace(
        donor.base, learning_rate=donor.learning_rate, embedding_learning_rate=donor.embedding_learning_rate
    )
    trained = train_in_order(
        model, batches, rates, console, name=f"donor {name}", steps=len(batches), batch_size=1,
        seed=donor.seed, collator=_as_it_is,
    )  # fmt: skip
    return trained, texts


@app.command()
def main(name: str) -> None:
    """Train a donor, or say where it is."""
    if name not in DONORS:
        raise typer.BadParameter(f"expected one of {', '.join(DONORS)}, got {name!r}.")
    research_donor(name, Console(stderr=True))


if __name__ == "__main__":
    app()
