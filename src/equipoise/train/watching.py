"""What a stage's evaluation looks at beside the loss: how much each branch does, on a few held-out rows.

A `Watcher` is called at every evaluation step; its values are logged as ``eval_…`` through Trainer, so that
they reach progress, TensorBoard, W&B and `run.json`, and early stopping can look at any of them.
`Attribution` comes with training; others (recall, say) are handed to `equipoise.train.convert.convert`.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from equipoise.config import LOSS, ConfigError, RunConfig, Watch
from equipoise.data.packing import IGNORED_LABEL, collate
from equipoise.distributed import spread
from equipoise.models.branches import branches
from equipoise.ops.types import Reading
from equipoise.registry import unknown_name

PREFIX = "eval_"
"""Of watched values in the log; TensorBoard shows them under eval/."""
RECALL = "recall"
"""Share of recall questions that both branches answer: of the watcher that `equipoise convert` brings."""

Row = dict[str, Tensor]


@runtime_checkable
class Watcher(Protocol):
    """Looks at a model in training and says what it saw."""

    @property
    def names(self) -> Sequence[str]:
        """What `__call__` returns values of; early stopping can look at any of them."""
        ...

    def __call__(self, model: PreTrainedModel, step: int) -> Mapping[str, float]:
        """Values by name; NaN for one that is undefined at this step. Higher is better, but for nll….

        Args:
            model: in evaluation mode and under no_grad; to be left as it came.
            step: optimiser steps of the stage so far.
        """
        ...


class Attribution:
    """The branches' likelihoods on fixed rows, and what they say of which branch does the work.

    Values (nats per token unless said otherwise; "alone" is at weight 1, renormalised):
        nll, nll_window, nll_linear, nll_none, nll_donor: mean negative log-likelihood of both branches, each
            alone, no attention, and the donor.
        recovered, linear_recovered: (nll_none - nll) / (nll_none - nll_donor), of both and of linear alone; a
            ratio, 1 is the donor.
        gap: nll_window - nll, what both branches gain on the window alone.
        linear_share: the linear branch's Shapley share, see `linear_share`; a ratio.
        nll_window_literal, nll_linear_literal, linear_share_literal: the same with the other branch's term
            zeroed, where asked for.

    A hybrid with a single branch has nll, nll_none, nll_donor and recovered.

    Args:
        run: the recipe; its ``hybrid`` and ``watch`` must be set.
        rows: packed rows to choose ``watch.rows`` from.
        batch_size: rows at a time.
    """

    def __init__(self, run: RunConfig, rows: Dataset[Any], *, batch_size: int) -> None:
        assert run.hybrid is not None
        assert run.watch is not None
        self.rows = spread_rows(rows, run.watch.rows)
        self.batch_size = batch_size
        self.names = attribution_names(run)
        self._states = _states(run, run.watch)
        # the donor is frozen; LoRA on attention's projections does not reach a model without attention
        others_train = run.finetune is not None and run.finetune.targets is not None
        self._constant = ("nll_donor",) if others_train else ("nll_donor", "nll_none")
        self._known: dict[str, float] = {}

    def __call__(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """See the class."""
        nll = {name: self._nll(model, name) for name in self._states}
        self._known = {name: nll[name] for name in self._constant}
        return derived(nll)

    def _nll(self, model: PreTrainedModel, name: str) -> float:
        if name in self._known:
            return self._known[name]
        state, reading = self._states[name]
        with branches(model, state, reading=reading):
            return mean_nll(model, self.rows, batch_size=self.batch_size)


def derived(nll: Mapping[str, float]) -> dict[str, float]:
    """The likelihoods and what follows from them, as `Attribution` documents it."""
    none, both = nll["nll_none"], nll["nll"]
    scale = none - nll["nll_donor"]
    values = dict(nll) | {"recovered": _ratio(none - both, scale)}
    if "nll_window" in nll:
        window, linear = nll["nll_window"], nll["nll_linear"]
        values["linear_share"] = linear_share(both=both, window=window, linear=linear, none=none)
        values["linear_recovered"] = _ratio(none - linear, scale)
        values["gap"] = window - both
    if "nll_window_literal" in nll:
        window, linear = nll["nll_window_literal"], nll["nll_linear_literal"]
        values["linear_share_literal"] = linear_share(both=both, window=window, linear=linear, none=none)
    return values


def linear_share(*, both: float, window: float, linear: float, none: float) -> float:
    """The linear branch's share of the two-player Shapley value (Shapley 1953), from NLLs in nats per token.

    With v = -NLL: linear = 1/2 [(v(linear) - v(none)) + (v(both) - v(window))], over v(both) - v(none).
    NaN where both branches do not beat no attention; beyond 0..1 where a branch does harm.
    """
    return _ratio(0.5 * ((none - linear) + (window - both)), none - both)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")


def attribution_names(run: RunConfig) -> tuple[str, ...]:
    """The values that `Attribution` has for a recipe; none where it does not watch, or has no hybrid."""
    if run.watch is None or run.hybrid is None:
        return ()
    return tuple(derived(dict.fromkeys(_states(run, run.watch), 1.0)))


def _states(run: RunConfig, watch: Watch) -> dict[str, tuple[str, Reading]]:
    """Name in the log -> branch state and reading."""
    assert run.hybrid is not None
    states: dict[str, tuple[str, Reading]] = {
        "nll": ("both", "literal"), "nll_none": ("none", "literal"), "nll_donor": ("softmax", "literal"),
    }  # fmt: skip
    if run.hybrid.window is None or run.hybrid.feature_map is None:
        return states
    for branch in ("window", "linear"):
        states[f"nll_{branch}"] = (branch, "renormalised")
        if watch.literal:
            states[f"nll_{branch}_literal"] = (branch, "literal")
    return states


def check_watched(run: RunConfig, watchers: Iterable[Watcher]) -> None:
    """Make sure that what is asked for will be watched, before hours of stage 1 are spent.

    Raises:
        UnknownNameError: nothing watches the value that early stopping is to look at.
        ConfigError: recall is to be watched, but nobody was handed in to do that.
    """
    known = {LOSS, *attribution_names(run), *(name for watcher in watchers for name in watcher.names)}
    if run.watch is not None and run.watch.recall is not None and RECALL not in known:
        raise ConfigError(
            f"watch.recall: expected a watcher of {RECALL!r}, got none: `equipoise convert` brings one; from "
            "Python hand it to convert(watchers=…), or set watch.recall to null."
        )
    stopping = run.finetune.early_stopping if run.finetune is not None else None
    if stopping is not None and stopping.watch not in known:
        raise unknown_name("value for finetune.early_stopping.watch", stopping.watch, known)


def watched_history(history: Iterable[Mapping[str, float]]) -> list[dict[str, int | float]]:
    """The looks in a stage's log, each with its ``step`` and its values by name; to draw curves from."""
    looks = [entry for entry in history if any(name.startswith(PREFIX) for name in entry)]
    return [
        {"step": look["step"]} | {n.removeprefix(PREFIX): v for n, v in look.items() if n.startswith(PREFIX)}
        for look in looks
    ]


# ---- rows and likelihood


def spread_rows(rows: Dataset[Any], count: int) -> list[Row]:
    """``count`` rows spread evenly over all (all where there are fewer): neighbours share long documents."""
    available: int = len(rows)  # pyright: ignore[reportArgumentType]
    count = min(count, available)
    return [rows[i * available // count] for i in range(count)]


@torch.no_grad()
def mean_nll(model: PreTrainedModel, rows: Sequence[Row], *, batch_size: int) -> float:
    """Mean next-token loss on packed rows, in nats per token, in the state the model is in.

    Ranks share out the batches; the mean is the same however many there are.
    """

    def loss(start: int) -> tuple[float, int]:
        batch = collate(list(rows[start : start + batch_size]))
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        number = int((inputs["labels"][:, 1:] != IGNORED_LABEL).sum())
        return model(**inputs, use_cache=False).loss.item() * number, number

    losses = spread(range(0, len(rows), batch_size), loss)
    return sum(total for total, _ in losses) / max(1, sum(number for _, number in losses))


# ---- leaving no trace


@contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Put random states and modules' training flags back after the block: looking changes no training."""
    flags = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in flags:
            module.training = training
