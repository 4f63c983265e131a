"""`equipoise plan`, and what `equipoise convert --dry-run` shows."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from equipoise.commands.failures import INTERRUPTED, VerbError
from equipoise.commands.options import (
    DEFAULT_RECIPE,
    MaxSteps,
    Recipe,
    Settings,
    StateBytes,
    TrainingData,
    TrustRemoteCode,
)
from equipoise.commands.output import progress, quieten, results, say, say_json

if TYPE_CHECKING:
    from equipoise.planning.plan import Plan, StagePlan

UNKNOWN = "?"


def plan_command(
    donor: Annotated[
        str, typer.Argument(metavar="DONOR", help="Directory with a config.json, or a name on the Hub.")
    ],
    recipe: Recipe = DEFAULT_RECIPE,
    state_bytes: StateBytes = None,
    data: TrainingData = None,
    settings: Settings = None,
    max_steps: MaxSteps = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Time two layers with random weights on this machine.")
    ] = True,
    ranks: Annotated[
        int, typer.Option("--ranks", metavar="N", min=1, help="Processes, one device each.")
    ] = 1,
    parallel: Annotated[
        Literal["ddp", "fsdp2"], typer.Option("--parallel", help="Of several ranks: fsdp2 shards the donor.")
    ] = "ddp",
    stream_layers: Annotated[
        bool, typer.Option("--stream-layers", help="Stage 1 with one layer in memory at a time.")
    ] = False,
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator", metavar="NAME", help="Plan for a100, h100, h200 or b200 by data sheet."
        ),
    ] = None,
    utilisation: Annotated[
        float,
        typer.Option(
            "--utilisation", metavar="SHARE", min=0.01, max=1, help="Of its peak rate; an assumption."
        ),
    ] = 0.3,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a conversion will take: parameters, memory, tokens, disk and time.

    The donor's config.json is enough: no weights are read or downloaded. Memory is computed from shapes, time
    is measured on two layers; with --accelerator it follows from operations and assumed rates.

    \b
    equipoise plan meta-llama/Llama-3.2-1B --recipe ssd --max-steps 2000
    equipoise plan meta-llama/Llama-3.1-70B --recipe ssd --max-steps 2000 \
        --ranks 8 --parallel fsdp2 --accelerator h100
    """
    quieten()
    from equipoise.commands.convert import resolve
    from equipoise.planning.costs import Target
    from equipoise.planning.plan import plan_conversion

    run = resolve(recipe, data=data, assignments=settings or [], max_steps=max_steps, state_bytes=state_bytes)
    target = Target(
        ranks=ranks, parallel=parallel, stream_layers=stream_layers, accelerator=accelerator,
        utilisation=utilisation,
    )  # fmt: skip
    here = probe and target == Target(utilisation=utilisation)
    say(progress(), f"following a step of the donor{', then timing a slice of it' if here else ''} …")
    try:
        plan = plan_conversion(donor, run, probe=probe, trust_remote_code=trust_remote_code, target=target)
    except KeyboardInterrupt:
        raise VerbError("interrupted.", INTERRUPTED) from None
    if as_json:
        say_json(asdict(plan))
    else:
        show(plan)


def show(plan: Plan) -> None:
    """The plan as tables on stdout."""
    from equipoise.pages.format import bytes_in_words

    layers = plan.layers
    kept = [
        f"{len(n)} left {kind}" for kind, n in (("local", layers.local), ("softmax", layers.softmax)) if n
    ]
    known = "" if plan.data.tokens is None else f"about {plan.data.tokens:,} tokens; "
    facts = {
        "donor": f"{plan.donor}: {plan.model_type}, {plan.parameters:,} parameters",
        "recipe": f"{plan.recipe}: {', then '.join(s.name for s in plan.stages) or 'nothing trained'}",
        "layers": ", ".join([f"{len(layers.converted)} converted", *kept]),
        "added": f"{plan.mixer_parameters:,} parameters of feature maps and gates",
        "decode state": f"{bytes_in_words(plan.state_bytes)} a sequence; {_windows(plan)}",
        "data": f"{known}{plan.data.source}",
        "disk": f"{bytes_in_words(plan.output_bytes)} for the result, "
        f"{bytes_in_words(plan.work_bytes)} while training",
        "download": f"{bytes_in_words(plan.download_bytes)} of weights" if plan.download_bytes else "nothing",
    }
    _print_facts(facts)
    if plan.stages:
        _print_stages(plan)
    _say_time(plan)


def _windows(plan: Plan) -> str:
    if plan.is_allocated:
        return "windows and linear heads are measured first"
    return f"windows reach {'unlimited' if plan.reach is None else f'{plan.reach:,} tokens'}"


