"""`equipoise recall`."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from equipoise.bars import counted
from equipoise.commands.audit import Subject, check_one_donor, distinct, inspect
from equipoise.commands.demo import parse_seeds
from equipoise.commands.failures import INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.options import Report, Resamples, TextColumn
from equipoise.commands.output import progress, quieten, results, say

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from equipoise.evaluate.recall_examples import Example
    from equipoise.evaluate.recall_report import Described
    from equipoise.evaluate.recall_results import Group, RecallRun
    from equipoise.evaluate.recall_tasks import RecallSettings
    from equipoise.evaluate.recall_text import Haystack

TASKS = "passkey,mqar,multikey,multivalue,tracking"
BRANCHES = "softmax,both,window,window_renormalised,linear,linear_renormalised,none,swa_sinks_equal_bytes"
DOCUMENTS = 200
"""Documents of a large source that texts are cut from."""


@dataclass(frozen=True)
class RecallOptions:
    """What was asked for."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    examples: int
    seed: int
    branches: tuple[str, ...]
    data: str | None
    text_column: str | None
    settings: RecallSettings
    batch_size: int
    resamples: int


def recall_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Converted models of one donor.")],
    output: Report,
    tasks: Annotated[str, typer.Option("--tasks", metavar="NAME[,NAME…]", help="What to ask.")] = TASKS,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N[,N…]", help="Tokens of text, question and answer.")
    ] = "512,1024",
    examples: Annotated[
        int, typer.Option("--examples", metavar="N", min=1, help="Texts of each task and length.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the texts.")] = 0,
    branches: Annotated[
        str,
        typer.Option(
            "--branches", metavar="STATE[,STATE…]", help="States to ask in; default: all that tell."
        ),
    ] = BRANCHES,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="Text to hide needles in; default: stdlib.")
    ] = None,
    text_column: TextColumn = None,
    needles: Annotated[int, typer.Option("--needles", metavar="N", min=2, help="Statements a text.")] = 8,
    answer_words: Annotated[
        int, typer.Option("--answer-words", metavar="N", min=1, help="Words (tokens) of an answer.")
    ] = 3,
    options: Annotated[
        int,
        typer.Option("--options", metavar="N", min=0, help="Offer N answers, in every rotation; 0: none."),
    ] = 0,
    wording: Annotated[
        Literal["sentences", "pairs"], typer.Option("--wording", help="Sentences, or bare key-value pairs.")
    ] = "sentences",
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Texts at a time.")] = 8,
    resamples: Resamples = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON to stdout.")] = False,
) -> None:
    """Ask converted models for what stands far away: recall.json, recall.md and recall.html.

    Curves of accuracy against distance, and recall within and beyond the reach of stacked windows.

    \b
    equipoise recall out/ssd out/lolcats --lengths 1024,4096 --output out/recall
    """
    quieten()
    from equipoise.evaluate.recall_report import summary, write_recall
    from equipoise.evaluate.recall_results import grouped
    from equipoise.evaluate.recall_tasks import RecallSettings
    from equipoise.train.outputs import claimed

    settings = RecallSettings(needles=needles, answer_words=answer_words, options=options, wording=wording)
    asked = RecallOptions(
        names(tasks), whole_numbers(lengths), examples, seed, names(branches), data, text_column, settings,
        batch_size, resamples,
    )  # fmt: skip
    try:
        with told_when_full(output, "No report was written."), claimed(output, shared=True):
            runs, texts, described = run_recall(models, asked, progress())
            groups = grouped(runs, texts)
            paths = write_recall(groups, described, output)
    except KeyboardInterrupt:
        raise VerbError("interrupted; no report was written.", INTERRUPTED) from None
    console = progress() if as_json else results()
    if as_json:
        typer.echo(paths["json"].read_text(encoding="utf-8"), nl=False)
    else:
        print_groups(groups, console, resamples)
        for group in groups:
            say(console, summary(group, resamples))
    say(console, f"report: {paths['html']}\ndata:   {paths['json']}")


def names(text: str) -> tuple[str, ...]:
    """``"a, b"`` -> ``("a", "b")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(text: str) -> tuple[int, ...]:
    """``"512,1024"`` -> ``(512, 1024)``.

    Raises:
        UsageError: not a list of different whole numbers above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts) or len(set(parts)) != len(parts):
        raise UsageError(
            f"--lengths: expected different numbers of tokens, for instance 512,1024, got {text!r}."
        )
    return tuple(int(part) for part in parts)


