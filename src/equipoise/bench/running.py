"""From a theme and a setting to files: the gate, the measurement, the pages."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from equipoise.bench import attention, decode, gate, models, transfer
from equipoise.bench.bars import Outcome, judge
from equipoise.bench.end_to_end import predict
from equipoise.bench.hardware import describe, load
from equipoise.bench.page import bar_table, figure, plotted, to_page
from equipoise.bench.peers import OURS, PEERS
from equipoise.bench.results import Row, Run, to_data
from equipoise.bench.setting import BenchSetting, Theme
from equipoise.files import write_text
from equipoise.ops.native_step import NATIVE
from equipoise.pages import Page, Text, write_results
from equipoise.registry import unknown_name

LENGTHS: dict[Theme, tuple[int, ...]] = {
    "prefill": (4096, 16384, 65536),
    "train": (4096, 16384),
    "decode": (1024, 4096, 16384),
    "transfer": (2048, 8192),
    "model": (1024, 4096),
}
"""Where none are asked for."""
AGAINST: dict[Theme, tuple[str, ...]] = {
    "prefill": ("sdpa", "band", "composed"),
    "train": ("sdpa", "composed"),
    "decode": ("sdpa", "concat"),
    "transfer": ("txt",),
    "model": ("sdpa",),
}
BUDGET = 100.0
"""Seconds a contestant may take at one length, after its first call."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run.

    Attributes:
        theme, setting: what.
        lengths, against: at which lengths and against whom; the theme's own where empty or None.
        rounds, budget: how often, and for how many seconds a contestant and length at most.
        shape, layers: of the whole model.
        measures: of the whole model; all where empty.
    """

    theme: Theme
    setting: BenchSetting
    lengths: tuple[int, ...] = ()
    against: tuple[str, ...] | None = None
    rounds: int = 5
    budget: float = BUDGET
    shape: models.Shape = "small"
    layers: int | None = None
    measures: tuple[str, ...] = ()

    def filled(self) -> Plan:
        """The same with the theme's own lengths and peers where none were given.

        Raises:
            UnknownNameError: a peer that the theme does not know, or a measure that models do not have.
        """
        for name in self.measures:
            if name not in models.MEASURES:
                raise unknown_name("measure of models", name, models.MEASURES)
        for name in self.against or ():
            if name not in known_peers(self.theme):
                raise unknown_name(f"peer of {self.theme}", name, known_peers(self.theme))
        return replace(
            self,
            lengths=self.lengths or LENGTHS[self.theme],
            against=AGAINST[self.theme] if self.against is None else self.against,
        )

    @property
    def command(self) -> str:
        """The command line of this run."""
        plain, own, given = BenchSetting(), self.setting, list[str]()
        for name in BenchSetting.__dataclass_fields__:
            if getattr(own, name) != getattr(plain, name):
                given.append(f"--{name.replace('_', '-')} {getattr(own, name)}")
        if self.theme == "model":
            given.append(f"--shape {self.shape}" + (f" --layers {self.layers}" if self.layers else ""))
            given += [f"--measures {','.join(self.measures)}"] if self.measures else []
        lengths, peers = ",".join(map(str, self.lengths)), ",".join(self.against or ("none",))
        given += [f"--lengths {lengths}", f"--against {peers}", f"--rounds {self.rounds}"]
        given += [f"--budget {self.budget:g}"] if self.budget != BUDGET else []
        return f"equipoise bench {self.theme} {' '.join(given)} --output DIR"


def known_peers(theme: Theme) -> list[str]:
    """Who a theme can be measured against."""
    known: dict[Theme, list[str]] = {
        "prefill": list(PEERS), "train": list(PEERS), "decode": list(decode.DECODERS),
        "transfer": list(transfer.NAMES), "model": list(models.NAMES),
    }  # fmt: skip
    return [name for name in known[theme] if name != OURS]


CPU_SET: tuple[Plan, ...] = (
    Plan(theme="prefill", setting=BenchSetting(), against=("sdpa", "band"), budget=90.0),
    Plan(theme="prefill", setting=BenchSetting(dtype="bfloat16"), against=("sdpa",), budget=150.0),
    Plan(theme="prefill", setting=BenchSetting(features="maps"), lengths=(65536,), against=(), rounds=3),
    Plan(theme="train", setting=BenchSetting(), lengths=(4096, 16384), against=("sdpa",), rounds=3),
    Plan(theme="decode", setting=BenchSetting()),
    Plan(theme="decode", setting=BenchSetting(dtype="bfloat16")),
    Plan(theme="transfer", setting=BenchSetting(), rounds=3),
)  # fmt: skip
"""All rows of `bars.CPU_BARS`, in under ten minutes."""


@contextmanager
def threads(count: int) -> Generator[None]:
    """So many threads for torch during the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(plan: Plan, told: Callable[[str], None] = lambda text: None) -> Run:
    """The gate, then the measurement.

    Args:
        plan: what to run.
        told: hears what goes on.

    Raises:
        GateError: an operator or peer is wrong; nothing was timed.
        UnknownNameError: a peer that the theme does not know.
    """
    plan = plan.filled()
    before = load()
    with threads(plan.setting.threads):
        told(f"{plan.theme} {plan.setting.dtype}: checking against the reference")
        checked, measure = _themes(plan)
        rows = measure(rounds=plan.rounds, budget=plan.budget, told=told)
    layers = plan.layers or models.SHAPES[plan.shape].layers
    return Run(
        theme=plan.theme, setting=plan.setting, hardware=describe(plan.setting.device), rows=tuple(rows),
        checked=tuple(checked), command=plan.command, date=datetime.date.today().isoformat(),
        load=(before, load()), notes=_notes(plan),
        end_to_end=tuple(predict(rows, layers)) if plan.theme == "model" else (),
    )  # fmt: skip


