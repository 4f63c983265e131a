"""Audit of a hybrid that ships with transformers: which of its mixers do the work.

There is no donor to compare with. The scale runs from `none` (every mixer taken out) to `both` (the model as
it is); `recovered` is the share of that way. States are named after the mixers that stay: `attention` has
the linear mixers taken out. Everything after the scores is numpy on sums per document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from equipoise.audit.attribution import DONOR, BranchAttribution, attribute, recovered
from equipoise.audit.native_ablation import Mixer, Place, find_mixers
from equipoise.audit.native_scores import (
    FILLS,
    SURVIVORS,
    Ablation,
    Fill,
    Split,
    Tick,
    batches,
    layer_name,
    mean_outputs,
    other,
    passes,
    plan,
    random_name,
    random_sets,
    score_states,
    split_windows,
    state_name,
)
from equipoise.audit.native_types import ROLES, NativeType, Role, text_type
from equipoise.audit.native_verdict import NativeVerdict, judge_native
from equipoise.data.packing import EvaluationWindow
from equipoise.statistics import Draws, Estimate, ScoreTable, bootstrap, difference, estimate, score

RANDOM_DRAWS = 5


@dataclass(frozen=True, kw_only=True)
class FillAudit:
    """All that one kind of ablation (zeros, or mean outputs) says of the model as a whole.

    Attributes:
        nll: nats per token of `attention`, `linear` and `none`.
        recovered: of `attention` and `linear`: 0 is none, 1 both.
        attribution: its `window` fields are attention's.
    """

    nll: Mapping[str, Estimate]
    recovered: Mapping[Role, Estimate]
    attribution: BranchAttribution


@dataclass(frozen=True, kw_only=True)
class MixerCost:
    """What taking one mixer out costs, in nats per token, paired by document; positive where it is missed."""

    mixer: Mixer
    cost: Mapping[Fill, Estimate]


@dataclass(frozen=True, kw_only=True)
class RandomControl:
    """Zeroing as many mixers as there are of a role, chosen at random among all.

    Attributes:
        count: how many.
        cost: of zeroing the role's own mixers, nats per token.
        draws: the mixers of each draw and their cost, nats per token.
        excess: cost minus the draws' mean, paired by document: positive where the role's mixers are missed
            more than as many others. None without a draw.
    """

    count: int
    cost: Estimate
    draws: Sequence[tuple[frozenset[Place], float]]
    excess: Estimate | None

    @property
    def summary(self) -> tuple[float, float, float] | None:
        """Mean, lowest and highest cost of the draws; None without one."""
        costs = [cost for _, cost in self.draws]
        return (sum(costs) / len(costs), min(costs), max(costs)) if costs else None


@dataclass(frozen=True, kw_only=True)
class NativeAudit:
    """The audit of one model.

    Attributes:
        name, model_type: of the model.
        kind: its entry in the table.
        nll: of the model as it is, nats per token.
        fills: by what stands in for a mixer's output.
        layers: every mixer, by layer.
        control: by role.
        table: sums per document of every state.
        split: the text; `split.calibration` made the means.
        resamples: of the bootstrap.
    """

    name: str
    model_type: str
    kind: NativeType
    nll: Estimate
    fills: Mapping[Fill, FillAudit]
    layers: Sequence[MixerCost]
    control: Mapping[Role, RandomControl]
    verdict: NativeVerdict
    table: ScoreTable
    split: Split
    resamples: int


@dataclass(frozen=True)
class NativeJob:
    """What an audit will run: known before the first forward pass."""

    kind: NativeType
    mixers: list[Mixer]
    random: Mapping[Role, list[frozenset[Place]]]
    states: Mapping[str, Ablation]
    split: Split

    def ticks(self, batch_size: int) -> int:
        """Batches in all, those for the means included."""
        scored = passes(self.states) * batches(self.split.scored, batch_size)
        return scored + batches(self.split.calibration, batch_size)


def prepare(
    model: nn.Module, windows: Sequence[EvaluationWindow], *, draws: int = RANDOM_DRAWS, seed: int = 0
) -> NativeJob:
    """Find the mixers, draw the control, split the text.

    Raises:
        ConversionError: a model whose mixers are not as the table says.
    """
    kind, mixers = find_mixers(model)
    places = [mixer.place for mixer in mixers]
    random: dict[Role, list[frozenset[Place]]] = {
        role: random_sets(places, role, draws=draws, seed=seed) for role in ROLES
    }
    return NativeJob(kind, mixers, random, plan(places, random), split_windows(windows))


def run_native(
    model: nn.Module,
    job: NativeJob,
    *,
    name: str,
    batch_size: int = 8,
    resamples: int = 2000,
    seed: int = 0,
    tick: Tick = lambda: None,
) -> NativeAudit:
    """Score every state of a job and judge the model, which is left exactly as it was.

    Args:
        model: the job's.
        job: from `prepare`.
        name: of the model, in the report.
        batch_size: windows at a time.
        resamples, seed: of the bootstrap over documents.
        tick: called after each batch.

    Raises:
        NativeAuditError: a likelihood that is not finite.
        ValueError: fewer than two documents to score.
    """
    means = mean_outputs(model, job.split.calibration, batch_size=batch_size, tick=tick)
    table = score_states(model, job.split.scored, job.states, means, batch_size=batch_size, tick=tick)
    draws = bootstrap(table, resamples=resamples, seed=seed)
    fills: dict[Fill, FillAudit] = {fill: _fill_audit(draws, fill) for fill in FILLS}
    worth: dict[Fill, Estimate] = {
        fill: difference(draws, "both", state_name(fill, "none")) for fill in FILLS
    }
    untyped: object = getattr(model, "config", None)
    return NativeAudit(
        name=name,
        model_type=text_type(untyped),
        kind=job.kind,
        nll=-score(draws, "both"),
        fills=fills,
        layers=[_mixer_cost(draws, mixer) for mixer in job.mixers],
        control={role: _control(draws, role, job.random[role], job.mixers) for role in ROLES},
        verdict=judge_native({fill: fills[fill].recovered for fill in FILLS}, worth),
        table=table,
        split=job.split,
        resamples=resamples,
    )


def _fill_audit(draws: Draws, fill: Fill) -> FillAudit:
    """`attention` takes the part of the window, and the model as it is that of the donor."""
    renamed = Draws(
        metric=draws.metric,
        unit=draws.unit,
        scores=MappingProxyType({
            DONOR: draws["both"],
            "both": draws["both"],
            "window": draws[state_name(fill, "attention")],
            "linear": draws[state_name(fill, "linear")],
            "none": draws[state_name(fill, "none")],
        }),
    )  # fmt: skip
    return FillAudit(
        nll={survivor: -score(draws, state_name(fill, survivor)) for survivor in SURVIVORS},
        recovered={"attention": recovered(renamed, "window"), "linear": recovered(renamed, "linear")},
        attribution=attribute(renamed, "literal"),
    )


def _mixer_cost(draws: Draws, mixer: Mixer) -> MixerCost:
    return MixerCost(
        mixer=mixer,
        cost={fill: difference(draws, "both", layer_name(fill, mixer.place)) for fill in FILLS},
    )


def _control(
    draws: Draws, role: Role, sets: Sequence[frozenset[Place]], mixers: Sequence[Mixer]
) -> RandomControl:
    without = state_name("zero", other(role))
    names = [random_name(role, index) for index in range(len(sets))]
    excess = None
    if names:
        mean = sum(draws[name] for name in names) / len(names)
        excess = estimate(mean - draws[without])
    return RandomControl(
        count=sum(mixer.place.role == role for mixer in mixers),
        cost=difference(draws, "both", without),
        draws=[
            (chosen, float(draws["both"][0] - draws[name][0]))
            for chosen, name in zip(sets, names, strict=True)
        ],
        excess=excess,
    )
