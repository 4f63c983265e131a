"""Hybrids and their rivals at equal bytes and equal training tokens: docs/research/02-equal-bytes.md.

    python tools/frontier.py run equipoise --seed 0      # one run; appends to docs/results/frontier.jsonl
    python tools/frontier.py report                      # the table of all that were run
    python tools/frontier.py against moved-heads:tuned   # differences of likelihood, paired by text
    python tools/frontier.py fingerprint                 # of the texts of each split

The donor is the recall demo's. Answers are read off by teacher forcing: the likeliest token where a value
stands that was shown before. A text is one unit: scores are kept text by text, for intervals.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from equipoise import HybridConfig, branches, hybridize, reach, state_bytes
from equipoise.data.layouts import to_dataset
from equipoise.evaluate.recall_text import Haystack
from equipoise.files import write_text
from equipoise.layers.mixer import AttentionMode
from equipoise.models.allocation import allocate
from equipoise.models.allocation.choosing import curve_of, improved, share_windows
from equipoise.models.allocation.measuring import DonorDivergence
from equipoise.models.branches import converted_mixers
from equipoise.models.layout import linear_head_bytes
from equipoise.ops.eviction import Eviction
from equipoise.recall_donor import (
    CONTEXT,
    PairText,
    RecallDonorSettings,
    loss_weights,
    pair_text,
    recall_donor,
    write_documents,
)
from equipoise.train.convert import convert
from equipoise.train.recipes import load_recipe

app = typer.Typer(add_completion=False, no_args_is_help=True)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "frontier.jsonl"
WINDOWS = RESULTS.with_name("frontier-windows.json")
"""Windows that a search found: it takes minutes, and every seed has the same."""
MOVES, SHARE = 400, 0.12
"""Measurements by which windows are improved, the rivals' and ours; share of bytes for linear branches."""
SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SINKS, TEXTS, SETTLED = 4, 48, 64
"""Sinks of every window; texts that are scored; tokens at a text's start whose likelihood does not count."""
STEPS, ROWS = 800, 4
"""Optimiser steps of all stages together, and rows of 512 tokens in each."""
LAYERS, HEADS, HEAD_DIM = 4, 4, 32
SEEDS = {"search": 99, "test": 2026}
"""Of the texts that are scored. Those of `test` are of files that neither training nor search has seen."""
SCALE: Mapping[str, Any] = {
    "transfer": {"learning_rate": 3e-2, "batch_size": ROWS},
    "finetune": {"learning_rate": 5e-4, "batch_size": ROWS, "map_learning_rate": 1e-2},
}
"""What this donor's size asks for, the same for every run that trains additive states."""
DELTA_SCALE: Mapping[str, Any] = {
    "transfer": {**SCALE["transfer"], "learning_rate": 1e-2},
    "finetune": SCALE["finetune"],
}
"""And for the delta rule."""
ADDITIVE: Mapping[str, Any] = {"state_update": "additive", "feature_map": "hedgehog-joint"}
COMPETING: Mapping[str, Any] = {"mixing": "competing", "gate_value": 1 - 1.5e-8}
PRODUCTS: Mapping[str, Any] = {"feature_map": "dpfp", "write_gate": "quadratic"}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "equipoise": {},
    "additive": {"hybrid": {**ADDITIVE, "feature_multiple": 2}},
    "additive-hedgehog": {"hybrid": {**ADDITIVE, "feature_map": "hedgehog", "feature_multiple": 2}},
    "competing": {"hybrid": {**COMPETING}},
    "competing-two-wide-heads": {
        "hybrid": {**COMPETING, "feature_multiple": 2},
        "allocation": {"linear_share": 2 * SHARE},
    },
    "additive-competing": {
        "hybrid": {**ADDITIVE, "feature_multiple": 2, "mixing": "competing", "gate_value": 0.9997}
    },
    "dpfp": {"hybrid": {**PRODUCTS}},
    "dpfp-linear-writes": {"hybrid": {**PRODUCTS, "write_gate": "per_token"}},
    "dpfp-competing": {"hybrid": {**PRODUCTS, **COMPETING}},
    "dpfp-one-wide-head": {"hybrid": {**PRODUCTS, "feature_multiple": 2}},
    "dpfp-one-wide-head-competing": {"hybrid": {**PRODUCTS, **COMPETING, "feature_multiple": 2}},
    "fixed-gate": {"hybrid": {"gate": "fixed"}},
    "full-writes": {"hybrid": {"write_gate": "none"}},
    "even-windows": {},
    "no-summaries": {"allocation": {"elsewhere": None}},
    "one-head": {"allocation": {"linear_share": SHARE / 2}},
    "one-wide-head": {"hybrid": {"feature_multiple": 2}},
    "two-wide-heads": {"hybrid": {"feature_multiple": 2}, "allocation": {"linear_share": 2 * SHARE}},
    "far-3": {"finetune": {"objectives": {"distillation": 1.0, "far-distillation": 3.0}}},
    "no-far": {"finetune": {"objectives": {"distillation": 1.0}}},
    "next-token": {"finetune": {"objectives": {"next-token": 1.0}}},
    "maps-frozen": {"finetune": {"train_maps": False}},
    "dropout": {"finetune": {"window_dropout": {"probabilities": [0.5]}}},
}
"""`equipoise`, and the same without one ingredient or with another."""


