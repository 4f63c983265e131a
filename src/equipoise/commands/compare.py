"""`equipoise compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.commands.failures import UsageError, told_when_full
from equipoise.commands.output import progress, results, say
from equipoise.registry import unknown_name

if TYPE_CHECKING:
    from equipoise.audit.compare import AuditFile


def compare_command(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN", help="Audits: directories or audit.json files; NAME for the row."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory for the comparison.")],
    judge: Annotated[
        str, typer.Option("--judge", metavar="MEASURE", help="What rows are ranked by: nll, linear_alone, …")
    ] = "nll",
    resamples: Annotated[
        int | None,
        typer.Option("--resamples", metavar="N", min=100, help="Behind intervals and p-values; 10,000."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the resampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON to stdout.")] = False,
) -> None:
    """Merge audits of several seeds and recipes: means, intervals, paired tests, plots.

    Runs of one recipe are the seeds of one row. All must be of one donor on the same text.

    \b
    equipoise compare out/audit-0 out/audit-1 out/audit-2 --output out/compare
    equipoise compare w64=out/a w16=out/b --output out/compare --judge linear_alone
    """
    import json

    from equipoise.audit.compare import compare
    from equipoise.audit.compare_page import console_table, summary, to_dict, write_comparison
    from equipoise.audit.compare_statistics import MEASURES, RESAMPLES
    from equipoise.train.outputs import claimed

    if judge not in MEASURES:
        raise unknown_name("measure", judge, MEASURES)
    with told_when_full(output, "No comparison was written."), claimed(output, shared=True):
        comparison = compare(
            [read(run) for run in runs], judge=judge, resamples=resamples or RESAMPLES, seed=seed
        )
        paths = write_comparison(comparison, output)
    console = progress() if as_json else results()
    if as_json:
        from equipoise.pages.writing import finite

        typer.echo(json.dumps(finite(to_dict(comparison)), indent=2, ensure_ascii=False))
    else:
        console.print(console_table(comparison))
        say(console, summary(comparison))
    say(console, f"report: {paths['html']}\ndata:   {paths['json']}")


def read(run: str) -> AuditFile:
    """An audit from `PATH` or `NAME=PATH`; a path that exists as it stands has no name before it.

    Raises:
        UsageError: an empty name.
        CompareError: not an audit.
    """
    from equipoise.audit.compare import read_audit

    name, equals, path = run.partition("=")
    if not equals or Path(run).exists():
        return read_audit(run)
    if not name.strip():
        raise UsageError(f"expected NAME=RUN, for instance w64=out/audit, got {run!r}.")
    return read_audit(path, label=name.strip())