def _themes(plan: Plan) -> tuple[list[str], Callable[..., list[Row]]]:
    """(what the gate went through, what measures)."""
    setting, lengths, names = plan.setting, plan.lengths, (OURS, *(plan.against or ()))
    if plan.theme == "decode":
        return decode.check(setting, names), partial(decode.measure, setting, lengths, names)
    if plan.theme == "transfer":
        return transfer.check(setting, names), partial(transfer.measure, setting, lengths, names)
    if plan.theme == "model":
        built = models.build(setting, plan.shape, plan.layers)
        measures = plan.measures or models.MEASURES
        return models.check(built, setting), partial(models.measure, setting, lengths, built, measures)
    training = plan.theme == "train"
    checked = gate.check_attention(setting, names, gradients=training)
    return checked, partial(attention.measure, setting, lengths, names, training=training)


def _notes(plan: Plan) -> tuple[str, ...]:
    notes: list[str] = []
    if plan.theme == "model":
        sizes = models.SHAPES[plan.shape]
        notes.append(
            f"Llama of random weights: hidden size {sizes.hidden}, {plan.layers or sizes.layers} layers, "
            f"{sizes.heads} heads ({sizes.kv_heads} of keys), vocabulary {sizes.vocabulary:,}; "
            "all layers converted."
        )
    if plan.setting.device == "cpu" and plan.theme in ("decode", "model"):
        notes.append(f"The compiled decoding step was {'used' if NATIVE else 'not built'}.")
    return tuple(notes)


def write(done: Run, output: Path) -> dict[str, Path]:
    """Files of a run: NAME.json, .md, .html, and a plot per measure as .svg; their paths by suffix."""
    outcomes = judge([done])
    paths = write_results(output, done.name, to_page(done, outcomes), to_data(done))
    for measure in done.measures:
        if plotted(done, measure):
            name = done.name if len(done.measures) == 1 else f"{done.name}_{measure}"
            svg = figure(done, measure).svg
            write_text(output / f"{name}.svg", svg + "\n")
    return paths


def write_bars(runs: Sequence[Run], output: Path) -> tuple[list[Outcome], dict[str, Path]]:
    """The table of bars over several runs, as files of its own."""
    outcomes, first = judge(runs), runs[0]
    page = Page(
        title="CPU bars", subtitle=f"{first.hardware.name}; 1 thread; {first.date}",
        summary=in_short(outcomes),
        sections=[
            bar_table(outcomes),
            Text("Commands", [f"`{one.command}`" for one in runs]),
            Text("Machine", [f"Load average before each: {', '.join(f'{one.load[0]:.1f}' for one in runs)}. "
                             f"For bfloat16: {first.hardware.bfloat16}."]),
        ],
    )  # fmt: skip
    data: dict[str, Any] = {
        "format": 1,
        "hardware": first.hardware.slug,
        "date": first.date,
        "load_average": [list(one.load) for one in runs],
        "bars": [
            {
                "figure": one.bar.what, "bar": one.bar.least, "aim": one.bar.aim, "value": one.value,
                "process": one.process, "verdict": one.verdict, "command": one.command,
            }
            for one in outcomes
        ],
    }  # fmt: skip
    return outcomes, write_results(output, f"cpu_{first.hardware.slug}_{first.date}", page, data)


def in_short(outcomes: Sequence[Outcome]) -> str:
    """How many bars are met, and which are not."""
    met = sum(one.met is True for one in outcomes)
    missed = [one.bar.what for one in outcomes if not one.met]
    return f"{met} of {len(outcomes)} bars met" + (f"; not: {'; '.join(missed)}." if missed else ".")