def texts_of(donor: Path, split: str) -> PairText:
    """Texts of one split: `train`; `search`, the demo's validation files; `test`, Python's own test suite."""
    if split != "test":
        return pair_text(donor, split={"search": "validation"}.get(split, split), seed=SEEDS.get(split, 0))
    texts = pair_text(donor, split="validation", seed=SEEDS[split])
    root = Path(sysconfig.get_path("stdlib")) / "test"
    files = [path for path in sorted(root.glob("test_*.py")) if path.stat().st_size < 100_000]
    if not files:
        raise typer.BadParameter(f"{root} has no tests: this Python came without its test suite.")
    chosen = [path for path in files if int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % 5 == 0]
    documents = to_dataset(
        ({"text": path.read_text(encoding="utf-8", errors="ignore")} for path in chosen), "text"
    )
    texts.haystack = Haystack.of(documents["text"], texts.tokenizer, len(texts.tokenizer))
    return texts


def rows_of(texts: PairText, count: int, first: int = 0) -> NDArray[np.int64]:
    """Texts with pairs [count, 512]."""
    return np.stack([texts.pairs(first + index) for index in range(count)])


def asked(row: NDArray[np.int64], words: tuple[int, ...]) -> list[tuple[int, int]]:
    """(position of a value shown before, distance to where its key was shown last)."""
    seen: dict[int, int] = {}
    found: list[tuple[int, int]] = []
    for place in np.flatnonzero(np.isin(row, words)):
        key = int(row[place - 1])
        if key in seen:
            found.append((int(place), int(place) - seen[key]))
        seen[key] = int(place)
    return found


@torch.no_grad()
def scored(model: PreTrainedModel, texts: PairText, state: AbstractContextManager[None]) -> dict[str, Any]:
    """Likelihood of text (nats per token, by text) and answers (distance, right; by text)."""
    rows, nll, answers = rows_of(texts, TEXTS), list[float](), list[list[tuple[int, int]]]()
    with state:
        for start in range(0, TEXTS, 8):
            batch = torch.from_numpy(rows[start : start + 8])
            logits = model(input_ids=batch, use_cache=False).logits.log_softmax(-1)
            for row, own in zip(rows[start : start + 8], logits, strict=True):
                text = loss_weights(row, texts.words, 0.0) > 0
                text[:SETTLED] = False
                text[np.flatnonzero(np.isin(row, texts.words)) - 1] = False  # keys are no text either
                places = np.flatnonzero(text)
                nll.append(-float(own[places - 1, torch.from_numpy(row[places])].mean()))
                answers.append(
                    [(far, int(int(own[at - 1].argmax()) == row[at])) for at, far in asked(row, texts.words)]
                )
    return {"nll": nll, "answers": answers}


def even(tokens: int) -> HybridConfig:
    """Windows and sinks, the same in every layer."""
    return HybridConfig(window=tokens - SINKS, sinks=SINKS, feature_map=None)


def digest(donor: Path) -> str:
    """Of the donor's weights. Training is not the same bit for bit on every processor, so that machines which
    train it anew have donors of one name and about one quality, but not one donor."""
    return hashlib.sha256((donor / "model.safetensors").read_bytes()).hexdigest()[:12]


def searched(donor: Path, sought: str, search: Callable[[], Any]) -> Any:
    """What a search found on a donor, or had found before."""
    key = f"{digest(donor)} {sought}"
    known = json.loads(WINDOWS.read_text(encoding="utf-8")) if WINDOWS.exists() else {}
    if key not in known:
        found = search()
        # another run may have found something meanwhile
        known = json.loads(WINDOWS.read_text(encoding="utf-8")) if WINDOWS.exists() else {}
        known[key] = found
        write_text(WINDOWS, json.dumps(known, indent=1))
    return known[key]


