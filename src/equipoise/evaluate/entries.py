"""What was asked for: tasks, and groups that count as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from equipoise.config import ConfigError
from equipoise.registry import unknown_name


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """How a group's score comes from its tasks'.

    Attributes:
        metric: lm-eval's name.
        filters: whose answers count; none for any.
        by_size: whether tasks weigh by their documents rather than equally.
    """

    metric: str
    filters: tuple[str, ...] = ()
    by_size: bool = True


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A task, or a group with a score of its own; each counts once in an average.

    Attributes:
        name: as in `--tasks`; of tags, and of groups without a score, the members are entries.
        tasks: the tasks below it; for a task, itself.
        aggregates: of a group; none for a task.
    """

    name: str
    tasks: tuple[str, ...]
    aggregates: tuple[Aggregate, ...] = ()

    @property
    def is_group(self) -> bool:
        """Whether its score is made of several tasks'."""
        return bool(self.aggregates)


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What lm-eval says of a task.

    Attributes:
        version: of the task's definition.
        output_type: `multiple_choice`, `generate_until`, …
        num_fewshot: examples in each prompt.
        documents, of: how many are scored, and how many there are.
        definition, data: hashes of the task's configuration and of the documents scored.
        dataset: where they come from.
    """

    version: str
    output_type: str
    num_fewshot: int
    documents: int
    of: int
    definition: str
    data: str
    dataset: str


def per_task(value: str, option: str) -> tuple[str | None, dict[str, str]]:
    """`5,mmlu=0` -> ("5", {"mmlu": "0"}).

    Raises:
        ConfigError: two values for all tasks, or an empty part.
    """
    parts = [part.strip() for part in value.split(",")]
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    common = [part for part in parts if "=" not in part]
    if len(common) > 1 or not all(common) or not all(k and v for k, v in named.items()):
        raise ConfigError(f"{option}: expected a value, or TASK=VALUE,…, got {value!r}")
    return (common[0] if common else None), named


def for_each_task(entries: Sequence[Entry], named: Mapping[str, str], option: str) -> dict[str, str]:
    """Values by task, of values by task or entry; a task's own goes before its group's.

    Raises:
        UnknownNameError: a name that is neither.
    """
    below = {entry.name: entry.tasks for entry in entries}
    tasks = {task for entry in entries for task in entry.tasks}
    for name in named:
        if name not in below and name not in tasks:
            raise unknown_name(f"task in {option}", name, {*below, *tasks})
    spread = {task: value for name, value in named.items() for task in below.get(name, ())}
    return {**spread, **{name: value for name, value in named.items() if name in tasks}}
