"""lm-eval (EleutherAI's lm-evaluation-harness) on converted models; the one file that imports it.

`EquipoiseLM` is lm-eval's own Hugging Face model, run in one branch state. Prompts, requests, answers and
metrics are lm-eval's; what is kept here is the score of each document.
"""

from __future__ import annotations

import logging
import math
import random
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from equipoise.config import ConfigError
from equipoise.distributed import ranks
from equipoise.evaluate.batches import in_batches, prompt_batches, token_batches
from equipoise.evaluate.entries import Entry, TaskFacts, for_each_task
from equipoise.evaluate.failures import HarnessError, first_line
from equipoise.evaluate.harness_tasks import entries_of, facts_of, is_closed, load_one, set_fewshot
from equipoise.evaluate.notes import Notes
from equipoise.evaluate.samples import task_scores
from equipoise.evaluate.scores import StateScores
from equipoise.evaluate.states import DONOR, BranchState, branch_state
from equipoise.layers.interface import mixers_of
from equipoise.models.branches import branches
from equipoise.models.load import load_model, load_tokenizer
from equipoise.ops.types import Reading
from equipoise.registry import unknown_name

VERSION = metadata.version("lm_eval")
MODEL_ARGUMENTS = (
    "max_length", "max_batch_size", "truncation", "logits_cache", "add_bos_token", "prefix_token_id",
    "softmax_dtype", "mixed_precision_dtype", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
"""Settings of lm-eval's Hugging Face model that make sense for one that is loaded already."""

Watch = Callable[[int, int], None]
"""Called with the requests answered so far, and how many there are."""


# ---- the model


_HFLM: Any = HFLM  # lm-eval's decorator hides the class from type checkers


class EquipoiseLM(_HFLM):
    """lm-eval's Hugging Face model in one branch state: `--model equipoise` in lm-eval's command line.

    Attributes:
        watch: told of progress; None leaves it to lm-eval's own bars.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        branch: str | None = None,
        reading: Reading = "literal",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        **settings: Any,
    ) -> None:
        """Load the model, unless it is one.

        Args:
            pretrained: a directory, a name on the Hub, or the model itself.
            branch: a name of `equipoise.evaluate.states.NAMES`; by default both branches, or softmax for a
                model that is not converted.
            reading: of `window` and `linear`.
            tokenizer: where it does not lie beside the model.
            device: by default CUDA where there is any.
            batch_size: as in lm-eval.
            settings: of `MODEL_ARGUMENTS`.

        Raises:
            UnknownNameError: no such setting or branch state.
            ConfigError: a branch state of a model that is not converted.
            CheckpointError: the model or its tokenizer cannot be loaded.
        """
        known = (*MODEL_ARGUMENTS, "pretrained", "branch", "reading", "tokenizer")
        for name, value in settings.items():
            if name not in known and value is not None:
                raise unknown_name("argument of model type 'equipoise'", name, known)
        state = None if branch is None else branch_state(branch, reading)
        model = load_model(pretrained, device=_device(device)) if isinstance(pretrained, str) else pretrained
        source = tokenizer or (pretrained if isinstance(pretrained, str) else model.name_or_path)
        given = load_tokenizer(source) if isinstance(source, str) else source
        with _only_errors():  # it warns that the model is loaded already, which is how it is meant here
            super().__init__(pretrained=model, tokenizer=given, batch_size=batch_size, **settings)
        self._converted = bool(mixers_of(model))
        self.state = state or branch_state("both" if self._converted else DONOR)
        self.watch: Watch | None = None
        self._answered, self._asked = 0, 0
        self.set_cache_hook(_Counter(self))

    @property
    def state(self) -> BranchState:
        """The branch state it answers in; may be set between evaluations."""
        return self._state

    @state.setter
    def state(self, state: BranchState) -> None:
        if not self._converted and state.state != DONOR:
            raise ConfigError(
                f"branch state {state.name}: this {self.model.config.model_type} is not converted and has no "
                f"branches to switch; leave the branch out, or say {DONOR}."
            )
        self._state, self._answered, self._asked = state, 0, 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's.

        Raises:
            HarnessError: a likelihood that is not a number; argmax would quietly make it an answer.
        """
        answers = super().loglikelihood(requests, disable_tqdm=self._expect(requests) or disable_tqdm)
        broken = sum(math.isnan(likelihood) for likelihood, _ in answers)
        if broken:
            raise HarnessError(
                f"branch state {self.state.name}: {broken} of {len(answers)} log-likelihoods are not "
                "numbers. The model diverges in that state: evaluate in float32, or leave the state out."
            )
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's."""
        return super().loglikelihood_rolling(requests, disable_tqdm=self._expect(requests) or disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **settings: Any) -> list[Any]:
        run = super()._loglikelihood_tokens
        if ranks().count == 1 or not isinstance(self.batch_size, int):
            return run(requests, *args, **settings)
        return in_batches(requests, run, token_batches(requests, self.batch_size, reuse=self.logits_cache))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's."""
        run, quietly = super().generate_until, self._expect(requests) or disable_tqdm
        if ranks().count == 1 or not isinstance(self.batch_size, int):
            return run(requests, disable_tqdm=quietly)
        batches = prompt_batches([request.args for request in requests], self.batch_size, self.tok_encode)
        return in_batches(requests, partial(run, disable_tqdm=True), batches)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        with self._in_state():
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        with self._in_state():  # generation makes its cache inside, so that it belongs to the state
            return super()._model_generate(context, max_length, stop, **settings)

    def _in_state(self) -> AbstractContextManager[None]:
        if not self._converted:
            return nullcontext()
        return branches(self.model, self.state.state, reading=self.state.reading)

    def _expect(self, requests: Sequence[Any]) -> bool:
        """Count requests; whether somebody watches, so that lm-eval's bars are not needed."""
        self._asked += len(requests)
        return self.watch is not None

    def count_answer(self) -> None:
        """Count an answer, and tell who watches."""
        self._answered = min(
            self._asked, self._answered + ranks().count
        )  # the others answer as many meanwhile
        if self.watch is not None:
            self.watch(self._answered, self._asked)


register_model("equipoise")(EquipoiseLM)


class _Counter(CacheHook):
    """Sits where lm-eval's cache of answers would, and is told of each."""

    def __init__(self, lm: EquipoiseLM) -> None:
        super().__init__(None)
        self._lm = lm

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        self._lm.count_answer()


def _device(wanted: str | None) -> str | None:
    """lm-eval's command line asks for cuda:0 where nothing is said; without one, that is no wish."""
    return (
        None if wanted is not None and wanted.startswith("cuda") and not torch.cuda.is_available() else wanted
    )


# ---- tasks


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Of Python, numpy, torch and the choice of few-shot examples; by default lm-eval's own."""

    python: int = DEFAULT_RANDOM_SEED
    numpy: int = DEFAULT_OTHER_SEED
    torch: int = DEFAULT_OTHER_SEED
    fewshot: int = DEFAULT_OTHER_SEED

    @classmethod
    def of(cls, seed: int | None) -> Seeds:
        """One seed for everything, or the defaults."""
        return cls() if seed is None else cls(python=seed, numpy=seed, torch=seed, fewshot=seed)

    def apply(self) -> None:
        """Seed the generators."""
        random.seed(self.python)
        np.random.seed(self.numpy)
        torch.manual_seed(self.torch)


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Loaded tasks.

    Attributes:
        tasks, groups: lm-eval's own, by name.
        entries: what was asked for.
        facts: by task.
        limit: documents of each task at most.
        chat_template: whether prompts go through the tokenizer's chat template.
        seeds: of prompts and answers.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    entries: tuple[Entry, ...]
    facts: Mapping[str, TaskFacts]
    limit: int | None
    chat_template: bool
    seeds: Seeds


def load_benchmarks(
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    fewshot_of: Mapping[str, str] | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    seeds: Seeds | None = None,
    details: Mapping[str, Any] | None = None,
) -> Benchmarks:
    """Find tasks by name and read their data.

    Args:
        names: tasks, groups or tags.
        include_path: a folder of task YAML, searched first.
        num_fewshot: examples in a prompt; None leaves it to each task.
        fewshot_of: the same for tasks or entries by name, as digits.
        limit, chat_template, seeds: see `Benchmarks`.
        details: for tasks that make their data: RULER wants `tokenizer` and `max_seq_lengths`.

    Raises:
        UnknownNameError: no such task.
        ConfigError: a task asked for twice, or a few-shot setting that is none.
        HarnessError: data that cannot be read, or tasks that cannot be run here.
    """
    seeds = seeds or Seeds()
    seeds.apply()  # some tasks draw their data
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    entries: list[Entry] = []
    asked_in: dict[str, str] = {}
    with quiet():
        manager = _manager(names, include_path, dict(details or {}))
        for name in dict.fromkeys(names):
            found = load_one(manager, name, include_path)
            for task in found["tasks"]:
                if task in asked_in:
                    both = f"{asked_in[task]} and in {name}"
                    raise ConfigError(f"task {task} is asked for twice, in {both}: leave one of them out.")
                asked_in[task] = name
            tasks.update(found["tasks"])
            groups.update(found.get("groups") or {})
            entries += entries_of(name, list(found["tasks"]), found.get("groups") or {})
    set_fewshot(tasks, num_fewshot, for_each_task(entries, fewshot_of or {}, "--num-fewshot"))
    return Benchmarks(
        tasks=tasks, groups=groups, entries=tuple(entries), limit=limit, chat_template=chat_template,
        facts={name: facts_of(name, task, limit) for name, task in tasks.items()}, seeds=seeds,
    )  # fmt: skip


def _manager(names: Sequence[str], include_path: Path | None, details: dict[str, Any]) -> TaskManager:
    """lm-eval's index of tasks; its own 14,000 are read only where the folder does not hold all names."""
    if include_path is None:
        return TaskManager(metadata=details)
    own = TaskManager(include_path=str(include_path), include_defaults=False, metadata=details)
    if all(is_closed(own, name) for name in names):
        return own
    return TaskManager(include_path=str(include_path), metadata=details)


# ---- scores


def score_state(lm: EquipoiseLM, state: BranchState, benchmarks: Benchmarks, *, watch: Watch) -> StateScores:
    """Run all tasks in one branch state.

    Raises:
        HarnessError: answers that are not numbers, a task without a score by document, or lm-eval's refusal.
    """
    started = time.monotonic()
    lm.state, lm.watch = state, watch
    benchmarks.seeds.apply()
    for task in benchmarks.tasks.values():
        task.set_fewshot_seed(seed=benchmarks.seeds.fewshot)
    loaded: Any = {"tasks": benchmarks.tasks, "groups": benchmarks.groups}
    try:
        with quiet() as notes:
            results: Any = evaluate(
                lm=lm, task_dict=loaded, limit=benchmarks.limit,
                bootstrap_iters=0, log_samples=True, apply_chat_template=benchmarks.chat_template,
                fewshot_as_multiturn=benchmarks.chat_template,
            )  # fmt: skip
    except (AssertionError, ImportError) as error:  # how lm-eval words settings and packages that it misses
        raise HarnessError(f"branch state {state.name}: lm-eval stopped: {first_line(error)}.") from error
    samples, reported, better = results["samples"], results["results"], results["higher_is_better"]
    tasks = {
        name: task_scores(task, samples[name], reported[name], better[name])
        for name, task in benchmarks.tasks.items()
    }
    return StateScores(tasks=tasks, seconds=time.monotonic() - started, notes=notes.texts)


# ---- lm-eval's own manners


@contextmanager
def quiet() -> Generator[Notes]:
    """Collect lm-eval's warnings, and stop the bars it draws while it builds prompts, in the block."""
    logger, notes = logging.getLogger("lm_eval"), Notes()
    logger.addHandler(notes)
    with _set(logger, "propagate", False), _set(lm_eval.api.task, "tqdm", _no_bar):
        try:
            yield notes
        finally:
            logger.removeHandler(notes)


def _no_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


@contextmanager
def _only_errors() -> Generator[None]:
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Generator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def command_line(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with model type `equipoise` known to it."""
    with _set(sys, "argv", ["lm-eval", *arguments]):
        cli_evaluate()
