"""`equipoise evaluate`."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from equipoise.bars import counted
from equipoise.commands.failures import FAILED, INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.options import AnyModel, Resamples
from equipoise.commands.output import progress, quieten, results, say

if TYPE_CHECKING:
    from rich.console import Console

    from equipoise.evaluate.benchmark_page import BenchmarkRun
    from equipoise.evaluate.benchmark_run import Plan
    from equipoise.evaluate.scores import StateScores

MISSING = "lm-eval is not installed; it comes with equipoise's extra: pip install 'equipoise[eval]'"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What was asked for."""

    tasks: str
    branches: str | None
    reading: Literal["literal", "renormalised"]
    include_path: Path | None
    limit: int | None
    num_fewshot: str | None
    metric: list[str]
    donor: bool
    chat_template: bool
    metadata: str | None
    batch_size: int
    seed: int | None
    resamples: int


def evaluate_command(
    model: AnyModel,
    tasks: Annotated[str, typer.Option("--tasks", metavar="A,B,…", help="lm-eval's tasks, groups or tags.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory for the results.")],
    branches: Annotated[
        str | None,
        typer.Option(
            "--branches", metavar="A,B,…", help="Rows; default both,window,linear,none,sinks,softmax."
        ),
    ] = None,
    reading: Annotated[
        Literal["literal", "renormalised"],
        typer.Option("--reading", help="Of window and linear; or name window_renormalised, … as rows."),
    ] = "literal",
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path", metavar="DIR", exists=True, file_okay=False, help="Your own tasks' YAML."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=2, help="Only so many documents of each task.")
    ] = None,
    num_fewshot: Annotated[
        str | None,
        typer.Option("--num-fewshot", metavar="N", help="Examples in a prompt; 0,mmlu=5 sets one apart."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="TASK=NAME", help="Show another metric; may be repeated."),
    ] = None,
    donor: Annotated[
        bool, typer.Option("--donor/--no-donor", help="Run softmax also where not named, to compare with.")
    ] = True,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Prompts through the tokenizer's chat template.")
    ] = False,
    metadata: Annotated[
        str | None,
        typer.Option("--metadata", metavar="JSON", help='For RULER: {"max_seq_lengths": [4096, 8192]}.'),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Requests at a time.")
    ] = 8,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Of everything; default: lm-eval's own.")
    ] = None,
    resamples: Resamples = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON to stdout.")] = False,
) -> None:
    """Score a model on lm-eval's tasks in every branch state: evaluate.json, .md and .html.

    What is recovered is a share of the donor's score, so the donor (softmax) is run as well.
    Finished states are kept in DIR: the same command goes on where it was interrupted.

    \b
    equipoise evaluate out/ssd --tasks piqa,arc_easy,arc_challenge,hellaswag,winogrande,mmlu \\
        --num-fewshot 0,mmlu=5 --output out/benchmarks
    """
    options = EvaluateOptions(
        tasks=tasks, branches=branches, reading=reading, include_path=include_path, limit=limit,
        num_fewshot=num_fewshot, metric=metric or [], donor=donor, chat_template=chat_template,
        metadata=metadata, batch_size=batch_size, seed=seed, resamples=resamples,
    )  # fmt: skip
    quieten()
    from equipoise.distributed import joined
    from equipoise.train.outputs import claimed_by_leader

    kept = f"Finished states are kept in {output}: the same command goes on from there."
    try:
        with told_when_full(output, kept), joined() as here, claimed_by_leader(output, shared=True):
            run, paths = run_evaluation(model, options, output, progress())
            if not here.is_leader:
                return
    except KeyboardInterrupt:
        raise VerbError(f"interrupted. {kept}", INTERRUPTED) from None
    console = progress() if as_json else results()
    if as_json:
        typer.echo(paths["json"].read_text(encoding="utf-8"), nl=False)
    else:
        print_scores(run, console)
    say(console, f"report: {paths['html']}\ndata:   {paths['json']}")


