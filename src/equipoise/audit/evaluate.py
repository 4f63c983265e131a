"""The part of the audit that runs models: the likelihood of held-out documents in every branch state."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from equipoise.audit.attribution import DONOR, KEPT, UNTRAINED
from equipoise.audit.report import (
    CONTROL,
    REFERENCE,
    ControlSetting,
    Guards,
    Layers,
    RunAudit,
    RunFacts,
    audit_run,
)
from equipoise.data.packing import IGNORED_LABEL, EvaluationBatch, EvaluationWindow, evaluation_batches
from equipoise.distributed import spread
from equipoise.layers.guards import STATE_LIMIT, NumericalGuard, add_sums
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.models.adapters import adapters_disabled, has_adapters
from equipoise.models.branches import branches, converted_mixers, keeps_branches, observe
from equipoise.models.layout import equal_window, reach, report_layers, state_bytes
from equipoise.models.storage import CheckpointError
from equipoise.ops import Branches
from equipoise.ops.types import Reading
from equipoise.statistics import Estimate, ScoreTable, bootstrap, difference

STATES: Mapping[str, tuple[str, Reading]] = {
    DONOR: ("softmax", "literal"),
    "both": ("both", "literal"),
    "window": ("window", "literal"),
    "linear": ("linear", "literal"),
    "none": ("none", "literal"),
    "sinks": ("sinks", "literal"),
    "window_renormalised": ("window", "renormalised"),
    "linear_renormalised": ("linear", "renormalised"),
}
"""The audit's columns: branch state and reading of each."""
CONTROL_SINKS = 4
GUARDED = 4
"""Windows that are looked at for numbers near their ends: each takes about a forward pass more."""
RUN = "run.json"

Floats = NDArray[np.float64]
Tick = Callable[[], None]


@dataclass(frozen=True)
class DocumentScores:
    """Summed negative log-likelihood, in nats, and token counts of each document.

    Attributes:
        nll, tokens: over all predicted tokens.
        far_nll, far_tokens: over tokens predicted from a position beyond the cut alone.
    """

    nll: Floats
    tokens: Floats
    far_nll: Floats
    far_tokens: Floats


@torch.no_grad()
def score_documents(
    model: nn.Module, windows: Sequence[EvaluationWindow], *, beyond: int | None, batch_size: int, tick: Tick
) -> DocumentScores:
    """Run every window and sum by document. Ranks share out the batches; the sums do not depend on them.

    Args:
        model: in the branch state to score.
        windows: of single documents (see `equipoise.data.packing.evaluation_windows`).
        beyond: tokens whose predicting position (from 0) is larger count as far; None for none.
        batch_size: windows at a time.
        tick: called after each batch.
    """
    index = {document: i for i, document in enumerate(sorted({w.document for w in windows}))}
    nll, tokens, far_nll, far_tokens = (np.zeros(len(index)) for _ in range(4))
    device = next(model.parameters()).device

    def score(batch: EvaluationBatch) -> list[Floats]:
        inputs, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        losses, kept = _token_losses(logits, batch.labels.to(device))
        far = torch.zeros_like(kept) if beyond is None else kept & (_positions(kept) > beyond)
        by_row = (losses * kept, kept, losses * far, far)
        return [values.double().sum(1).cpu().numpy() for values in by_row]

    batches = list(evaluation_batches(windows, batch_size=batch_size, pad_token_id=0))
    for batch, scores in zip(batches, spread(batches, score, tick=tick), strict=True):
        rows = [index[int(document)] for document in batch.document_ids]
        for total, values in zip((nll, tokens, far_nll, far_tokens), scores, strict=True):
            np.add.at(total, rows, values)
    return DocumentScores(nll, tokens, far_nll, far_tokens)