def measured_rows(donor: Path) -> dict[str, torch.Tensor]:
    """Training rows that windows are searched on, ours and the rivals'."""
    return {"input_ids": torch.from_numpy(rows_of(pair_text(donor, split="train", seed=1), 16))}


def moved(donor: Path, tokens: int, *, by_head: bool) -> HybridConfig:
    """The same bytes moved between layers or heads: shared by worth, then improved by moves."""
    each = HEADS if by_head else 1

    def search() -> list[list[int]]:
        model: Any = hybridize(AutoModelForCausalLM.from_pretrained(donor).eval(), even(tokens), check=False)
        measure = DonorDivergence(model, measured_rows(donor), batch_size=8)
        worth = measure.worth(SIZES, sinks=SINKS)
        units = worth.flatten(0, 1) if by_head else worth.sum(1)
        curves = [curve_of(values, SIZES) for values in units.tolist()]
        starts = [share_windows(curves, len(curves) * (tokens - SINKS)), [tokens - SINKS] * len(curves)]

        def loss(windows: list[int]) -> float:
            layers = [windows[i : i + each] for i in range(0, len(windows), each)]
            return measure.windowed(layers if by_head else windows, sinks=SINKS)

        start = min(starts, key=loss)
        best = improved(start, loss, smallest=2, longest=CONTEXT, measurements=MOVES)
        return [best[i : i + each] * (HEADS // each) for i in range(0, len(best), each)]

    layers = searched(donor, f"{tokens} {'heads' if by_head else 'layers'}", search)
    own: dict[int, dict[str, Any]] = {
        i: {"window": max(of), **({"head_windows": of} if len(set(of)) > 1 else {})}
        for i, of in enumerate(layers)
    }
    return HybridConfig(window=max(map(max, layers)), sinks=SINKS, feature_map=None, per_layer=own)


def converted(
    donor: Path, settings: dict[str, Any], recipe: str, seed: int, console: Console
) -> PreTrainedModel:
    """A conversion by the ordinary way, on texts with pairs."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        write_documents(pair_text(donor, split="train", seed=1000 + seed), data, STEPS * ROWS)
        run = load_recipe(
            recipe, {**settings, "data": {"source": str(data), "context_length": CONTEXT}, "watch": None}
        )
        convert(str(donor), run, Path(folder) / "out", seed=seed, console=console)
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "out").eval()


def shared_out(
    donor: Path, changed: dict[str, Any], allocation: Mapping[str, Any], bytes_: int, *, evenly: bool
) -> dict[str, Any]:
    """The same settings with windows and linear heads, searched once for all runs of one head size."""
    run = load_recipe("equipoise", {"hybrid": changed})
    assert run.hybrid is not None
    assert run.allocation is not None
    hybrid, head = run.hybrid, linear_head_bytes(run.hybrid, HEAD_DIM)
    settings = run.allocation.model_copy(
        update={"state_bytes": bytes_, "linear_share": SHARE, "moves": MOVES, **allocation}
    )

    def search() -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(donor).eval()
        found = allocate(model, measured_rows(donor), hybrid, settings, batch_size=8).hybrid
        return {"window": found.window, "per_layer": found.model_dump(mode="json")["per_layer"]}

    own = json.dumps([settings.linear_share, settings.elsewhere], sort_keys=True)
    found = searched(donor, f"{bytes_} bytes, {head} a linear head, {own}", search)
    if evenly:
        layers = [hybrid.model_copy(update=own) for own in found["per_layer"].values()]
        linear = sum(
            len(of.linear_heads or ()) * linear_head_bytes(of, HEAD_DIM) for of in layers if of.feature_map
        )
        window = (bytes_ - linear) // (LAYERS * HEADS * HEAD_DIM * 4) - SINKS
        dropped = {"window": window, "head_windows": None}
        found = {
            "window": window,
            "per_layer": {layer: {**own, **dropped} for layer, own in found["per_layer"].items()},
        }
    return {**changed, **found}


def settings_of(name: str, bytes_: int, steps: int = STEPS) -> tuple[str, dict[str, Any]]:
    """Recipe and settings of a run that trains both branches."""
    first = steps // 8 if name in ABLATIONS else steps // 4
    half = {"transfer": {"max_steps": first}, "finetune": {"max_steps": steps - first}}
    delta = name in ABLATIONS and "state_update" not in ABLATIONS[name].get("hybrid", {})
    rates = DELTA_SCALE if delta else SCALE
    scale = {stage: {**rates[stage], **half[stage]} for stage in half}
    if name in ABLATIONS:
        own = {part: dict(values) for part, values in ABLATIONS[name].items()}
        merged = {stage: {**scale[stage], **own.pop(stage, {})} for stage in scale}
        hybrid = {"sinks": SINKS, **own.get("hybrid", {})}
        return "equipoise", {**merged, "hybrid": hybrid, "allocation": None}
    # published recipes: a state of D_phi = D in every head, the window takes what is left
    left = (bytes_ - LAYERS * HEADS * HEAD_DIM * (HEAD_DIM + 1) * 4) // (LAYERS * HEADS * HEAD_DIM * 4)
    return name, {**scale, "hybrid": {"window": max(2, left), "feature_multiple": 1}}


def evicting(tokens: int) -> AttentionMode:
    """Heavy hitters in the bytes of so many tokens: 4 more bytes a token held, for its score."""
    held = int(tokens * 128 / 132)
    return AttentionMode("evicting", eviction=Eviction(budget=held, recent=held // 2))


def score_run(name: str, seed: int, tokens: int, split: str, steps: int, console: Console) -> dict[str, Any]:
    """One line of results."""
    donor = recall_donor(RecallDonorSettings(), console)
    texts = texts_of(donor, split)
    plain: Any = AutoModelForCausalLM.from_pretrained(donor).eval()
    bytes_ = state_bytes(hybridize(plain, even(tokens), check=False))
    base, _, how = name.partition(":")
    state: AbstractContextManager[None] = nullcontext()
    if base == "donor":
        model, state = plain, branches(plain, "softmax")
    elif base == "heavy-hitters":
        model, state = plain, branches(plain, evicting(tokens))
    elif base in ("even", "moved", "moved-heads"):
        config = even(tokens) if base == "even" else moved(donor, tokens, by_head=base == "moved-heads")
        if how == "tuned":
            hybrid = config.model_dump(mode="json")
            tuned = {**SCALE["finetune"], "max_steps": steps, "objectives": {"distillation": 1.0}}
            model = converted(donor, {"hybrid": hybrid, "finetune": tuned}, "swa-sinks", seed, console)
        else:
            model = hybridize(AutoModelForCausalLM.from_pretrained(donor).eval(), config, check=False)
    else:
        recipe, settings = settings_of(base, bytes_, steps)
        if base in ABLATIONS:
            own = ABLATIONS[base].get("allocation", {})
            settings["hybrid"] = shared_out(
                donor, settings["hybrid"], own, bytes_, evenly=base == "even-windows"
            )
        model = converted(donor, settings, recipe, seed, console)
    facts = {
        "bytes": bytes_ if base in ("donor", "heavy-hitters") else state_bytes(model),
        "reach": reach(model),
    }
    entry: dict[str, Any] = {"run": name, "donor": digest(donor), "seed": seed, "tokens": tokens}
    entry |= {"split": split, **facts}
    windows = [mixer.config.head_windows or mixer.config.window for mixer in converted_mixers(model)]
    entry |= {"windows": windows, "steps": steps}
    entry["both"] = scored(model, texts, state)
    if any(mixer.has_both for mixer in converted_mixers(model)):
        for branch in ("window", "linear"):
            entry[branch] = scored(model, texts, branches(model, branch, reading="renormalised"))
    return entry


# ---- the command line

Split = Annotated[str, typer.Option(help="search or test.")]


@app.command()
def run(
    name: Annotated[
        str,
        typer.Argument(help="donor, heavy-hitters, even, moved, moved-heads, even:tuned, …, or a recipe."),
    ],
    seed: int = 0,
    tokens: Annotated[int, typer.Option(help="Budget: this many tokens of K and V a head and layer.")] = 36,
    split: Split = "search",
    steps: Annotated[int, typer.Option(help="Of all stages together.")] = STEPS,
    output: Path = RESULTS,
) -> None:
    """Make one model, score it, and append a line to the results."""
    entry = score_run(name, seed, tokens, split, steps, Console(stderr=True))
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    report(output)


@app.command()
def report(output: Path = RESULTS) -> None:
    """Everything that was run, as a table: means over texts, 95% bootstrap intervals over texts and seeds."""
    entries = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, str, int, str, int], list[dict[str, Any]]] = {}
    for entry in entries:  # of different donors nothing is comparable
        kind = (entry["donor"], entry["split"], entry["tokens"], entry["run"], entry["steps"])
        groups.setdefault(kind, []).append(entry)
    table = Table(box=None)
    for title in (
        "donor",
        "split",
        "tokens",
        "run",
        "steps",
        "seeds",
        "bytes",
        "windows",
        "NLL",
        "recall within",
        "beyond",
        "window",
        "linear",
    ):
        table.add_column(title, no_wrap=True)
    for (donor, split, tokens, name, steps), of in sorted(groups.items()):
        # one line for all: how far windows of this budget reach, whatever their shape
        limit = LAYERS * (tokens - SINKS - 1)
        cells = [interval([entry["both"]["nll"] for entry in of])]
        cells += [recall(of, "both", (0, limit)), recall(of, "both", (limit, CONTEXT))]
        cells += [
            recall(of, branch, (limit, CONTEXT)) if branch in of[0] else "" for branch in ("window", "linear")
        ]
        windows = " ".join(map(shown, of[0]["windows"])) if name != "donor" else ""
        counts = [str(tokens), name, str(steps), str(len(of)), f"{of[0]['bytes']:,}"]
        table.add_row(donor, split, *counts, windows, *cells)
    Console(width=240).print(table)


@app.command()
def against(
    rival: Annotated[str, typer.Argument(help="A run, such as moved-heads:tuned.")], output: Path = RESULTS
) -> None:
    """Likelihood of text, less the rival's on the same donor and texts: paired, 95% bootstrap intervals."""
    groups: dict[tuple[str, str, int, str, int], list[list[float]]] = {}
    for entry in map(json.loads, output.read_text(encoding="utf-8").splitlines()):
        kind = (entry["donor"], entry["split"], entry["tokens"], entry["run"], entry["steps"])
        groups.setdefault(kind, []).append(entry["both"]["nll"])
    table = Table("donor", "split", "tokens", "run", "steps", "seeds", f"nats more than {rival}", box=None)
    for (*same, name, steps), values in sorted(groups.items()):
        others = [of for kind, found in groups.items() if kind[:4] == (*same, rival) for of in found]
        if others and name != rival:
            apart = np.array(values) - np.array(others).mean(0)  # seeds of two runs have nothing in common
            table.add_row(*map(str, same), name, str(steps), str(len(values)), interval(apart.tolist()))
    Console(width=160).print(table)


def shown(windows: int | list[int]) -> str:
    """A layer's window, or those of its heads."""
    return str(windows) if isinstance(windows, int) else "/".join(map(str, windows))


def interval(values: list[list[float]]) -> str:
    """Mean of [seeds][texts], and its interval."""
    whole = np.array(values)
    generator = np.random.default_rng(0)
    draws = [
        whole[generator.integers(0, len(whole), len(whole))][
            :, generator.integers(0, whole.shape[1], whole.shape[1])
        ].mean()
        for _ in range(2000)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{whole.mean():.3f} [{low:.3f}, {high:.3f}]"


def recall(entries: list[dict[str, Any]], state: str, span: tuple[int, int]) -> str:
    """Share of answers that are right at these distances, and its interval over texts and seeds."""
    counts = np.array(
        [
            [
                [
                    sum(right for far, right in text if span[0] < far <= span[1]),
                    sum(span[0] < far <= span[1] for far, _ in text),
                ]
                for text in entry[state]["answers"]
            ]
            for entry in entries
        ],
        dtype=np.float64,
    )  # [seeds, texts, (right, asked)]
    generator = np.random.default_rng(0)
    draws: list[float] = []
    for _ in range(2000):
        seeds, texts = (generator.integers(0, n, n) for n in counts.shape[:2])
        right, all_ = counts[seeds][:, texts].sum((0, 1))
        draws.append(float(right / max(1, all_)))
    right, all_ = counts.sum((0, 1))
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{right / max(1, all_):.3f} [{low:.3f}, {high:.3f}]"


@app.command()
def fingerprint() -> None:
    """SHA-256 of the scored texts of each split: what was frozen before the search."""
    donor = recall_donor(RecallDonorSettings(), Console(stderr=True))
    for split in ("search", "test"):
        rows = rows_of(texts_of(donor, split), TEXTS)
        sys.stdout.write(f"{split} {hashlib.sha256(rows.tobytes()).hexdigest()}\n")


if __name__ == "__main__":
    app()
