"""Recipes by name or file: YAML that derives from one another, checked as a whole before anything runs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from equipoise.config import ConfigError, RunConfig, load_yaml, merge, parse
from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.ops import MIXING_RULES
from equipoise.registry import unknown_name
from equipoise.train.losses import FINETUNE_OBJECTIVES, WINDOWED_DONOR
from equipoise.train.objectives import FAR_OBJECTIVES, OBJECTIVES


def recipe_names() -> list[str]:
    """The recipes that ship, without those that only others derive from."""
    return sorted(name for name, values in _shipped().items() if not values.get("abstract"))


def load_recipe(name_or_file: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A recipe, its ancestors' settings under its own and the overrides on top.

    A file's ``extends`` names a shipped recipe, or another file relative to it.

    Raises:
        UnknownNameError: no such recipe, feature map, mixing rule or objective.
        ConfigError: a file that is not a recipe or is abstract, a setting that does not exist or does not
            fit, or recipes that derive from one another in a circle.
    """
    values = _resolve(name_or_file, None, ())
    if values.pop("abstract", False):
        raise ConfigError(
            f"{name_or_file} is not a recipe itself (abstract): others derive from it. "
            f"Choose one of {', '.join(recipe_names())}, or write a file that extends it."
        )
    run = parse(RunConfig, merge(values, overrides or {}))
    check_names(run)
    return run


def check_names(run: RunConfig) -> None:
    """Look up every registered name the recipe uses, before any work is done.

    Raises:
        UnknownNameError: one of them does not exist.
        ConfigError: one needs what the hybrid does not have.
    """
    if run.hybrid is not None:
        MIXING_RULES[run.hybrid.mixing]
        if run.hybrid.feature_map is not None:
            FEATURE_MAPS[run.hybrid.feature_map]
    if run.transfer is not None:
        for name in run.transfer.objectives:
            OBJECTIVES[name]
        far = ", ".join(FAR_OBJECTIVES & run.transfer.objectives.keys())
        if far and (run.hybrid is None or run.hybrid.window is None):
            raise ConfigError(
                f"transfer.objectives: {far} compares the donor with its windows alone, and this hybrid has "
                "none. Set hybrid.window, or take output."
            )
    if run.finetune is not None:
        reading = [name for name in run.finetune.objectives if FINETUNE_OBJECTIVES[name].reads]
        if reading and (run.hybrid is None or run.hybrid.feature_map is None):
            raise ConfigError(
                f"finetune.objectives: {', '.join(reading)} looks at what linear branches read, and this "
                "hybrid has none. Set hybrid.feature_map, or take far-distillation."
            )
        if reading and not run.finetune.train_maps:
            raise ConfigError(
                f"finetune.objectives: {', '.join(reading)} teaches feature maps and nothing else, and "
                "finetune.train_maps is false. Set it to true, or leave the objective out."
            )
        if reading and run.hybrid is not None and run.hybrid.window is None:
            raise ConfigError(
                f"finetune.objectives: {', '.join(reading)} looks at linear branches beside a window, and "
                "this hybrid has none. Set hybrid.window, or take distillation."
            )
        apart = [name for name in reading if FINETUNE_OBJECTIVES[name].keys]
        if apart and run.hybrid is not None and run.hybrid.rotary == "kept":
            raise ConfigError(
                f"finetune.objectives: {', '.join(apart)} has to know a key that comes again, and with "
                "hybrid.rotary kept it is another one at every position. Set hybrid.rotary to undone, or "
                "name the other objectives without it."
            )
        needed = {need for name in run.finetune.objectives for need in FINETUNE_OBJECTIVES[name].needs}
        if WINDOWED_DONOR in needed and (run.hybrid is None or run.hybrid.window is None):
            raise ConfigError(
                f"finetune.objectives: {', '.join(run.finetune.objectives)} compare the donor with its "
                "windows alone, and this hybrid has none. Set hybrid.window, or take distillation."
            )


def _shipped() -> dict[str, dict[str, Any]]:
    folder = resources.files("equipoise.recipes")
    files = [item for item in folder.iterdir() if item.name.endswith(".yaml")]
    return {
        item.name.removesuffix(".yaml"): load_yaml(item.read_text(encoding="utf-8"), source=item.name)
        for item in files
    }


def _resolve(name_or_file: str, beside: Path | None, seen: tuple[str, ...]) -> dict[str, Any]:
    values, place = _read(name_or_file, beside)
    mark = str(place or name_or_file)
    if mark in seen:
        raise ConfigError(f"recipes derive from one another in a circle: {' -> '.join((*seen, mark))}.")
    parent = values.pop("extends", None)
    values.setdefault("name", place.stem if place is not None else name_or_file)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{name_or_file}: expected 'extends' to name a recipe, got {parent!r}.")
    inherited = _resolve(parent, None if place is None else place.parent, (*seen, mark))
    for own in ("abstract", "name"):  # these say what a recipe is, not what it does
        inherited.pop(own, None)
    return merge(inherited, values)


def _read(name_or_file: str, beside: Path | None) -> tuple[dict[str, Any], Path | None]:
    shipped = _shipped()
    if name_or_file in shipped:
        return shipped[name_or_file], None
    path = (beside or Path()) / name_or_file
    if path.suffix not in (".yaml", ".yml"):
        raise unknown_name("recipe", name_or_file, recipe_names())
    try:
        return load_yaml(path.read_text(encoding="utf-8"), source=str(path)), path.resolve()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected a YAML text file, got bytes that are not UTF-8.") from None
    except ConfigError:
        raise
    except ValueError as error:  # a zero byte in the name
        raise ConfigError(f"{str(path)!r}: cannot read the recipe: {error}.") from None
