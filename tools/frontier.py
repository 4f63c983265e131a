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
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import PreTrainedModel

import frontier_report
from equipoise import branches, hybridize, reach, state_bytes
from equipoise.layers.mixer import AttentionMode
from equipoise.models.branches import converted_mixers
from equipoise.ops.eviction import Eviction
from equipoise.recall_donor import write_documents
from equipoise.train.convert import convert
from equipoise.train.recipes import load_recipe
from frontier_ablations import BEFORE, both, changes_of
from frontier_shapes import (
    OF_OLD,
    SMALL,
    STEPS,
    WINDOWS_ALONE,
    even,
    loaded,
    opened,
    settings_of,
    shared_out,
    tuning_of,
    windows_alone,
)
from frontier_texts import Setting, Split, rows_of, scored, with_more_pairs

app = typer.Typer(add_completion=False, no_args_is_help=True)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "frontier.jsonl"


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
    if base in WINDOWS_ALONE:
        config = windows_alone(base, at, of_old=of_old)
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
        typer.Argument(
            help="donor, heavy-hitters, even, moved, moved-heads, own-windows, even:tuned, …, or a recipe."
        ),
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
