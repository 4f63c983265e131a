"""From lm-eval's task objects to what was asked for; they are taken as they come, nothing is imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.config import ConfigError
from equipoise.evaluate.entries import Aggregate, Entry, TaskFacts
from equipoise.evaluate.failures import HarnessError, first_line
from equipoise.evaluate.scores import key_of
from equipoise.registry import UnknownNameError, unknown_name


def load_one(manager: Any, name: str, include_path: Path | None) -> dict[str, Any]:
    """A name's tasks and groups, as lm-eval's manager loads them.

    Raises:
        UnknownNameError: no such task.
        HarnessError: data or a definition that cannot be read.
    """
    if name not in manager.task_index:
        raise UnknownNameError(_unknown(manager, name, include_path))
    try:
        return dict(manager.load([name]))
    except ConnectionError as error:
        raise HarnessError(
            f"task {name}: its data cannot be fetched from the Hub ({first_line(error)}). Run it once where "
            "there is a network: the data stays in the Hugging Face cache (HF_HOME), which can be copied; or "
            "give a local task with --include-path."
        ) from error
    except ImportError as error:  # says itself what to install
        raise HarnessError(f"task {name}: {first_line(error)}.") from error
    except Exception as error:
        raise HarnessError(
            f"task {name}: cannot be loaded: {type(error).__name__}: {first_line(error)}. Check the task's "
            "YAML and data; relative data_files start where the command runs, not beside the YAML."
        ) from error


def _unknown(manager: Any, name: str, include_path: Path | None) -> str:
    # the usual error, without the names of lm-eval's 14,000 tasks
    start = str(unknown_name("task", name, manager.all_tasks)).partition(" Known: ")[0]
    where = "Your own tasks' folder goes to --include-path."
    if include_path is not None:
        inside = include_path.resolve()
        paths = {known: entry.yaml_path for known, entry in manager.task_index.items()}
        own = [known for known, path in paths.items() if path and inside in Path(path).resolve().parents]
        where = f"Readable tasks in {include_path}: {', '.join(sorted(own)) or 'none'}."
    return f"{start} {where} `equipoise lm-eval ls tasks` lists lm-eval's."


def is_closed(manager: Any, name: str) -> bool:
    """Whether a name and its members, if any, are in the manager's index."""
    if name not in manager.task_index:
        return False
    members = (manager.task_index[name].cfg or {}).get("task")
    named = [member for member in members if isinstance(member, str)] if isinstance(members, list) else []
    return all(is_closed(manager, member) for member in named)


def entries_of(name: str, tasks: Sequence[str], groups: Mapping[str, Any]) -> list[Entry]:
    """The entry of a name; those of its members where it is a tag, or a group without a score of its own."""
    if name not in groups:
        return [Entry(name=task, tasks=(task,)) for task in tasks]
    group = groups[name]
    if not group.has_aggregation:
        return [entry for child in group.child_names for entry in entries_of(child, [child], groups)]
    aggregates = tuple(
        Aggregate(metric=each.metric, filters=tuple(each.filter_list or ()), by_size=each.weight_by_size)
        for each in group.aggregate_metric_list
    )
    return [
        Entry(name=name, tasks=tuple(task.task_name for task in group.get_all_tasks()), aggregates=aggregates)
    ]


def set_fewshot(tasks: Mapping[str, Any], common: int | None, own: Mapping[str, str]) -> None:
    """As lm-eval's simple_evaluate does: a task that fixes 0 keeps it, one that says nothing has 0.

    Args:
        tasks: by name.
        common: for all; None leaves it to each.
        own: by task, before `common`.

    Raises:
        ConfigError: not a whole number.
    """
    for name, task in tasks.items():
        given = own.get(name)
        if given is not None and not given.isdigit():
            raise ConfigError(f"--num-fewshot: expected whole numbers from 0 on, got {given!r} for {name}")
        wanted, default = common if given is None else int(given), task.get_config("num_fewshot")
        if wanted is not None and default != 0:
            task.set_config(key="num_fewshot", value=wanted)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)


def facts_of(name: str, task: Any, limit: int | None) -> TaskFacts:
    """Read a task's documents, and describe it.

    Raises:
        HarnessError: a task that cannot be run here, or has too few documents for intervals.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise HarnessError(
            f"task {name}: it runs code that the model writes. Run it through `equipoise lm-eval` with "
            "--confirm_run_unsafe_code, where that is safe."
        )
    if getattr(task, "MULTIMODAL", False):
        raise HarnessError(
            f"task {name}: it shows the model more than text, and these models read text alone."
        )
    digest, documents = hashlib.sha256(), 0
    for _, document in task.doc_iterator(limit=limit):
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
        documents += 1
    if documents < 2:
        raise HarnessError(
            f"task {name}: expected at least 2 documents (intervals resample them), got {documents}."
        )
    described = {key: value for key, value in task.dump_config().items() if key != "metadata"}
    source = (described.get("dataset_path"), described.get("dataset_name"))
    return TaskFacts(
        version=str(task.VERSION), output_type=str(task.OUTPUT_TYPE),
        num_fewshot=int(described.get("num_fewshot") or 0), documents=documents, of=len(task.eval_docs),
        definition=key_of(described), data=digest.hexdigest(), dataset=" ".join(str(p) for p in source if p),
    )  # fmt: skip
