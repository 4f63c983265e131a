"""What a sweep runs: a YAML file of variants, axes and seeds -> a list of cells, all checked first.

A setting is named by its dotted key in a recipe (`hybrid.window`), and the value given replaces the recipe's
whole: `transfer.objectives: {output: 1000}` leaves no other objective. What all cells share (`base`, a scale,
the command line) never gives a recipe a stage or a branch that it does not have; what a variant or an axis
says holds as it stands.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from equipoise.config import (
    ConfigError,
    RunConfig,
    Settings,
    load_yaml,
    merge,
    parse,
    parse_assignments,
)
from equipoise.registry import unknown_name
from equipoise.train.recipes import check_names, load_recipe

DEMO = "demo"
"""The donor that the demo trains, and the scale that sweeps take for it."""
Judge = Literal["nll", "linear_alone", "linear_share", "window_gap"]

_ADDED = (
    "hybrid", "hybrid.window", "hybrid.feature_map", "transfer", "finetune", "finetune.early_stopping",
    "finetune.window_dropout",
)  # fmt: skip
"""Settings whose null means that a recipe does without: what all cells share does not fill them in."""


class AuditSettings(Settings):
    """How every cell is audited: all on the same held-out text."""

    source: str | None = None
    """Text to score; the training data's held-out part where null."""
    context_length: int | None = Field(default=None, ge=2)
    """Tokens at a time; that of training where null."""
    documents: int = Field(default=200, ge=2)
    """How many at most."""
    max_windows: int = Field(default=4, ge=1)
    """Contexts of each document at most."""
    batch_size: int = Field(default=8, ge=1)
    """Contexts at a time."""


class Variant(Settings):
    """One row of the comparison, before axes multiply it."""

    name: str = Field(min_length=1)
    """What it is called in the table."""
    recipe: str | None = None
    """Shipped recipe or file; the sweep's where null."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of the recipe by dotted key."""
    train: bool = True
    """false: converted and audited as initialised."""


class Published(Settings):
    """Figures from elsewhere, shown beside the measured ones."""

    label: str
    """What they are: measure, model, source."""
    values: dict[str, float]
    """By the name of the comparison's row."""


class SweepConfig(Settings):
    """A sweep: variants x axes x seeds."""

    name: str
    """What the sweep is called."""
    summary: str = ""
    """What it asks, in a sentence."""
    reference: str = ""
    """Where the experiment was published."""
    recipe: str | None = None
    """Recipe of every variant that names none."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of all cells by dotted key."""
    variants: tuple[Variant, ...] = ()
    """Rows of the comparison; the recipe alone where empty."""
    axes: dict[str, list[Any] | dict[str, Any]] = Field(default_factory=dict)
    """Dotted key -> values, or names -> values; every combination of all axes is run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One conversion per row and seed."""
    judge: Judge = "nll"
    """What rows are ranked by."""
    published: Published | None = None
    """Figures from elsewhere for the table."""
    scales: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further settings of all cells under a name; `demo` is taken with the demo's donor."""
    audit: AuditSettings = Field(default_factory=AuditSettings)
    """How cells are audited."""

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        if not self.variants and self.recipe is None:
            raise ValueError("expected a recipe, or variants that name theirs")
        for variant in self.variants:
            if variant.recipe is None and self.recipe is None:
                raise ValueError(f"variant {variant.name!r} names no recipe, and neither does the sweep")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different whole numbers from 0, got {list(self.seeds)}")
        if empty := [key for key, values in self.axes.items() if not values]:
            raise ValueError(f"axes must have values, {empty[0]} has none")
        shared = [*self.base, *itertools.chain.from_iterable(self.scales.values()), *self.axes]
        for key in [*shared, *itertools.chain.from_iterable(variant.set for variant in self.variants)]:
            check_setting(key)
        return self


@dataclass(frozen=True)
class Cell:
    """One conversion and its audit.

    Attributes:
        row: name of the comparison's row; also the recipe's name in the audit.
        seed: of the conversion.
        run: the recipe with all changes.
    """

    row: str
    seed: int
    run: RunConfig

    @property
    def folder(self) -> str:
        """Name of its directory."""
        return f"{_slug(self.row)}-seed{self.seed}"


