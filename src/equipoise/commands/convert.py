"""`equipoise convert`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from equipoise.commands.failures import FAILED, INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.options import (
    DEFAULT_RECIPE,
    MaxSteps,
    Recipe,
    Settings,
    StateBytes,
    Streaming,
    TrainingData,
    TrustRemoteCode,
)
from equipoise.commands.output import progress, quieten, results, say, say_json
from equipoise.commands.recall_watch import recall_watchers
from equipoise.config import merge, parse_assignments

if TYPE_CHECKING:
    from equipoise.config import RunConfig

STAGES = ("transfer", "finetune")


def convert_command(
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="Model directory, or a name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="New directory for the result.")],
    recipe: Recipe = DEFAULT_RECIPE,
    state_bytes: StateBytes = None,
    data: TrainingData = None,
    streaming: Streaming = False,
    settings: Settings = None,
    max_steps: MaxSteps = None,
    report_to: Annotated[
        str | None,
        typer.Option("--report-to", metavar="NAME", help="tensorboard, wandb or none: where the log goes."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of everything random.")] = 0,
    parallel: Annotated[
        Literal["auto", "ddp", "fsdp2"],
        typer.Option("--parallel", help="Under torchrun or accelerate launch: fsdp2 also shards the donor."),
    ] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run, if any.")] = False,
    stream_layers: Annotated[
        bool,
        typer.Option(
            "--stream-layers",
            help="One layer in memory at a time, for models larger than that. Stage 1 only (needs `--set "
            "finetune=null`): stage 2 of such models is FSDP2's.",
        ),
    ] = False,
    join: Annotated[
        bool,
        typer.Option("--join", help="Help a run with --stream-layers, from another process or machine."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and do nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the run as JSON.")] = False,
) -> None:
    """Convert a softmax model into a hybrid by a recipe.

    \b
    equipoise convert meta-llama/Llama-3.2-1B --output out/hybrid --state-bytes 4000000
    equipoise convert meta-llama/Llama-3.2-1B --recipe ssd --output out/ssd
    equipoise convert ./donor --recipe lolcats --output out/lolcats --data corpus.jsonl \\
        --set hybrid.window=32 --set finetune.learning_rate=5e-4 --max-steps 200
    torchrun --nproc-per-node 8 -m equipoise convert ./donor --recipe ssd --output out/ssd
    equipoise convert ./large --recipe ssd --output out/large --stream-layers --set finetune=null \\
        --set watch=null
    """
    quieten()
    run = resolve(
        recipe, data=data, assignments=settings or [], max_steps=max_steps, report_to=report_to,
        streaming=streaming, state_bytes=state_bytes,
    )  # fmt: skip
    _check_streaming(run, stream_layers=stream_layers, join=join, resume=resume)
    if dry_run:
        asked = {"resume": resume, "stream_layers": stream_layers, "trust_remote_code": trust_remote_code}
        _show_plan(donor, run, output, as_json=as_json, **asked)
        return
    from equipoise.distributed import PeerLost
    from equipoise.train.convert import convert
    from equipoise.train.ending import TERMINATED, Terminated
    from equipoise.train.layer_convert import convert_by_layers
    from equipoise.train.outputs import WORK
    from equipoise.train.rank_trainer import TrainingDiverged
    from equipoise.train.stage_files import latest_checkpoint

    started: dict[str, Any] = {
        "seed": seed, "resume": resume, "console": progress(), "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    try:
        with told_when_full(
            output, "No half-written model was left there. Free some space and go on with --resume."
        ):
            if stream_layers:
                record = convert_by_layers(donor, run, output, join=join, **started)
            else:
                record = convert(
                    donor, run, output, watchers=recall_watchers(run, donor), parallel=parallel, **started
                )
    except KeyboardInterrupt:
        raise VerbError(f"interrupted{_kept(output / WORK)}", INTERRUPTED) from None
    except PeerLost as error:
        raise VerbError(f"{str(error).rstrip('.')}{_kept(output / WORK)}", FAILED) from None
    except Terminated as ended:
        raise VerbError(f"{str(ended).rstrip('.')}{_kept(output / WORK)}", TERMINATED) from None
    except TrainingDiverged as error:
        kept = [path for stage in STAGES if (path := latest_checkpoint(output / WORK / stage)) is not None]
        last = f" The last good training checkpoint is kept: {kept[-1]}." if kept else ""
        raise VerbError(f"{error}{last}", FAILED) from error
    if record is None:
        say(results(), f"{run.name}: no work left for this worker; the run in {output} finishes by itself")
    elif as_json:
        say_json({"output": str(output), **asdict(record)})
    else:
        _say_next(run, output)


def _check_streaming(run: RunConfig, *, stream_layers: bool, join: bool, resume: bool) -> None:
    if join and not stream_layers:
        raise UsageError("--join helps a run with --stream-layers: give both.")
    if join and resume:
        raise UsageError(
            "--join helps a run that goes on, --resume goes on with a stopped one: give one of them."
        )
    if stream_layers:
        from equipoise.train.layer_convert import check_streamable

        check_streamable(run)


def _show_plan(
    donor: str,
    run: RunConfig,
    output: Path,
    *,
    resume: bool,
    stream_layers: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """What a conversion would do; everything that can be refused without reading weights is."""
    from equipoise.commands.plan import show
    from equipoise.planning.costs import Target
    from equipoise.planning.plan import plan_conversion
    from equipoise.train.outputs import check_output

    check_output(output, resume=resume)
    target = Target(stream_layers=True) if stream_layers else None
    plan = plan_conversion(donor, run, probe=False, trust_remote_code=trust_remote_code, target=target)
    if as_json:
        say_json({"output": str(output), **asdict(plan)})
        return
    show(plan)
    say(results(), f"would write to {output}; nothing was done. `equipoise plan` measures time.")


def resolve(
    recipe: str,
    *,
    data: str | None,
    assignments: list[str],
    max_steps: int | None,
    report_to: str | None = None,
    streaming: bool = False,
    state_bytes: int | None = None,
) -> RunConfig:
    """The recipe with the command line's changes: --set over --max-steps, the other options over both.

    Raises:
        UnknownNameError, ConfigError: as `load_recipe`.
    """
    changes = parse_assignments(assignments)
    if data is not None:
        changes = merge(changes, {"data": {"source": data}})
    if report_to is not None:
        changes = merge(changes, {"report_to": report_to})
    if state_bytes is not None:
        changes = merge(changes, {"allocation": {"state_bytes": state_bytes}})
    if streaming:
        changes = merge(changes, {"data": {"streaming": True}})
    from equipoise.train.recipes import load_recipe

    shipped = load_recipe(recipe)
    if max_steps is not None:
        present = [name for name in STAGES if _is_present(shipped, changes, name)]
        changes = merge({name: {"max_steps": max_steps} for name in present}, changes)
    run = load_recipe(recipe, changes)
    for part in ("hybrid", "allocation", *STAGES):
        if getattr(shipped, part) is None and getattr(run, part) is not None:
            how = "--state-bytes" if part == "allocation" and state_bytes is not None else "--set"
            say(progress(), f"note: {run.name} has no {part} of its own; {how} adds one", style="yellow")
    return run


def _is_present(shipped: RunConfig, changes: dict[str, Any], stage: str) -> bool:
    """Whether a stage will run: as shipped, unless the changes add it or take it away."""
    return changes[stage] is not None if stage in changes else getattr(shipped, stage) is not None


def _kept(work: Path) -> str:
    if any(work.glob("layer-*/*")) or any(work.glob("inputs/done/*")):
        return f". The same command with --resume goes on from the layers in {work}."
    if any(work.glob("*/checkpoint-*")):
        return f". The same command with --resume goes on from the checkpoints in {work}."
    return " before the first training checkpoint; nothing was kept."


def _say_next(run: RunConfig, output: Path) -> None:
    place, console = shlex.quote(str(output)), results()
    what = "fine-tuned softmax model" if run.hybrid is None else "hybrid"
    say(console, f"{run.name}: {what} in {place}")
    if run.hybrid is None:
        say(console, f"next: equipoise generate {place} 'Once upon a time'")
        return
    beside = shlex.quote(str(output.with_name(output.name + "-audit")))
    say(console, f"next: equipoise audit {place} --output {beside}")