def run_recall(
    models: list[str], options: RecallOptions, console: Console
) -> tuple[list[RecallRun], list[Example], Described]:
    """Ask every model the same questions.

    Raises:
        UsageError: models of different donors, or lengths past their context.
        UnknownNameError, RecallError: a task, state or setting that does not exist or does not fit.
        CheckpointError, ConversionError, DataError: a model or text that cannot be used.
    """
    from equipoise.evaluate.recall_report import Described
    from equipoise.evaluate.recall_running import check_states
    from equipoise.evaluate.recall_tasks import TASKS as KNOWN

    if len({Path(model).resolve() for model in models}) < len(models):
        raise UsageError("expected different models, got one of them twice.")
    for task in options.tasks:
        KNOWN[task]  # a misspelt name is known before any weight is read
    check_states(options.branches)
    subjects = distinct([inspect(model) for model in models])
    check_one_donor(subjects)
    if any(subject.softmax for subject in subjects):
        raise UsageError("expected hybrids, got the softmax donor with adapters only: it has no branches.")
    limit = min(subject.context for subject in subjects)
    if max(options.lengths) > limit:
        raise UsageError(
            f"--lengths: expected at most {limit}, the donor's context, got {max(options.lengths)}. Texts "
            "longer than the donor was trained on say nothing about its branches."
        )
    texts, words = examples_for(subjects, options)
    say(console, f"asking {len(texts)} texts hidden in {words}, in {len(options.branches)} states")
    runs = [ask(subject, texts, options, console) for subject in subjects]
    asked = asdict(options) | {"models": models}
    return runs, texts, Described(asked, words, options.resamples)


def examples_for(subjects: list[Subject], options: RecallOptions) -> tuple[list[Example], str]:
    """The texts and questions, and what they are hidden in, in words."""
    from equipoise.evaluate.recall_examples import build_examples
    from equipoise.models.load import load_tokenizer

    tokenizer = load_tokenizer(subjects[0].model)
    haystack, words = haystack_for(subjects, options, tokenizer)
    texts = [
        example
        for task in options.tasks
        for length in options.lengths
        for example in build_examples(
            task, length=length, count=options.examples, seed=options.seed, tokenizer=tokenizer,
            haystack=haystack, settings=options.settings,
        )
    ]  # fmt: skip
    return texts, words


def haystack_for(
    subjects: list[Subject], options: RecallOptions, tokenizer: PreTrainedTokenizerBase
) -> tuple[Haystack, str]:
    """Text held out from training where it can be, and what it is in words."""
    from equipoise.data.sources import absolute_source, load_documents
    from equipoise.evaluate.recall_text import Haystack
    from equipoise.models.load import load_config

    source = options.data or "stdlib"
    trained = {absolute_source(s.trained_on): s.note for s in subjects if s.trained_on is not None}
    seen = trained.get(absolute_source(source))
    whole = seen is None and Path(source).expanduser().exists()
    documents = load_documents(
        source, split="validation", held_out=not whole, subset=None if seen is None else seen.subset,
        text_column=options.text_column or (None if seen is None else seen.text_column), limit=DOCUMENTS,
    )  # fmt: skip
    if "text" not in documents.column_names:
        raise UsageError(
            f"--data: expected plain text to hide needles in, got columns {documents.column_names}: name "
            "one of them with --text-column."
        )
    text = load_config(subjects[0].model).get_text_config(decoder=True)
    haystack = Haystack.of(documents["text"], tokenizer, int(text.vocab_size))
    return haystack, source if whole else f"{source} (held out)"


def ask(subject: Subject, texts: list[Example], options: RecallOptions, console: Console) -> RecallRun:
    """Ask one model, with a bar where there is a terminal."""
    from equipoise.evaluate.recall_results import evaluate_recall
    from equipoise.evaluate.recall_running import batches
    from equipoise.models.load import load_model

    model = load_model(subject.model)
    total = len(options.branches) * len(batches(texts, options.batch_size))
    with counted(console) as bar:
        task = bar.add_task(subject.note.recipe, total=total)
        run = evaluate_recall(
            model, texts, options.branches, name=subject.note.recipe, seed=subject.note.seed,
            batch_size=options.batch_size, tick=lambda: bar.advance(task),
        )  # fmt: skip
    say(console, f"asked {subject.note.recipe} (seed {subject.note.seed})")
    del model
    gc.collect()
    return run


def print_groups(groups: list[Group], console: Console, resamples: int) -> None:
    """The two numbers of every model and state as a table."""
    from rich.table import Table

    from equipoise.evaluate.recall_report import reach_table

    found = reach_table(groups, resamples)
    table = Table(title=found.title, title_justify="left")
    for column in found.columns:
        table.add_column(column)
    for row in found.cells:
        table.add_row(*(cell.text.replace("`", "") for cell in row))
    console.print(table)


# ---- the demo


def recall_demo_command(
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="New directory, or that of an earlier demo.")
    ],
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N[,N…]", help="One conversion per recipe and seed.")
    ] = "0,1,2",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON, all else on stderr.")
    ] = False,
) -> None:
    """Teach a small donor to recall, convert it by three recipes, and ask what windows cannot see.

    Needs no network and no GPU; takes up to twenty minutes. An earlier demo in the directory is
    replaced.

    \b
    equipoise recall-demo --output out/recall
    """
    chosen = parse_seeds(seeds)
    quieten()
    from equipoise.recall_demo import run_recall_demo

    try:
        with told_when_full(output, "Free some space and run the demo again."):
            run_recall_demo(output, seeds=chosen, console=progress() if as_json else results())
    except KeyboardInterrupt:
        raise VerbError(
            "interrupted. A donor that was trained is kept for the next demo.", INTERRUPTED
        ) from None
    if as_json:
        typer.echo((output / "recall.json").read_text(encoding="utf-8"), nl=False)
