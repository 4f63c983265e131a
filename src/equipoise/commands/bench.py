"""`equipoise bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from equipoise.commands.failures import INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.output import progress, quieten, results, say, say_json

if TYPE_CHECKING:
    from rich.console import Console

    from equipoise.bench.bars import Outcome
    from equipoise.bench.results import Run
    from equipoise.bench.running import Plan
    from equipoise.bench.setting import BenchSetting

Themes = Literal["prefill", "decode", "train", "transfer", "model", "cpu"]


def bench_command(
    theme: Annotated[
        Themes,
        typer.Argument(metavar="THEME", help="prefill, decode, train, transfer, model, or cpu: all bars."),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory for the results.")],
    lengths: Annotated[
        str | None, typer.Option("--lengths", metavar="N,N,…", help="Tokens, or tokens of context.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="A,B,…", help="Of sdpa, band, flex, fla, composed, txt, concat; or none."
        ),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option("--dtype")] = "float32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="On CPU.")] = 1,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1)] = 1,
    heads: Annotated[int, typer.Option("--heads", metavar="N", min=1)] = 8,
    kv_heads: Annotated[int, typer.Option("--kv-heads", metavar="N", min=1)] = 8,
    head_dim: Annotated[int, typer.Option("--head-dim", metavar="N", min=1)] = 64,
    window: Annotated[int, typer.Option("--window", metavar="N", min=1)] = 64,
    feature_dim: Annotated[int, typer.Option("--feature-dim", metavar="N", min=2)] = 128,
    features: Annotated[
        Literal["mapped", "maps"],
        typer.Option("--features", help="Features as tensors, or maps that the call applies."),
    ] = "mapped",
    map_heads: Annotated[
        Literal["query", "key_value"], typer.Option("--map-heads", help="A key map per query or key head.")
    ] = "query",
    shape: Annotated[
        Literal["small", "1b", "8b"], typer.Option("--shape", help="Of the whole model.")
    ] = "small",
    layers: Annotated[
        int | None,
        typer.Option("--layers", metavar="N", min=1, help="Of the whole model, instead of its own."),
    ] = None,
    measures: Annotated[
        str | None,
        typer.Option("--measures", metavar="A,B,…", help="Of prefill, decode, generate, train; theme model."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1)] = 5,
    budget: Annotated[
        float | None,
        typer.Option("--budget", metavar="SECONDS", min=0, help="Of a contestant and length; default 100."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare with the CPU bars.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of what was measured as JSON.")
    ] = False,
) -> None:
    """Measure the operators beside what would run instead: THEME_HARDWARE_DATE.json, .md, .html, .svg.

    First every contestant is checked against the reference; a wrong one ends the run. Then interleaved
    rounds; what is told is the median.

    \b
    equipoise bench prefill --lengths 4096,16384 --against sdpa,band --output out/bench
    equipoise bench cpu --output out/bench
    """
    quieten()
    from equipoise.bench.running import BUDGET, CPU_SET, Plan, write_bars
    from equipoise.bench.setting import BenchSetting

    try:
        setting = BenchSetting(
            dtype=dtype, device=device, threads=threads, batch=batch, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, window=window, feature_dim=feature_dim, features=features, map_heads=map_heads,
        )  # fmt: skip
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    if theme == "cpu":
        plans = CPU_SET
        _refuse_with_cpu(setting, lengths, against)
    else:
        plan = Plan(
            theme=theme, setting=setting, lengths=_lengths(lengths), against=_names(against), rounds=rounds,
            budget=BUDGET if budget is None else budget, shape=shape, layers=layers,
            measures=_names(measures) or (),
        )  # fmt: skip
        plans = (plan.filled(),)
    console = progress()
    shown = console if as_json else results()
    done, written = run_all(plans, output, console, shown)
    if as_json:
        say_json([json.loads(path.read_text(encoding="utf-8")) for path in written])
    if check or theme == "cpu":
        outcomes, paths = write_bars(done, output) if theme == "cpu" else _judged(done)
        print_bars(outcomes, shown)
        if paths:
            say(shown, f"report: {paths['html']}\ndata:   {paths['json']}")


def run_all(
    plans: Sequence[Plan], output: Path, console: Console, shown: Console
) -> tuple[list[Run], list[Path]]:
    """Run and write one after the other; what is finished stays. Gives the JSON files too."""
    from equipoise.bench.running import run, write

    done: list[Run] = []
    written: list[Path] = []
    kept = "What was measured before is kept."
    for plan in plans:
        try:
            finished = run(plan, lambda text: say(console, text))
            with told_when_full(output, kept):
                paths = write(finished, output)
        except KeyboardInterrupt:
            raise VerbError(f"interrupted. {kept}", INTERRUPTED) from None
        done.append(finished)
        written.append(paths["json"])
        print_run(finished, shown)
        say(shown, f"report: {paths['html']}\ndata:   {paths['json']}")
    return done, written


def _judged(done: Sequence[Run]) -> tuple[list[Outcome], dict[str, Path]]:
    from equipoise.bench.bars import judge

    return judge(done), {}


def _refuse_with_cpu(setting: BenchSetting, lengths: str | None, against: str | None) -> None:
    if setting != type(setting)() or lengths is not None or against is not None:
        raise UsageError("bench cpu runs the sizes its bars are set for: leave other options away.")


def _lengths(given: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in given.split(",")] if given is not None else []
    if not all(part.isdigit() and int(part) > 1 for part in parts):
        raise UsageError(f"--lengths: expected whole numbers from 2 on, comma-separated, got {given!r}.")
    return tuple(int(part) for part in parts)


def _names(given: str | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return () if given == "none" else tuple(part.strip() for part in given.split(","))


def print_run(run: Run, console: Console) -> None:
    """Medians and ratios; ranges and memory are left to the report."""
    from rich.table import Table

    from equipoise.bench.page import seconds
    from equipoise.bench.results import AT_MOST
    from equipoise.pages import UNDEFINED, bytes_in_words

    columns = ["measure", "length", "contestant", "seconds", "over ours", "processor", "memory"]
    table = Table(*columns)
    for row in run.rows:
        head = [row.measure, f"{row.length:,}", row.name]
        ratio, times = run.ratio(row), row.times
        if times is None:
            table.add_row(*head, row.reason, *([UNDEFINED] * 3))
            continue
        ratios = [UNDEFINED] * 2 if ratio is None else [f"{ratio.value:.3g}x", f"{ratio.process:.3g}x"]
        peak = UNDEFINED if times.peak is None else bytes_in_words(times.peak)
        table.add_row(*head, seconds(times.median), *ratios, peak)
    console.print(table)
    for one in run.end_to_end:
        say(
            console,
            f"generate, {one.length:,} tokens of context: {seconds(one.measured)} a token, "
            f"{one.ratio:.2f}x what the operators predict ({one.process:.2f}x in processor time; "
            f"at most {AT_MOST}x)",
        )
    if run.busy:
        say(console, f"the machine was busy (load {run.load[0]:.1f}): the clock says little here")


def print_bars(outcomes: Sequence[Outcome], console: Console) -> None:
    """Each bar, met or missed."""
    from rich.table import Table

    from equipoise.bench.bars import in_words
    from equipoise.bench.running import in_short

    if not outcomes:
        say(console, "no bar is set for these sizes, peers and lengths")
        return
    table = Table("figure", "bar", "aim", "measured", "processor", "verdict")
    for one in outcomes:
        cells = [in_words(one.bar, value) for value in (one.bar.least, one.bar.aim, one.value, one.process)]
        table.add_row(one.bar.what, *cells, one.verdict)
    console.print(table)
    say(console, in_short(outcomes))
