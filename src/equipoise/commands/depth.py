"""`equipoise attribute`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from equipoise.bars import counted
from equipoise.commands.audit import AuditOptions, _context_length, inspect, read_text
from equipoise.commands.failures import INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.options import (
    ContextLength,
    Contexts,
    Documents,
    MaxWindows,
    Report,
    Resamples,
    ScoredData,
    TextColumn,
)
from equipoise.commands.output import progress, quieten, results, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from equipoise.audit.depth import DepthSettings, GameName
    from equipoise.audit.depth_report import DepthReport
    from equipoise.data.packing import EvaluationWindow

FEW_HEADS = 64
"""Heads up to which a model is taken apart by head where nothing is said: 8 sets are scored for each."""


def attribute_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Converted model.")],
    output: Report,
    data: ScoredData = None,
    text_column: TextColumn = None,
    context_length: ContextLength = None,
    documents: Documents = 64,
    max_windows: MaxWindows = 1,
    batch_size: Contexts = 8,
    heads: Annotated[
        bool | None,
        typer.Option("--heads/--no-heads", help=f"By head too; default: up to {FEW_HEADS} heads in all."),
    ] = None,
    games: Annotated[
        str, typer.Option("--games", metavar="LIST", help="Shapley values of: window, linear, all.")
    ] = "window,linear",
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", metavar="X", min=0, help="Standard error to stop at, share of the total."
        ),
    ] = 0.01,
    budget: Annotated[
        int, typer.Option("--budget", metavar="N", min=0, help="Sets scored for Shapley values of a game.")
    ] = 500,
    draws: Annotated[
        int, typer.Option("--draws", metavar="N", min=1, help="Random sets of layers, as a control.")
    ] = 8,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Of permutations, random sets, bootstrap.")
    ] = 0,
    resamples: Resamples = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON to stdout.")] = False,
) -> None:
    """Show in which layers and heads the branches work: attribution.json, .md and .html.

    It scores the model hundreds of times; a bar tells how long each part still takes. An
    earlier report in the directory is replaced.

    \b
    equipoise attribute out/ssd --output out/attribution --documents 32
    """
    options = AuditOptions(
        data, text_column, context_length, documents, max_windows, batch_size, seed, resamples
    )
    quieten()
    from equipoise.audit.depth import DepthSettings
    from equipoise.audit.depth_page import depth_page, summary
    from equipoise.audit.depth_report import to_dict
    from equipoise.pages import write_results
    from equipoise.train.outputs import claimed

    settings = DepthSettings(
        games=_games(games), tolerance=tolerance, budget=budget, draws=draws, seed=seed, resamples=resamples
    )
    try:
        with told_when_full(output, "No report was written."), claimed(output, shared=True):
            report = run_attribution(model, options, settings, heads, progress())
            paths = write_results(output, "attribution", depth_page(report), to_dict(report))
    except KeyboardInterrupt:
        raise VerbError("interrupted; no report was written.", INTERRUPTED) from None
    console = progress() if as_json else results()
    if as_json:
        typer.echo(paths["json"].read_text(encoding="utf-8"), nl=False)
    else:
        say(console, summary(report))
    say(console, f"report: {paths['html']}\ndata:   {paths['json']}")


def _games(names: str) -> list[GameName]:
    from equipoise.audit.depth import GameName

    known: tuple[GameName, ...] = get_args(GameName)
    asked = [name.strip() for name in names.split(",") if name.strip()]
    chosen: list[GameName] = [name for name in known if name in asked]
    if not asked or len(chosen) < len(asked):
        raise UsageError(f"--games: expected some of {', '.join(known)}, each once, got {names!r}.")
    return chosen


def run_attribution(
    name: str, options: AuditOptions, settings: DepthSettings, heads: bool | None, console: Console
) -> DepthReport:
    """Take one model apart on the text that an audit of it would score.

    Raises:
        UsageError: options that do not fit the model.
        CheckpointError, ConversionError, DataError: a model or text that cannot be used.
    """
    from equipoise.audit.depth import attribute_depth
    from equipoise.audit.depth_report import DepthReport
    from equipoise.audit.depth_units import likelihood
    from equipoise.audit.measures import measure
    from equipoise.models.branches import converted_mixers
    from equipoise.models.load import load_model

    subject = inspect(name)
    if subject.softmax:
        raise UsageError(f"{name}: expected a hybrid, got the softmax donor with adapters only: no branches.")
    length = _context_length([subject], options.context_length)
    windows, words = read_text([subject], options, length)
    model = load_model(name)
    count = sum(mixer.heads for mixer in converted_mixers(model))
    settings = replace(settings, heads=count <= FEW_HEADS if heads is None else heads)
    if heads is None and not settings.heads:
        say(console, f"{count} heads: taken apart by layer only; --heads asks for heads too.")
    say(console, f"taking {name} apart on {words}: {_amount(windows, length)}")
    with _bars(console, -(-len(windows) // options.batch_size)) as bars:
        depth = attribute_depth(
            model, likelihood(windows, batch_size=options.batch_size, tick=bars.tick), settings,
            stage=bars.stage,
        )  # fmt: skip
        bars.stage("attention", 2)
        measures, missing = measure(
            model, windows, batch_size=options.batch_size, resamples=settings.resamples, seed=settings.seed,
            tick=bars.tick,
        )  # fmt: skip
    return DepthReport(
        model=subject.note.recipe, data=words, context_length=length, depth=depth, measures=measures,
        missing=missing,
    )  # fmt: skip


def _amount(windows: list[EvaluationWindow], length: int) -> str:
    documents = len({window.document for window in windows})
    return f"{documents} documents, {len(windows)} contexts of up to {length} tokens"


class _Bars:
    """One bar for each part of the work, counting batches; parts end early where sets repeat."""

    def __init__(self, bars: Progress, batches: int) -> None:
        self.bars, self.batches = bars, batches
        self.task: TaskID | None = None

    def stage(self, name: str, sets: int) -> None:
        """The next part begins: so many sets of batches at most."""
        if self.task is not None:
            self.bars.update(self.task, visible=False)
        self.task = self.bars.add_task(name, total=sets * self.batches)

    def tick(self) -> None:
        """A batch is done."""
        if self.task is not None:
            self.bars.advance(self.task)


@contextmanager
def _bars(console: Console, batches: int) -> Generator[_Bars]:
    with counted(console) as bars:
        yield _Bars(bars, batches)