def _token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [B, L-1] of each next token, and which of them count."""
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses, targets != IGNORED_LABEL


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)


@dataclass(frozen=True)
class RunNote:
    """What is known of how a model was made, from its `run.json`.

    Attributes:
        recipe, seed, train_tokens, train_seconds: as in the file.
        source, subset, text_column, streaming: the data settings it was made with, if known.
    """

    recipe: str
    seed: int
    train_tokens: int
    train_seconds: float
    source: str | None = None
    subset: str | None = None
    text_column: str | None = None
    streaming: bool = False

    @classmethod
    def read(cls, directory: Path) -> RunNote:
        """From a model's directory; one without the file is called by its name.

        Raises:
            CheckpointError: the file is not what a conversion writes.
        """
        path = directory / RUN
        if not path.is_file():
            return cls(directory.name, 0, 0, 0.0)
        try:
            note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            data = note["settings"]["data"]
            return cls(
                note["recipe"],
                note["seed"],
                note["train_tokens"],
                float(note["train_seconds"]),
                data["source"],
                data["subset"],
                data["text_column"],
                bool(data.get("streaming", False)),  # runs from before streaming have no such setting
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: expected what `equipoise convert` writes, got a file that does not read as such "
                f"({type(error).__name__}: {error}). Remove or restore it."
            ) from None


@dataclass(frozen=True)
class SoftmaxReference:
    """A softmax model that was scored on the audit's windows.

    Attributes:
        name: of its recipe.
        train_tokens: what it was trained on.
        scores: on the same windows.
    """

    name: str
    train_tokens: int
    scores: DocumentScores


def audit_model(
    model: PreTrainedModel,
    windows: Sequence[EvaluationWindow],
    note: RunNote,
    *,
    batch_size: int = 8,
    resamples: int = 2000,
    seed: int = 0,
    donor: DocumentScores | None = None,
    references: Sequence[SoftmaxReference] = (),
    tick: Tick = lambda: None,
) -> tuple[RunAudit, ScoreTable, DocumentScores]:
    """Score a converted model in every branch state and against its control, and judge it.

    Args:
        model: converted; its adapters not merged.
        windows: held-out text, cut by document.
        note: how it was made.
        batch_size: windows at a time.
        resamples, seed: of the bootstrap over documents.
        donor: the donor's scores on the same windows, where they are known already.
        references: softmax models scored on the same windows, to compare with.
        tick: called after each batch.

    Returns:
        The audit of this run, the scores behind it, and the donor's.

    Raises:
        ConversionError: the model is not converted, or the donor cannot be run from it.
    """
    configs = [mixer.config for mixer in converted_mixers(model)]
    has_linear = any(config.feature_map is not None for config in configs)
    setting, beyond, reason = _control(model, max(len(w.input_ids) for w in windows))

    def run(context: AbstractContextManager[None]) -> DocumentScores:
        with context:
            return score_documents(model, windows, beyond=beyond, batch_size=batch_size, tick=tick)

    scores = {
        name: donor if donor is not None and name == DONOR else run(branches(model, state, reading=reading))
        for name, (state, reading) in STATES.items()
    }
    if keeps_branches(model):
        scores[KEPT] = run(branches(model, Branches(window=False, linear=False)))
    if has_adapters(model):
        scores["softmax_lora"] = run(branches(model, "softmax_lora"))
    if has_linear:
        with untrained_maps(model, note.seed):
            scores[UNTRAINED] = run(branches(model, "linear", reading="renormalised"))
    with adapters_disabled(model):
        control = AttentionMode("swa", window=setting.window, sinks=setting.sinks)
        scores[CONTROL] = run(branches(model, control))
    benefit: Estimate | None = None
    if reason is None:
        benefit, reason = _benefit(scores["both"], scores[CONTROL], resamples, seed)
    scores |= {REFERENCE + reference.name: reference.scores for reference in references}
    table = ScoreTable.from_nll({name: s.nll for name, s in scores.items()}, scores["both"].tokens)
    audit = audit_run(
        table, recipe=note.recipe, seed=note.seed,
        has_window=any(config.window is not None for config in configs), has_linear=has_linear,
        facts=_facts(model, note, windows), control=setting, benefit_difference=benefit,
        benefit_reason=reason, resamples=resamples, bootstrap_seed=seed,
        references={reference.name: reference.train_tokens for reference in references},
    )  # fmt: skip
    return audit, table, scores[DONOR]


@contextmanager
def untrained_maps(model: nn.Module, seed: int) -> Generator[None]:
    """The model with feature maps and gates as they were initialised, for the time of the block."""
    trained = [(p, p.detach().clone()) for mixer in mixers_of(model) for p in mixer.parameters()]
    try:
        for mixer in mixers_of(model):
            mixer.reset_parameters(seed)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in trained:
                parameter.copy_(values)


@torch.no_grad()
def guard_counts(model: nn.Module, windows: Sequence[EvaluationWindow]) -> Guards | None:
    """Count numbers near their ends over a few windows, both branches on; None without a linear branch."""
    device, decoder = next(model.parameters()).device, cast("Any", model)
    sums: dict[str, float] = {}
    odd: set[int] = set()
    limits = {"features": 0.0, "denominators": 0.0, "state": STATE_LIMIT}

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        guard = NumericalGuard()
        guard(mixer, inputs)
        add_sums(sums, guard.sums)
        odd.update(i for i, counts in guard.layers.items() if any(counts[n] > limits[n] for n in limits))

    with branches(model, "both"), observe(model, observer):
        for window in windows[:GUARDED]:
            decoder.get_decoder()(input_ids=window.input_ids[None].to(device), use_cache=False)
    if "mass" not in sums:
        return None
    return Guards(
        windows=len(windows[:GUARDED]), features=round(sums["features"]),
        denominators=round(sums["denominators"]), layers=tuple(sorted(odd)),
        state=sums["lost"] / sums["mass"] if sums["mass"] > 0 else 0.0,
    )  # fmt: skip


def _facts(model: PreTrainedModel, note: RunNote, windows: Sequence[EvaluationWindow]) -> RunFacts:
    layers = report_layers(model)
    return RunFacts(
        state_bytes=state_bytes(model), reach=reach(model), train_tokens=note.train_tokens,
        train_seconds=note.train_seconds,
        layers=Layers(converted=layers.converted, local=layers.local, softmax=layers.softmax),
        guards=guard_counts(model, windows),
    )  # fmt: skip


def _control(model: PreTrainedModel, context: int) -> tuple[ControlSetting, int | None, str | None]:
    """SWA + sinks at equal bytes, the position beyond both reaches, why benefit cannot be tested, if so."""
    window = equal_window(model, sinks=CONTROL_SINKS)
    setting = ControlSetting(window=window, sinks=CONTROL_SINKS, state_bytes=state_bytes(model))
    mixers = mixers_of(model)
    if all(mixer.config.feature_map is None for mixer in mixers):
        return setting, None, "the model has no linear branch: it is SWA + sinks itself"
    if window >= context:
        return setting, None, (
            f"the window of equal bytes ({window} tokens) covers the whole context of {context} tokens"
        )  # fmt: skip
    own, control = reach(model), reach(model, window=window)
    if own is None or control is None:
        return setting, None, "layers left with full softmax see everything: nothing lies beyond reach"
    # Sinks are seen from everywhere, so what lies beyond reach starts after them.
    beyond = max(own + max(mixer.config.sinks for mixer in mixers), control + CONTROL_SINKS)
    if beyond >= context - 2:  # the last position predicts nothing
        return setting, None, (
            f"no token lies beyond both reaches (hybrid {own}, SWA + sinks at equal bytes {control}) in a "
            f"context of {context} tokens"
        )  # fmt: skip
    return setting, beyond, None


def _benefit(
    hybrid: DocumentScores, control: DocumentScores, resamples: int, seed: int
) -> tuple[Estimate | None, str | None]:
    """Gain on the control in nats per token beyond both reaches; paired bootstrap over documents."""
    kept = hybrid.far_tokens > 0
    if kept.sum() < 2:
        return None, "fewer than two documents have tokens beyond both reaches"
    sums = {"both": -hybrid.far_nll[kept], CONTROL: -control.far_nll[kept]}
    table = ScoreTable(metric="nll", unit="nats/token", sums=sums, weights=hybrid.far_tokens[kept])
    return difference(bootstrap(table, resamples=resamples, seed=seed), "both", CONTROL), None
