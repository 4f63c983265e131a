"""Hybrids and their rivals at equal bytes and equal training tokens: docs/research/02-equal-bytes.md.

    python tools/frontier.py run equipoise --seed 0      # one run; appends to docs/results/frontier.jsonl
    python tools/frontier.py report                      # the tables of all that were run
    python tools/frontier.py against moved-heads:tuned   # differences of likelihood, paired by text
    python tools/frontier.py fingerprint                 # of the texts of each split

The donor is the recall demo's, or with --donor one of tools/research_donors.py. Answers are read off by
teacher forcing: the likeliest token where a value stands that was shown before. A text is one unit: scores
are kept text by text, for intervals.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

import frontier_report
from equipoise import HybridConfig, branches, hybridize, reach, state_bytes
from equipoise.files import write_text
from equipoise.layers.mixer import AttentionMode
from equipoise.models.allocation import allocate
from equipoise.models.allocation.choosing import curve_of, improved, share_windows, with_fewer_sinks
from equipoise.models.allocation.measuring import DonorDivergence
from equipoise.models.branches import converted_mixers
from equipoise.models.layout import linear_head_bytes
from equipoise.ops.eviction import Eviction
from equipoise.recall_donor import write_documents
from equipoise.train.convert import convert
from equipoise.train.recipes import load_recipe
from frontier_ablations import BEFORE, FIRST, both, changes_of
from frontier_texts import Setting, Split, rows_of, scored, with_more_pairs

app = typer.Typer(add_completion=False, no_args_is_help=True)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "frontier.jsonl"
WINDOWS = RESULTS.with_name("frontier-windows.json")
"""Windows that a search found: it takes minutes, and every seed has the same."""
MOVES, SMALL = 400, 24
"""Measurements by which windows are improved, the rivals' and ours; and budgets of so few tokens had twice
the share of bytes for linear branches before states had half of each value."""
SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
SINKS = 4
"""Of every window, to begin with."""
OF_OLD = "-before"
"""At the end of a run's name: as the recipe and its rivals were until 2026-11-29, 17:00 (`BEFORE`), with four
sinks in every layer; they are measured since, for rivals and for ours."""
STEPS = 800
"""Optimiser steps of all stages together, of 2,048 tokens each."""
SCALE: Mapping[str, Any] = {
    "transfer": {"learning_rate": 3e-2},
    "finetune": {"learning_rate": 5e-4, "map_learning_rate": 1e-2},
}
"""What this donor's size asks for, the same for every run that trains additive states."""
DELTA_SCALE: Mapping[str, Any] = {
    "transfer": {**SCALE["transfer"], "learning_rate": 1e-2},
    "finetune": SCALE["finetune"],
}
"""And for the delta rule."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TUNING: Mapping[str, Mapping[str, float]] = {
    "tuned": {"distillation": 1.0},
    "next-token": {"distillation": 1.0, "next-token": 1.0},
    "next-token-3": {"distillation": 1.0, "next-token": 3.0},
}
"""What windows alone learn from, and its weights, by what stands behind the colon of a run's name."""


def tuning_of(how: str) -> dict[str, Any]:
    """Settings of stage 2 for windows alone, ``next-token-3@2`` with twice the rate of LoRA.

    Raises:
        BadParameter: no tuning has that name, or what follows the @ is not a positive number.
    """
    objectives, at, times = how.partition("@")
    try:
        rate = float(times if at else 1) * SCALE["finetune"]["learning_rate"]
    except ValueError:
        rate = 0.0
    if objectives not in TUNING or not 0 < rate < 1:
        raise typer.BadParameter(
            f"expected one of {', '.join(TUNING)}, @ and by how much its learning rate is multiplied behind "
            f"it or not, got {how!r}."
        )
    return {**SCALE["finetune"], "learning_rate": rate, "objectives": dict(TUNING[objectives])}


def even(tokens: int) -> HybridConfig:
    """Windows and sinks, the same in every layer."""
    return HybridConfig(window=tokens - SINKS, sinks=SINKS, feature_map=None)


