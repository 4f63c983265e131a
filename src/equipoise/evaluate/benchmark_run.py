"""An evaluation from a model's name to results: each state is run once, kept, and not run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from equipoise.distributed import leader_does, ranks
from equipoise.evaluate.benchmark_page import BenchmarkRun, to_data, to_page
from equipoise.evaluate.benchmarks import benchmark_table
from equipoise.evaluate.harness import VERSION, Benchmarks, EquipoiseLM, score_state
from equipoise.evaluate.scores import (
    FORMAT,
    StateScores,
    key_of,
    model_fingerprint,
    score_file,
    store,
    stored,
)
from equipoise.evaluate.states import BranchState
from equipoise.pages import write_results
from equipoise.pages.writing import installed_version

NAME = "evaluate"
"""Of the result files."""

Watch = Callable[[BranchState, int, int], None]
"""Called with the state, the requests answered so far in it, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        model: directory or name on the Hub.
        states: in order.
        benchmarks: loaded tasks.
        output: where results go, and the scores of finished states.
        batch_size: requests at a time.
    """

    model: str
    states: tuple[BranchState, ...]
    benchmarks: Benchmarks
    output: Path
    batch_size: int

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What scores depend on, beside the state."""
        cuda = torch.cuda.is_available()
        return {
            "format": FORMAT,
            "model": model_fingerprint(self.model),
            "tasks": {name: asdict(facts) for name, facts in self.benchmarks.facts.items()},
            "limit": self.benchmarks.limit,
            "chat_template": self.benchmarks.chat_template,
            "seeds": asdict(self.benchmarks.seeds),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "lm_eval": VERSION,
            "transformers": transformers.__version__,
            "equipoise": installed_version(),
        }


def finished(plan: Plan) -> dict[str, StateScores]:
    """Scores of the states that were run before with the same model, tasks and settings.

    Raises:
        ScoresError: a file of scores that cannot be read.
    """
    keys = _keys(plan)
    found = {state.name: _recalled(plan, state, keys[state.name]) for state in plan.states}
    return {name: scores for name, scores in found.items() if scores is not None}


def run_states(
    plan: Plan,
    known: Mapping[str, StateScores],
    *,
    watch: Watch,
    done: Callable[[BranchState, StateScores], None],
) -> dict[str, StateScores]:
    """Run the states that are not known yet on one loaded model, and keep each when it is finished.

    Args:
        plan: what to run.
        known: from `finished`.
        watch: told of progress.
        done: called after each state.

    Returns:
        The scores of all states, in the plan's order; the same on every rank.

    Raises:
        CheckpointError: the model cannot be loaded.
        HarnessError: a task that cannot be run or scored.
    """
    missing = [state for state in plan.states if state.name not in known]
    scores, keys, settings = dict(known), _keys(plan), plan.settings
    if missing:  # a report of finished states needs no model
        lm = EquipoiseLM(plan.model, branch=missing[0].name, batch_size=plan.batch_size)
        for state in missing:
            key = keys[state.name]
            fresh = score_state(lm, state, plan.benchmarks, watch=partial(watch, state))
            leader_does(partial(store, score_file(plan.output, state.name, key), key, settings, fresh))
            scores[state.name] = fresh
            done(state, fresh)
    return {state.name: scores[state.name] for state in plan.states}


def write_run(
    plan: Plan,
    scores: Mapping[str, StateScores],
    *,
    metrics: Mapping[str, str],
    resamples: int,
    seed: int,
) -> tuple[BenchmarkRun, dict[str, Path]]:
    """Make the table, and write `evaluate.json`, `.md` and `.html`.

    Args:
        plan: what was run.
        scores: by state.
        metrics: of tasks, where not the usual one.
        resamples, seed: of the bootstrap.

    Raises:
        UnknownNameError: a metric that a task does not have.
        HarnessError: states that did not see the same prompts.
    """
    table = benchmark_table(plan.benchmarks.entries, scores, metrics=metrics, resamples=resamples, seed=seed)
    settings = {key: value for key, value in plan.settings.items() if key not in ("tasks", "model", "format")}
    files = {name: score_file(Path(), name, key).as_posix() for name, key in _keys(plan).items()}
    settings |= {
        "model_fingerprint": model_fingerprint(plan.model), "batch_size": plan.batch_size,
        "resamples": resamples, "bootstrap_seed": seed, "score_files": files,
    }  # fmt: skip
    run = BenchmarkRun(
        model=plan.model, states=plan.states, scores=scores, facts=plan.benchmarks.facts, table=table,
        settings=settings,
    )  # fmt: skip
    if not ranks().is_leader:
        return run, {}
    return run, write_results(plan.output, NAME, to_page(run), to_data(run))


def _keys(plan: Plan) -> dict[str, str]:
    settings = plan.settings
    return {
        state.name: key_of({**settings, "state": state.state, "reading": state.reading})
        for state in plan.states
    }


def _recalled(plan: Plan, state: BranchState, key: str) -> StateScores | None:
    return stored(score_file(plan.output, state.name, key), key)