def _print_facts(facts: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in facts.items():
        table.add_row(Text(name, style="bold"), Text(words))
    results().print(table)


def _print_stages(plan: Plan) -> None:
    """One column a stage: a table that fits narrow terminals too."""
    from rich.table import Table

    from equipoise.pages.format import bytes_in_words

    def size(count: int | None) -> str:
        return UNKNOWN if count is None else bytes_in_words(count)

    def steps(stage: StagePlan) -> str:
        return UNKNOWN if stage.steps is None else f"{'≤ ' if stage.at_most else ''}{stage.steps:,}"

    rows: dict[str, Any] = {
        "steps": steps,
        "tokens": lambda stage: UNKNOWN if stage.tokens is None else f"{stage.tokens:,}",
        "parameters that train": lambda stage: f"{stage.trainable:,}",
        "memory: weights": lambda stage: size(stage.weight_bytes),
        "memory: gradients, Adam": lambda stage: size(stage.training_bytes),
        "memory: activations": lambda stage: size(stage.activation_bytes),
        "memory at its most": lambda stage: size(stage.memory_bytes),
        "operations a step": lambda stage: UNKNOWN if stage.cost is None else f"{stage.cost.flops:.3g}",
        "time of a step": lambda stage: duration(stage.step_seconds),
        "time": lambda stage: duration(stage.seconds),
    }
    rows |= _elsewhere_rows(plan)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("")
    for stage in plan.stages:
        table.add_column(stage.name, justify="right")
    for name, cell in rows.items():
        table.add_row(name, *map(cell, plan.stages))
    results().print("")
    results().print(table)
    results().print("")


def _elsewhere_rows(plan: Plan) -> dict[str, Any]:
    """What several ranks, streamed layers and another accelerator add to the table."""
    from equipoise.pages.format import bytes_in_words

    target = plan.target

    def of_cost(value: Any) -> Any:
        return lambda stage: UNKNOWN if stage.cost is None else value(stage.cost)

    rows: dict[str, Any] = {}
    if target.ranks > 1:
        rows["wire a step and rank"] = of_cost(lambda cost: bytes_in_words(cost.wire_bytes))
    if target.stream_layers:
        rows["disk, read and written"] = of_cost(lambda cost: bytes_in_words(cost.disk_bytes))
    if target.accelerator is not None:
        rows["bottleneck"] = of_cost(lambda cost: cost.bottleneck or UNKNOWN)
        rows[f"{target.accelerator} hours"] = of_cost(
            lambda cost: UNKNOWN if cost.device_hours is None else f"{cost.device_hours:,.3g}"
        )
    return rows


def _say_memory(plan: Plan) -> None:
    from equipoise.pages.format import bytes_in_words

    if plan.unknown is not None:
        say(results(), f"memory and operations are not known: {plan.unknown}")
    elif plan.memory_bytes is not None:
        most = max(plan.memory, key=lambda name: plan.memory[name])
        where = "" if plan.libraries_bytes else " of the accelerator's"
        each = "" if plan.target.ranks == 1 else " in each rank"
        libraries = (
            f", {bytes_in_words(plan.libraries_bytes)} of it the libraries" if plan.libraries_bytes else ""
        )
        say(
            results(),
            f"memory{where}: {bytes_in_words(plan.memory_bytes)}{each} at its most ({most}){libraries}",
        )


def _say_time(plan: Plan) -> None:
    from equipoise.pages.format import bytes_in_words

    _say_memory(plan)
    if plan.target.accelerator is not None:
        say(
            results(),
            f"hours assume {plan.target.utilisation:.0%} of the {plan.target.accelerator}'s dense bfloat16 "
            "peak; none of it was measured",
        )
    elif plan.unmeasured is not None:
        say(results(), f"time was not measured: {plan.unmeasured}")
    elif plan.stages:
        words = (
            "unknown until the data is read" if plan.seconds is None else f"about {duration(plan.seconds)}"
        )
        say(
            results(),
            f"training on this machine ({plan.device}, {plan.dtype}): {words}, from steps on two "
            "layers; loading, reading data and looks at held-out rows come on top",
        )
    needed = plan.memory_bytes or max((s.weight_bytes + s.training_bytes for s in plan.stages), default=0)
    if needed > plan.available_bytes:
        say(
            progress(),
            f"warning: this needs {bytes_in_words(needed)}, and {bytes_in_words(plan.available_bytes)} are "
            "free. Lower transfer.micro_batch_size, finetune.micro_batch_size or data.context_length.",
            style="yellow",
        )


def duration(seconds: float | None) -> str:
    """`0.42 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 120:
        return f"{seconds:.3g} s"
    for limit, size, unit in ((120 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