def searched(at: Setting, sought: str, search: Callable[[], Any]) -> Any:
    """What a search found on a donor, or had found before."""
    longer = "" if at.length == 512 else f", {at.length} long"
    key = f"{at.digest} {sought}{longer}"
    known = json.loads(WINDOWS.read_text(encoding="utf-8")) if WINDOWS.exists() else {}
    if key not in known:
        found = search()
        # another run may have found something meanwhile
        known = json.loads(WINDOWS.read_text(encoding="utf-8")) if WINDOWS.exists() else {}
        known[key] = found
        write_text(WINDOWS, json.dumps(known, indent=1))
    return known[key]


def measured_rows(at: Setting) -> dict[str, torch.Tensor]:
    """Training rows that windows are searched on, ours and the rivals'."""
    return {"input_ids": torch.from_numpy(rows_of(at.draw("train", seed=1), 4 * at.rows))}


def opened(folder: Path) -> PreTrainedModel:
    """A model, where it runs."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval().to(DEVICE)


def loaded(at: Setting) -> PreTrainedModel:
    """The donor."""
    return opened(at.donor)


def moved(at: Setting, *, by_head: bool, fewer_sinks: bool = True) -> HybridConfig:
    """The same bytes moved between layers or heads: shared by worth, sinks measured, improved by moves."""
    each = at.kv_heads if by_head else 1
    sizes = [size for size in SIZES if size < at.length]

    def search() -> dict[str, list[Any]]:
        model: Any = hybridize(loaded(at), even(at.tokens), check=False)
        measure = DonorDivergence(model, measured_rows(at), batch_size=2 * at.rows)
        worth = measure.worth(sizes, sinks=SINKS)  # of query heads: those of a group share a window
        units = worth.unflatten(1, (each, -1)).sum(2).flatten(0, 1)
        curves = [curve_of(values, sizes) for values in units.tolist()]
        starts = [share_windows(curves, len(curves) * (at.tokens - SINKS)), [at.tokens - SINKS] * len(curves)]

        def by_layer(windows: list[int]) -> list[list[int]]:
            shared = at.kv_heads // each
            return [windows[i : i + each] * shared for i in range(0, len(windows), each)]

        start = min(starts, key=lambda windows: measure.windowed(by_layer(windows), sinks=SINKS))
        layers, sinks = by_layer(start), [SINKS] * at.layers
        if fewer_sinks:
            layers, sinks = with_fewer_sinks(
                layers, SINKS, lambda tried, own: measure.windowed(tried, sinks=own), longest=at.length
            )
        best = improved(
            [window for of in layers for window in of[:each]],
            lambda windows: measure.windowed(by_layer(windows), sinks=sinks),
            smallest=2, longest=at.length, measurements=MOVES,
        )  # fmt: skip
        return {"windows": by_layer(best), "sinks": sinks}

    sinks = ", sinks measured" if fewer_sinks else ""
    found = searched(at, f"{at.tokens} {'heads' if by_head else 'layers'}{sinks}", search)
    own: dict[int, dict[str, Any]] = {
        i: {"window": max(of), "sinks": kept, **({"head_windows": of} if len(set(of)) > 1 else {})}
        for i, (of, kept) in enumerate(zip(found["windows"], found["sinks"], strict=True))
    }
    longest = max(map(max, found["windows"]))
    return HybridConfig(window=longest, sinks=SINKS, feature_map=None, per_layer=own)


def converted(
    at: Setting, settings: dict[str, Any], recipe: str, seed: int, steps: int, console: Console
) -> PreTrainedModel:
    """A conversion by the ordinary way, on texts with pairs."""
    on = at.tuning
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        write_documents(on.draw("train", seed=1000 + seed), data, max(STEPS, steps) * on.rows)
        sized = {
            stage: {**settings[stage], "batch_size": on.rows}
            for stage in ("transfer", "finetune")
            if settings.get(stage) is not None
        }
        source = {"source": str(data), "context_length": on.length}
        stops = (shipped := load_recipe(recipe).finetune) is not None and shipped.early_stopping is not None
        # float32 as on a CPU, wherever it runs; watched only where the recipe stops by what it sees
        own = {"data": source, "watch": {} if stops else None, "precision": "float32"}
        run = load_recipe(recipe, {**settings, **sized, **own})
        convert(str(at.donor), run, Path(folder) / "out", seed=seed, console=console)
        return opened(Path(folder) / "out")


def shared_out(
    at: Setting, changed: dict[str, Any], allocation: Mapping[str, Any], *, evenly: bool
) -> dict[str, Any]:
    """The same settings with windows and linear heads, searched once for all runs of one head size."""
    run = load_recipe("equipoise", {"hybrid": changed})
    assert run.hybrid is not None
    assert run.allocation is not None
    hybrid, head = run.hybrid, linear_head_bytes(run.hybrid, at.head_dim)
    bytes_, allocation = at.tokens * at.token_bytes, dict(allocation)
    share = allocation.pop("linear_share", run.allocation.linear_share) * allocation.pop("heads", 1)
    settings = run.allocation.model_copy(
        update={"state_bytes": bytes_, "linear_share": share, "moves": MOVES, **allocation}
    )

    def search() -> dict[str, Any]:
        found = allocate(loaded(at), measured_rows(at), hybrid, settings, batch_size=2 * at.rows).hybrid
        own = {"feature_multiple": found.feature_multiple} if settings.narrower else {}
        return {"window": found.window, **own, "per_layer": found.model_dump(mode="json")["per_layer"]}

    small = settings.elsewhere and {k: v for k, v in settings.elsewhere.items() if k != "value_divisor"}
    own = json.dumps([settings.linear_share, small], sort_keys=True)
    if settings.weigh_lookups:
        own += f", lookups from {settings.least_importance}"
    if settings.narrower:
        own += ", or narrower"
    sinks = ", sinks measured" if settings.fewer_sinks else ""
    shared = ", one state a key/value head" if at.heads > at.kv_heads and hybrid.map_heads != "query" else ""
    found = searched(at, f"{bytes_} bytes, {head} a linear head{shared}, {own}{sinks}", search)
    for layer in found["per_layer"].values():  # windows are found once for either
        layer["rotary"] = hybrid.rotary
    if evenly:
        width = {"feature_multiple": found.get("feature_multiple", hybrid.feature_multiple)}
        layers = [hybrid.model_copy(update={**width, **own}) for own in found["per_layer"].values()]
        linear = sum(
            len(of.linear_heads or ()) * linear_head_bytes(of, at.head_dim) for of in layers if of.feature_map
        )
        window = (bytes_ - linear) // at.token_bytes - SINKS
        dropped = {"window": window, "sinks": SINKS, "head_windows": None}
        found = {
            **found,
            "window": window,
            "per_layer": {layer: {**own, **dropped} for layer, own in found["per_layer"].items()},
        }
    return {**changed, **found}


def settings_of(name: str, at: Setting, steps: int = STEPS) -> tuple[str, dict[str, Any]]:
    """Recipe and settings of a run that trains both branches."""
    of_old, name = name.endswith(OF_OLD), name.removesuffix(OF_OLD)
    changes = changes_of(name)
    own = [FIRST[of] for of in name.split("+") if of in FIRST]
    first = steps // (own or [4 if changes is None else 8 if of_old else 60])[0]
    half = {"transfer": {"max_steps": first}, "finetune": {"max_steps": steps - first}}
    delta = changes is not None and "state_update" not in changes.get("hybrid", {})
    rates = DELTA_SCALE if delta else SCALE
    scale = {stage: {**rates[stage], **half[stage]} for stage in half}
    if changes is not None:
        changes = both(BEFORE, changes) if of_old else changes
        own = {part: dict(values) for part, values in changes.items()}
        merged = {stage: {**scale[stage], **own.pop(stage, {})} for stage in scale}
        hybrid = {"sinks": SINKS, **own.get("hybrid", {})}
        return "equipoise", {**merged, "hybrid": hybrid, "allocation": None}
    # published recipes: a state of D_phi = D in every head, the window takes what is left
    states = at.layers * at.heads * at.head_dim * (at.head_dim + 1) * 4
    left = at.tokens - -(-states // at.token_bytes)
    return name, {**scale, "hybrid": {"window": max(2, left), "feature_multiple": 1}}


def evicting(tokens: int) -> AttentionMode:
    """Heavy hitters in the bytes of so many tokens: 4 more bytes a token held, for its score."""
    held = int(tokens * 128 / 132)
    return AttentionMode("evicting", eviction=Eviction(budget=held, recent=held // 2))


def made(
    name: str, at: Setting, seed: int, steps: int, console: Console
) -> tuple[PreTrainedModel, AttentionMode | str | None]:
    """The model of a run, and the mode to score it in where that is not its own."""
    of_old = name.endswith(OF_OLD)
    base, _, how = name.removesuffix(OF_OLD).partition(":")
    if base == "donor":
        return hybridize(loaded(at), even(at.tokens), check=False), "softmax"
    if base == "heavy-hitters":
        return hybridize(loaded(at), even(at.tokens), check=False), evicting(at.tokens)
    if base in ("even", "moved", "moved-heads"):
        config = (
            even(at.tokens)
            if base == "even"
            else moved(at, by_head=base == "moved-heads", fewer_sinks=not of_old)
        )
        if not how:
            return hybridize(loaded(at), config, check=False), None
        hybrid = config.model_dump(mode="json")
        settings = {"hybrid": hybrid, "finetune": {**tuning_of(how), "max_steps": steps}}
        return converted(at, settings, "swa-sinks", seed, steps, console), None
    recipe, settings = settings_of(f"{base}{OF_OLD}" if of_old else base, at, steps)
    changes = changes_of(base)
    if changes is not None:
        own = dict(changes.get("allocation", {}))
        if of_old:
            own = {**both(BEFORE, changes)["allocation"], "fewer_sinks": False}
            own["heads"] = own.get("heads", 1) * (2 if at.tokens <= SMALL else 1)
        settings["hybrid"] = shared_out(at, settings["hybrid"], own, evenly="even-windows" in base.split("+"))
    return converted(at, settings, recipe, seed, steps, console), None


def score_run(
    name: str,
    at: Setting,
    seed: int,
    split: Split,
    steps: int,
    model: PreTrainedModel,
    mode: AttentionMode | str | None,
) -> dict[str, Any]:
    """One line of results."""
    texts, count = at.draw(split), at.texts

    def state(branch: str | None = None) -> Any:
        if branch is not None:
            return branches(model, branch, reading="renormalised")
        return None if mode is None else branches(model, mode)

    own = mode is None
    entry: dict[str, Any] = {
        "run": name, "name": at.name, "donor": at.digest, "seed": seed, "length": at.length,
        "tokens": at.tokens, "tuned": at.tuning.length,
        "split": split, "bytes": state_bytes(model) if own else at.tokens * at.token_bytes,
        "reach": reach(model) if own else None, "steps": steps,
    }  # fmt: skip
    mixers = converted_mixers(model)
    entry["windows"] = [mixer.config.head_windows or mixer.config.window for mixer in mixers] if own else []
    entry["sinks"] = [mixer.config.sinks for mixer in mixers] if own else []
    entry["both"] = scored(model, texts, count, state())
    if at.name != "demo":  # whose texts have few pairs, and few words to make them of
        entry["more"] = scored(model, with_more_pairs(texts), count, state())
    if any(mixer.has_both for mixer in mixers):
        for branch in ("window", "linear"):
            entry[f"{branch} alone"] = scored(model, texts, count, state(branch))
    return entry


# ---- the command line

Donor = Annotated[
    str, typer.Option(help="demo, or a donor of tools/research_donors.py: source, docstrings, large.")
]
Length = Annotated[int, typer.Option(help="Tokens of a text; to 512 for demo, to 2,048 for the others.")]
Tokens = Annotated[int, typer.Option(help="Budget: this many tokens of K and V a key/value head and layer.")]


@app.command()
def run(
    name: Annotated[
        str,
        typer.Argument(help="donor, heavy-hitters, even, moved, moved-heads, even:tuned, …, or a recipe."),
    ],
    seed: int = 0,
    donor: Donor = "demo",
    length: Length = 512,
    tokens: Tokens = 36,
    split: Annotated[str, typer.Option(help="search, test, or search,test for both.")] = "search",
    tuned: Annotated[
        int | None, typer.Option(help="Tokens of the texts that are trained on; else those of --length.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of all stages together.")] = STEPS,
    output: Path = RESULTS,
    keep: Annotated[Path | None, typer.Option(help="Save the model here as well.")] = None,
) -> None:
    """Make one model, score it, and append a line to the results for every split."""
    at = Setting(donor, length, tokens, tuned)
    splits: list[Split] = [checked(of) for of in split.split(",")]
    model, mode = made(name, at, seed, steps, Console(stderr=True))
    if keep is not None:
        model.save_pretrained(keep)
    for own in splits:
        appended(output, score_run(name, at, seed, own, steps, model, mode))
    frontier_report.report(output)


def appended(output: Path, entry: dict[str, Any]) -> None:
    """Add a line of results."""
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="What `run --keep` saved.")],
    name: Annotated[str, typer.Argument(help="Its run.")],
    split: Annotated[str, typer.Argument(help="search or test.")],
    seed: int = 0,
    donor: Donor = "demo",
    length: Length = 512,
    tokens: Tokens = 36,
    tuned: Annotated[int | None, typer.Option(help="As it was run.")] = None,
    steps: Annotated[int, typer.Option(help="As it was run.")] = STEPS,
    output: Path = RESULTS,
) -> None:
    """Score a model that was kept on another split, and append a line to the results."""
    at, own = Setting(donor, length, tokens, tuned), checked(split)
    if name in ("donor", "heavy-hitters"):
        raise typer.BadParameter(f"{name} trains nothing: `run {name} --split {split}` scores it.")
    kept = opened(model)
    held, budget = state_bytes(kept), at.tokens * at.token_bytes
    if not 0.9 * budget <= held <= budget:
        raise typer.BadParameter(
            f"expected a state of about {budget:,} bytes, {tokens} tokens a head, got {held:,} in {model}: "
            "give --donor and --tokens as the model was run."
        )
    appended(output, score_run(name, at, seed, own, steps, kept, None))


def checked(split: str) -> Split:
    """One of the splits that models are scored on.

    Raises:
        BadParameter: it is none.
    """
    if split not in ("search", "test"):
        raise typer.BadParameter(f"expected search or test, got {split!r}.", param_hint="--split")
    return split


@app.command()
def report(
    output: Path = RESULTS,
    limit: Annotated[
        int | None,
        typer.Option(help="Tokens beyond which answers count as beyond; else the controls' reach."),
    ] = None,
) -> None:
    """Everything that was run, as tables: means over texts, 95% bootstrap intervals over texts and seeds."""
    frontier_report.report(output, limit)


@app.command()
def against(
    rival: Annotated[str, typer.Argument(help="A run, such as moved-heads:tuned.")], output: Path = RESULTS
) -> None:
    """Likelihood of text, less the rival's on the same donor and texts: paired, 95% bootstrap intervals."""
    frontier_report.against(output, rival)


@app.command()
def fingerprint(donor: Donor = "demo", length: Length = 512) -> None:
    """SHA-256 of the scored texts of each split: what was frozen before the search."""
    at = Setting(donor, length)
    for split in ("search", "test"):
        rows = rows_of(at.draw(split), at.texts)
        sys.stdout.write(f"{split} {hashlib.sha256(rows.tobytes()).hexdigest()}\n")


if __name__ == "__main__":
    app()