def sweep_names() -> list[str]:
    """The sweeps that ship, without those that only others derive from."""
    return sorted(name for name, values in _shipped().items() if not values.get("abstract"))


def load_sweep(name_or_file: str) -> SweepConfig:
    """A shipped sweep, or a YAML file; `extends` names one to derive from, a file's relative to it.

    Raises:
        UnknownNameError: no such sweep.
        ConfigError: not a sweep; says which setting is wrong.
    """
    values = _resolve(name_or_file, None, ())
    if values.pop("abstract", False):
        raise ConfigError(
            f"{name_or_file} is not a sweep itself. Choose one of {', '.join(sweep_names())}, or a file."
        )
    try:
        if isinstance(values.get("variants"), list):
            values["variants"] = [_variant(i, given) for i, given in enumerate(values["variants"], 1)]
        return parse(SweepConfig, values)
    except ConfigError as error:
        raise ConfigError(f"sweep {name_or_file}: {error}") from None


def plan(
    config: SweepConfig,
    *,
    scale: str | None = None,
    data: str | None = None,
    assignments: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """All cells: every row with the first seed, then with the next; stopped early, all rows can be compared.

    Args:
        config: the sweep.
        scale: name of one of its scales.
        data: source of text, over all others.
        assignments: `key=value`, over everything but the axes.
        seeds: other than the sweep's own.

    Raises:
        UnknownNameError: no such recipe, scale, or registered name in a setting.
        ConfigError: settings that do not fit; names the row.
    """
    if scale is not None and scale not in config.scales:
        raise unknown_name("scale", scale, config.scales)
    asked = dict(_assignment(text) for text in assignments)
    for key in asked:
        if clash := [axis for axis in config.axes if _overlap(axis, key)]:
            raise ConfigError(
                f"--set {key}: {clash[0]} is an axis of this sweep; write a sweep file of your own."
            )
    shared = {**config.base, **(config.scales[scale] if scale else {})}
    if data is not None:
        shared["data.source"] = data
    rows = [
        (
            _row_name(variant, names, alone=not config.variants),
            variant,
            dict(zip(config.axes, values, strict=True)),
        )
        for variant in config.variants or (Variant(name=str(config.recipe)),)
        for names, values in _points(config.axes)
    ]
    runs = {name: _run(config, name, variant, shared, point, asked) for name, variant, point in rows}
    if len(runs) < len(rows) or len({_slug(name).lower() for name in runs}) < len(rows):
        raise ConfigError(
            f"sweep {config.name}: two rows have the same name; rename a variant or an axis value."
        )
    _check_distinct(config, runs)
    return [Cell(name, seed, run) for seed in seeds or config.seeds for name, run in runs.items()]


def _check_distinct(config: SweepConfig, runs: Mapping[str, RunConfig]) -> None:
    """Raise where two rows would run the same: an axis that a variant has no use for, say."""
    seen: dict[str, str] = {}
    for name, run in runs.items():
        other = seen.setdefault(run.model_dump_json(exclude={"name", "summary", "reference"}), name)
        if other != name:
            raise ConfigError(f"sweep {config.name}: rows {other!r} and {name!r} have the same settings.")


def check_setting(key: str) -> None:
    """Raise unless a recipe has a setting of this dotted key.

    Raises:
        ConfigError: it has not; names the nearest one.
    """
    fields: Mapping[str, Any] | None = RunConfig.model_fields
    for part in key.split("."):
        if fields is None:
            return  # the keys of a mapping: an objective's name
        if part not in fields:
            raise ConfigError(f"{key}: {unknown_name('setting', part, fields)}")
        inner = [kind for kind in _kinds(fields[part].annotation) if issubclass(kind, BaseModel)]
        fields = inner[0].model_fields if inner else None


def _kinds(annotation: Any) -> list[type]:
    from typing import get_args

    kinds = [annotation, *get_args(annotation)]
    return [kind for kind in kinds if isinstance(kind, type)]


def _variant(number: int, given: Any) -> Variant:
    try:
        return parse(Variant, given)
    except ConfigError as error:
        raise ConfigError(f"variant {number}: {error}") from None


def _points(axes: Mapping[str, list[Any] | dict[str, Any]]) -> list[tuple[list[str], list[Any]]]:
    """Every combination: its names, and its values in the axes' order."""
    named = [
        [(str(name), value) for name, value in values.items()]
        if isinstance(values, dict)
        else [(f"{key.rpartition('.')[2]}={_plain(value)}", value) for value in values]
        for key, values in axes.items()
    ]
    return [([n for n, _ in point], [v for _, v in point]) for point in itertools.product(*named)]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def _row_name(variant: Variant, names: list[str], *, alone: bool) -> str:
    return ", ".join(names if alone and names else [variant.name, *names])


def _run(
    config: SweepConfig,
    row: str,
    variant: Variant,
    shared: Mapping[str, Any],
    point: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> RunConfig:
    """The recipe of a row: the sweep's settings over the recipe's, the variant's and the axes' over those."""
    values = load_recipe(variant.recipe or str(config.recipe)).model_dump()
    for key, value in shared.items():
        _change(values, key, value, adds=False)
    for key, value in {**variant.set, **point}.items():
        _change(values, key, value, adds=True)
    if not variant.train:
        values |= {"transfer": None, "finetune": None}
    for key, value in asked.items():
        _change(values, key, value, adds=False)
    values["name"] = row
    try:
        run = parse(RunConfig, values)
    except ConfigError as error:
        raise ConfigError(f"sweep {config.name}, {row}: {error}") from None
    check_names(run)
    if run.hybrid is None:
        raise ConfigError(
            f"sweep {config.name}, {row}: expected a recipe with a hybrid, got one that stays softmax; it "
            "has no branches to audit."
        )
    return run


def _change(values: dict[str, Any], key: str, value: Any, *, adds: bool) -> None:
    """Set one setting in place; where it would add a stage or branch, only if ``adds``."""
    *parents, last = key.split(".")
    for depth, part in enumerate(parents, 1):
        if values.get(part) is None:
            if not adds and ".".join(parents[:depth]) in _ADDED:
                return
            values[part] = {}
        values = values[part]
    if not adds and key in _ADDED and values.get(last) is None:
        return
    values[last] = value


def _assignment(text: str) -> tuple[str, Any]:
    """`hybrid.window=8` -> its key and value."""
    key = ".".join(part.strip() for part in text.partition("=")[0].split("."))
    value: Any = parse_assignments([text])
    for part in key.split("."):
        value = value[part]
    check_setting(key)
    return key, value


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_]+", "-", name).strip("-.") or "row"


def _shipped() -> dict[str, dict[str, Any]]:
    files = [item for item in resources.files("equipoise.sweeps").iterdir() if item.name.endswith(".yaml")]
    return {
        item.name.removesuffix(".yaml"): load_yaml(item.read_text(encoding="utf-8"), source=item.name)
        for item in files
    }


def _resolve(name_or_file: str, beside: Path | None, seen: tuple[str, ...]) -> dict[str, Any]:
    values, place = _read(name_or_file, beside)
    mark = str(place or name_or_file)
    if mark in seen:
        raise ConfigError(f"sweeps derive from one another in a circle: {' -> '.join((*seen, mark))}.")
    parent = values.pop("extends", None)
    values.setdefault("name", place.stem if place is not None else name_or_file)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{name_or_file}: expected 'extends' to name a sweep, got {parent!r}.")
    inherited = _resolve(parent, None if place is None else place.parent, (*seen, mark))
    return merge({key: value for key, value in inherited.items() if key not in ("abstract", "name")}, values)


def _read(name_or_file: str, beside: Path | None) -> tuple[dict[str, Any], Path | None]:
    shipped = _shipped()
    if name_or_file in shipped:
        return shipped[name_or_file], None
    path = (beside or Path()) / name_or_file
    if path.suffix not in (".yaml", ".yml"):
        raise unknown_name("sweep", name_or_file, sweep_names())
    try:
        return load_yaml(path.read_text(encoding="utf-8"), source=str(path)), path.resolve()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the sweep: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected a YAML text file, got bytes that are not UTF-8.") from None