@contextmanager
def needs_lm_eval() -> Generator[None]:
    """Say how to install lm-eval where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise VerbError(MISSING, FAILED) from None


def run_evaluation(
    model: str, options: EvaluateOptions, output: Path, console: Console
) -> tuple[BenchmarkRun, dict[str, Path]]:
    """Run what is missing, and write the results.

    Raises:
        UsageError, ConfigError, UnknownNameError: options that do not go together, or names that are none.
        VerbError: lm-eval is missing.
        CheckpointError, HarnessError, ScoresError: a model, task or stored scores that cannot be used.
    """
    with needs_lm_eval():
        from equipoise.evaluate.benchmark_run import finished, write_run
    from equipoise.distributed import from_leader, in_turn

    plan, metrics = in_turn(lambda: make_plan(model, options, output))
    known = from_leader(finished(plan))
    names = ", ".join(state.name for state in plan.states)
    say(
        console,
        f"evaluating {model} on {len(plan.benchmarks.facts)} tasks in {len(plan.states)} states: {names}",
    )
    if known:
        say(console, f"kept from before: {', '.join(known)}")
    scores = _run(plan, known, console)
    return write_run(plan, scores, metrics=metrics, resamples=options.resamples, seed=options.seed or 0)


def make_plan(model: str, options: EvaluateOptions, output: Path) -> tuple[Plan, dict[str, str]]:
    """The plan behind the options, and the metrics that were chosen; tasks' data is read here."""
    from equipoise.evaluate.benchmark_run import Plan
    from equipoise.evaluate.entries import per_task
    from equipoise.evaluate.harness import Seeds, load_benchmarks
    from equipoise.evaluate.states import chosen_states
    from equipoise.models.load import load_config

    described = getattr(load_config(model), "equipoise", None)
    states = chosen_states(options.branches, options.reading, described, donor=options.donor)
    names = [name.strip() for name in options.tasks.split(",")]
    if not all(names):
        raise UsageError(f"--tasks: expected comma-separated names, got {options.tasks!r}.")
    common, own = per_task(options.num_fewshot, "--num-fewshot") if options.num_fewshot else (None, {})
    if common is not None and not common.isdigit():
        raise UsageError(f"--num-fewshot: expected a whole number from 0 on, got {common!r}.")
    benchmarks = load_benchmarks(
        names, include_path=options.include_path, num_fewshot=None if common is None else int(common),
        fewshot_of=own, limit=options.limit, chat_template=options.chat_template,
        seeds=Seeds.of(options.seed), details={"pretrained": model, **_details(options.metadata)},
    )  # fmt: skip
    plan = Plan(
        model=model, states=states, benchmarks=benchmarks, output=output, batch_size=options.batch_size
    )
    return plan, _metrics(options.metric)


def _metrics(given: list[str]) -> dict[str, str]:
    """`hellaswag=acc`, `gsm8k=exact_match,flexible-extract` by task."""
    for part in given:
        task, sign, metric = part.partition("=")
        if not (task and sign and metric):
            raise UsageError(f"--metric: expected TASK=NAME, got {part!r}.")
    return dict(part.split("=", 1) for part in given)


def _details(text: str | None) -> dict[str, Any]:
    try:
        details = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UsageError(f"--metadata: expected JSON, got {text!r} ({error}).") from None
    if not isinstance(details, dict):
        raise UsageError(f"--metadata: expected a JSON object, got {text!r}.")
    return details


def _run(plan: Plan, known: dict[str, StateScores], console: Console) -> dict[str, StateScores]:
    """Run states with a bar where there is a terminal, and a line for each."""
    from equipoise.evaluate.benchmark_run import run_states
    from equipoise.evaluate.states import BranchState

    with counted(console) as bar:
        line = bar.add_task("loading", total=None)

        def watch(state: BranchState, answered: int, asked: int) -> None:
            place = 1 + [each.name for each in plan.states].index(state.name)
            described = f"{state.name} ({place} of {len(plan.states)})"
            bar.update(line, description=described, completed=answered, total=asked)

        def done(state: BranchState, scores: StateScores) -> None:
            say(console, f"{state.name}: {scores.seconds:.0f}s")
            for note in scores.notes:
                say(console, f"  lm-eval: {note}")

        return run_states(plan, known, watch=watch, done=done)


def print_scores(run: BenchmarkRun, console: Console) -> None:
    """The table of scores, intervals left to the report but for what is recovered."""
    from rich.table import Table

    from equipoise.evaluate.benchmark_page import headings, label, score_cells, summary
    from equipoise.pages import percent

    table = Table("branch state", *headings(run))
    for state in run.states:
        cells = score_cells(run, run.table.rows[state.name])
        table.add_row(label(state.name), *("–" if c is None else percent(c, interval=False) for c in cells))
    console.print(table)
    say(console, summary(run).replace("`", ""))
