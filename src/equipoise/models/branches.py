"""Switching the branches of a converted model, and watching what its attention sees."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from torch import Tensor, nn

from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import SINKS_STATE_KEYS, AttentionMode, HybridMixer, LayerInputs, Observer
from equipoise.models.adapters import adapters_disabled
from equipoise.models.families import ConversionError
from equipoise.ops import Branches
from equipoise.ops.types import Reading
from equipoise.registry import unknown_name

BRANCH_STATES = ("both", "window", "linear", "none", "sinks", "softmax", "softmax_lora")
"""both: the hybrid. window, linear: one branch alone. none: attention outputs 0. sinks: softmax over the
first eight keys. softmax: the donor (its own attention, adapters off). softmax_lora: the same with adapters
on."""


def mode_of(state: str, reading: Reading = "literal") -> AttentionMode:
    """The mode behind a branch state's name.

    Raises:
        UnknownNameError: no such state.
    """
    if state in ("both", "window", "linear"):
        return AttentionMode("hybrid", Branches(state != "linear", state != "window", reading))
    if state == "none":
        return AttentionMode("none")
    if state == "sinks":
        return AttentionMode("swa", window=0, sinks=SINKS_STATE_KEYS)
    if state in ("softmax", "softmax_lora"):
        return AttentionMode("softmax")
    raise unknown_name("branch state", state, BRANCH_STATES)


def converted_mixers(model: nn.Module) -> list[HybridMixer]:
    """The model's mixers.

    Raises:
        ConversionError: it has none.
    """
    mixers = mixers_of(model)
    if not mixers:
        raise ConversionError(
            f"expected a converted model, got a {type(model).__name__} without hybrid layers: call "
            "hybridize() first."
        )
    return mixers


@contextmanager
def branches(
    model: nn.Module, state: str | Branches | AttentionMode, *, reading: Reading = "literal"
) -> Generator[None]:
    """Run a converted model in one branch state for the time of the block.

    Layers that were not converted keep their own attention, and layers (or heads) that were given one branch
    only keep it while others are ablated. Where some layers look things up, those whose linear branch is a
    mean of the past (map `constant`) keep their window in every state: a mean cannot stand alone, and asked
    to it would hide what the others know (docs/adr/0032). Caches belong to the state they were made in.

    Args:
        model: a converted model, also inside wrappers.
        state: a name of `BRANCH_STATES`, a `Branches` value, or a whole `AttentionMode`.
        reading: how the survivor of ``window`` and ``linear`` is read: ``literal`` or ``renormalised``.

    Raises:
        UnknownNameError: no such state.
        ConversionError: the model is not converted, or ``softmax`` is asked of one whose adapters are merged.
    """
    mixers = converted_mixers(model)
    if isinstance(state, str):
        mode = mode_of(state, reading)
    else:
        mode = state if isinstance(state, AttentionMode) else AttentionMode("hybrid", state)
    if state == "softmax" and _merged(model):
        raise ConversionError(
            "the LoRA adapters of this checkpoint are merged, so the donor cannot be run from it: "
            "use 'softmax_lora', or a checkpoint saved without merging."
        )
    before = [mixer.mode for mixer in mixers]
    with adapters_disabled(model) if state == "softmax" else nullcontext():
        try:
            for mixer, own in zip(mixers, _modes(mixers, mode), strict=True):
                mixer.mode = own
            yield
        finally:
            for mixer, old in zip(mixers, before, strict=True):
                mixer.mode = old


def rivals(mixers: Sequence[HybridMixer]) -> list[HybridMixer]:
    """The layers in which one branch can be told from the other: with both, and a linear branch that looks
    things up. Where there are only means of the past, those."""
    both = [mixer for mixer in mixers if mixer.has_both]
    return [mixer for mixer in both if not mixer.summarises] or both


def keeps_branches(model: nn.Module) -> bool:
    """Whether some layer or head of a hybrid keeps a branch whatever is ablated in the others.

    Raises:
        ConversionError: the model is not converted.
    """
    mixers = converted_mixers(model)
    rivalling = rivals(mixers)
    if not rivalling:
        return False
    return len(rivalling) < len(mixers) or any(len(m.linear_indices) < m.heads for m in rivalling)


def _modes(mixers: list[HybridMixer], mode: AttentionMode) -> list[AttentionMode]:
    """The mode of each layer: where some have two branches to tell apart, the others keep what they have."""
    rivalling = set(rivals(mixers))
    if mode.kind != "hybrid" or not rivalling:
        return [mode] * len(mixers)
    whole = AttentionMode("hybrid", window=mode.window)
    window = AttentionMode("hybrid", replace(mode.branches, window=True), window=mode.window)

    def of(mixer: HybridMixer) -> AttentionMode:
        if mixer in rivalling:
            return mode
        return window if mixer.has_both else whole

    return [of(mixer) for mixer in mixers]


def _merged(model: nn.Module) -> bool:
    """Whether the model, or one inside these wrappers, has its adapters merged."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return any((getattr(config, "equipoise", None) or {}).get("merged") for config in configs)


@contextmanager
def capture(model: nn.Module, observer: Observer) -> Generator[None]:
    """Run the donor and hand every converted layer's inputs and softmax output to ``observer``.

    The observer is called inside the forward pass, layer after layer, as (mixer, inputs, output).
    """
    with branches(model, "softmax"), observe(model, observer):
        yield


def _both(one: Observer | None, other: Observer) -> Observer:
    """Two observers as one."""
    if one is None:
        return other
    first = one

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        first(mixer, inputs, output)
        other(mixer, inputs, output)

    return observer


@contextmanager
def observe(model: nn.Module, observer: Observer, *, also: bool = False) -> Generator[None]:
    """Hand every converted layer's inputs and output to ``observer``, in whatever mode the model runs.

    With ``also``, who observes already goes on doing so, first.
    """
    mixers = converted_mixers(model)
    before = [mixer.observer for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.observer = _both(mixer.observer, observer) if also else observer
        yield
    finally:
        for mixer, old in zip(mixers, before, strict=True):
            mixer.observer = old
