"""Windows, sinks and states of tools/frontier.py's runs, within their bytes, and how they learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel

from equipoise import HybridConfig, hybridize
from equipoise.files import write_text
from equipoise.models.allocation import allocate
from equipoise.models.allocation.choosing import curve_of, improved, share_windows, with_fewer_sinks
from equipoise.models.allocation.measuring import DonorDivergence
from equipoise.models.layout import linear_head_bytes
from equipoise.train.recipes import load_recipe
from frontier_ablations import AS_WINDOWS, BEFORE, FIRST, both, changes_of
from frontier_texts import Setting, rows_of

WINDOWS = Path(__file__).parents[1] / "docs" / "results" / "frontier-windows.json"
"""Windows that a search found: it takes minutes, and every seed has the same."""
MOVES, SMALL = 400, 24
"""Measurements by which windows are improved, the rivals' and ours; and budgets of so few tokens had twice
the share of bytes for linear branches before states had half of each value."""
SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
SINKS = 4
"""Of every window, to begin with."""
WINDOWS_ALONE = ("even", "moved", "moved-heads", "own-windows")
"""Runs without a linear branch; the last one has the windows of `equipoise`, so fewer bytes."""
OF_OLD = "-before"
"""At the end of a run's name: as the recipe and its rivals were until 2026-11-29, 17:00 (`BEFORE`), with four
sinks in every layer; they are measured since, for rivals and for ours."""
STEPS = 800
"""Optimiser steps of all stages together, of 2,048 tokens each."""
SCALE: Mapping[str, Any] = {
    "transfer": {"learning_rate": 3e-2},
    "finetune": {"learning_rate": 5e-4, "map_learning_rate": 1e-2},
}
"""What this donor's size asks for, the same for every run that trains additive states."""
DELTA_SCALE: Mapping[str, Any] = {
    "transfer": {**SCALE["transfer"], "learning_rate": 1e-2},
    "finetune": SCALE["finetune"],
}
"""And for the delta rule."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TUNING: Mapping[str, Mapping[str, float]] = {
    "tuned": {"distillation": 1.0},
    "next-token": {"distillation": 1.0, "next-token": 1.0},
    "next-token-3": AS_WINDOWS,
}
"""What windows alone learn from, and its weights, by what stands behind the colon of a run's name."""


def tuning_of(how: str) -> dict[str, Any]:
    """Settings of stage 2 for windows alone, ``next-token-3@2`` with twice the rate of LoRA.

    Raises:
        BadParameter: no tuning has that name, or what follows the @ is not a positive number.
    """
    objectives, at, times = how.partition("@")
    try:
        rate = float(times if at else 1) * SCALE["finetune"]["learning_rate"]
    except ValueError:
        rate = 0.0
    if objectives not in TUNING or not 0 < rate < 1:
        raise typer.BadParameter(
            f"expected one of {', '.join(TUNING)}, @ and by how much its learning rate is multiplied behind "
            f"it or not, got {how!r}."
        )
    return {**SCALE["finetune"], "learning_rate": rate, "objectives": dict(TUNING[objectives])}


def even(tokens: int) -> HybridConfig:
    """Windows and sinks, the same in every layer."""
    return HybridConfig(window=tokens - SINKS, sinks=SINKS, feature_map=None)


def searched(at: Setting, sought: str, search: Callable[[], Any]) -> Any:
    """What a search found on a donor, or had found before."""
    longer = "" if at.length == 512 else f", {at.length} long"
    key = f"{at.digest} {sought}{longer}"
    known = json.loads(WINDOWS.read_text(encoding="utf-8")) if WINDOWS.exists() else {}
    if key not in known:
        found = search()
        # another run may have found something meanwhile
        known = json.loads(WINDOWS.read_text(encoding="utf-8")) if WINDOWS.exists() else {}
        known[key] = found
        write_text(WINDOWS, json.dumps(known, indent=1))
    return known[key]


def measured_rows(at: Setting) -> dict[str, torch.Tensor]:
    """Training rows that windows are searched on, ours and the rivals'."""
    return {"input_ids": torch.from_numpy(rows_of(at.draw("train", seed=1), 4 * at.rows))}


