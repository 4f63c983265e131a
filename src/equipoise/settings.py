"""How settings behave: frozen, checked when made, one line a mistake. Which there are: config.py."""

from __future__ import annotations

import types
from contextvars import ContextVar
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from equipoise.registry import unknown_name

_inside: ContextVar[bool] = ContextVar("inside other settings", default=False)


class ConfigError(ValueError):
    """Settings that cannot be used; the message says which, what was expected and what came."""


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def __init__(self, **values: Any) -> None:
        if _inside.get():  # the outermost settings know the whole path, and speak for all
            super().__init__(**values)
            return
        token = _inside.set(True)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None
        finally:
            _inside.reset(token)


def _explain(owner: type[BaseModel], error: ValidationError) -> str:
    """One line a mistake, with the nearest known field where the name is wrong."""
    problems: dict[str, list[str]] = {}
    received: dict[str, str] = {}
    for item in error.errors():
        kind, value = item["type"], item.get("input")
        path, fields = _field_path(owner, item["loc"])
        where = ".".join(path) or owner.__name__
        if kind == "extra_forbidden":
            problem = str(unknown_name("setting", path[-1], fields)).removesuffix(".")
        else:
            problem = item["msg"].removeprefix("Value error, ").removesuffix(".")
            if kind != "missing" and not (kind == "value_error" and isinstance(value, dict)):
                received[where] = f"; got {_shown(value)}"
        problems.setdefault(where, []).append(problem)
    return "\n".join(
        f"{where}: {', or '.join(told)}{received.get(where, '')}." for where, told in problems.items()
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}…"


def _field_path(owner: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The settings a pydantic location goes through, and the fields that the last of them knows.

    Of several alternatives pydantic adds which one it tried; that is left out.
    """
    path: list[str] = []
    fields = owner.model_fields
    for depth, part in enumerate(location):
        path.append(str(part))
        kinds = _alternatives(fields[str(part)].annotation) if part in fields else ()
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            if len(kinds) == 1 and get_origin(kinds[0]) in (dict, tuple):
                path += [str(rest) for rest in location[depth + 1 :]]
            break
        fields = inner[0].model_fields
    return path, list(fields)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types a field may have, null aside."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    return tuple(kind for kind in get_args(annotation) if kind is not type(None))