def opened(folder: Path) -> PreTrainedModel:
    """A model, where it runs."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval().to(DEVICE)


def loaded(at: Setting) -> PreTrainedModel:
    """The donor."""
    return opened(at.donor)


def moved(at: Setting, *, by_head: bool, fewer_sinks: bool = True) -> HybridConfig:
    """The same bytes moved between layers or heads: shared by worth, sinks measured, improved by moves."""
    each = at.kv_heads if by_head else 1
    sizes = [size for size in SIZES if size < at.length]

    def search() -> dict[str, list[Any]]:
        model: Any = hybridize(loaded(at), even(at.tokens), check=False)
        measure = DonorDivergence(model, measured_rows(at), batch_size=2 * at.rows)
        worth = measure.worth(sizes, sinks=SINKS)  # of query heads: those of a group share a window
        units = worth.unflatten(1, (each, -1)).sum(2).flatten(0, 1)
        curves = [curve_of(values, sizes) for values in units.tolist()]
        starts = [share_windows(curves, len(curves) * (at.tokens - SINKS)), [at.tokens - SINKS] * len(curves)]

        def by_layer(windows: list[int]) -> list[list[int]]:
            shared = at.kv_heads // each
            return [windows[i : i + each] * shared for i in range(0, len(windows), each)]

        start = min(starts, key=lambda windows: measure.windowed(by_layer(windows), sinks=SINKS))
        layers, sinks = by_layer(start), [SINKS] * at.layers
        if fewer_sinks:
            layers, sinks = with_fewer_sinks(
                layers, SINKS, lambda tried, own: measure.windowed(tried, sinks=own), longest=at.length
            )
        best = improved(
            [window for of in layers for window in of[:each]],
            lambda windows: measure.windowed(by_layer(windows), sinks=sinks),
            smallest=2, longest=at.length, measurements=MOVES,
        )  # fmt: skip
        return {"windows": by_layer(best), "sinks": sinks}

    sinks = ", sinks measured" if fewer_sinks else ""
    found = searched(at, f"{at.tokens} {'heads' if by_head else 'layers'}{sinks}", search)
    own: dict[int, dict[str, Any]] = {
        i: {"window": max(of), "sinks": kept, **({"head_windows": of} if len(set(of)) > 1 else {})}
        for i, (of, kept) in enumerate(zip(found["windows"], found["sinks"], strict=True))
    }
    longest = max(map(max, found["windows"]))
    return HybridConfig(window=longest, sinks=SINKS, feature_map=None, per_layer=own)


def shared_out(
    at: Setting, changed: dict[str, Any], allocation: Mapping[str, Any], *, evenly: bool
) -> dict[str, Any]:
    """The same settings with windows and linear heads, searched once for all runs of one head size."""
    run = load_recipe("equipoise", {"hybrid": changed})
    assert run.hybrid is not None
    assert run.allocation is not None
    hybrid, head = run.hybrid, linear_head_bytes(run.hybrid, at.head_dim)
    bytes_, allocation = at.tokens * at.token_bytes, dict(allocation)
    share = allocation.pop("linear_share", run.allocation.linear_share) * allocation.pop("heads", 1)
    settings = run.allocation.model_copy(
        update={"state_bytes": bytes_, "linear_share": share, "moves": MOVES, **allocation}
    )

    def search() -> dict[str, Any]:
        found = allocate(loaded(at), measured_rows(at), hybrid, settings, batch_size=2 * at.rows).hybrid
        own = {"feature_multiple": found.feature_multiple} if settings.narrower else {}
        return {"window": found.window, **own, "per_layer": found.model_dump(mode="json")["per_layer"]}

    small = settings.elsewhere and {k: v for k, v in settings.elsewhere.items() if k != "value_divisor"}
    own = json.dumps([settings.linear_share, small], sort_keys=True)
    if settings.weigh_lookups:
        own += f", lookups from {settings.least_importance}"
    if settings.narrower:
        own += ", or narrower"
    sinks = ", sinks measured" if settings.fewer_sinks else ""
    shared = ", one state a key/value head" if at.heads > at.kv_heads and hybrid.map_heads != "query" else ""
    found = searched(at, f"{bytes_} bytes, {head} a linear head{shared}, {own}{sinks}", search)
    for layer in found["per_layer"].values():  # windows are found once for either
        layer["rotary"] = hybrid.rotary
    if evenly:
        width = {"feature_multiple": found.get("feature_multiple", hybrid.feature_multiple)}
        layers = [hybrid.model_copy(update={**width, **own}) for own in found["per_layer"].values()]
        linear = sum(
            len(of.linear_heads or ()) * linear_head_bytes(of, at.head_dim) for of in layers if of.feature_map
        )
        window = (bytes_ - linear) // at.token_bytes - SINKS
        dropped = {"window": window, "sinks": SINKS, "head_windows": None}
        found = {
            **found,
            "window": window,
            "per_layer": {layer: {**own, **dropped} for layer, own in found["per_layer"].items()},
        }
    return {**changed, **found}


def windows_of_ours(at: Setting) -> HybridConfig:
    """Windows and sinks of `equipoise` without its states: what these are worth, not an equal budget."""
    _, settings = settings_of("equipoise", at)
    found = shared_out(at, settings["hybrid"], {}, evenly=False)
    own = {
        int(layer): {"window": of["window"], "sinks": of["sinks"], "head_windows": of.get("head_windows")}
        for layer, of in found["per_layer"].items()
    }
    return HybridConfig(window=found["window"], sinks=SINKS, feature_map=None, per_layer=own)


def windows_alone(base: str, at: Setting, *, of_old: bool) -> HybridConfig:
    """Of a run without linear branches."""
    if base == "even":
        return even(at.tokens)
    if base == "own-windows":
        return windows_of_ours(at)
    return moved(at, by_head=base == "moved-heads", fewer_sinks=not of_old)


def settings_of(name: str, at: Setting, steps: int = STEPS) -> tuple[str, dict[str, Any]]:
    """Recipe and settings of a run that trains both branches."""
    of_old, name = name.endswith(OF_OLD), name.removesuffix(OF_OLD)
    changes = changes_of(name)
    own = [FIRST[of] for of in name.split("+") if of in FIRST]
    first = steps // (own or [4 if changes is None else 8 if of_old else 60])[0]
    half = {"transfer": {"max_steps": first}, "finetune": {"max_steps": steps - first}}
    delta = changes is not None and "state_update" not in changes.get("hybrid", {})
    rates = DELTA_SCALE if delta else SCALE
    scale = {stage: {**rates[stage], **half[stage]} for stage in half}
    if changes is not None:
        changes = both(BEFORE, changes) if of_old else changes
        own = {part: dict(values) for part, values in changes.items()}
        merged = {stage: {**scale[stage], **own.pop(stage, {})} for stage in scale}
        hybrid = {"sinks": SINKS, **own.get("hybrid", {})}
        return "equipoise", {**merged, "hybrid": hybrid, "allocation": None}
    # published recipes: a state of D_phi = D in every head, the window takes what is left
    states = at.layers * at.heads * at.head_dim * (at.head_dim + 1) * 4
    left = at.tokens - -(-states // at.token_bytes)
    return name, {**scale, "hybrid": {"window": max(2, left), "feature_multiple": 1}}
