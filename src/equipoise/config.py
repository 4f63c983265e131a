"""What can be set, and reading it from plain dictionaries and YAML. How settings behave: settings.py.

A recipe is a `RunConfig`. Every field's meaning stands under it and is what the command line shows.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, model_validator

from equipoise.hybrid_config import AllocationConfig, HybridConfig
from equipoise.safe_yaml import read_yaml
from equipoise.settings import ConfigError, Settings

SettingsT = TypeVar("SettingsT", bound="Settings")

NEXT_TOKEN = "next-token"
"""The usual objective of stage 2."""
LOSS = "loss"
"""What early stopping looks at unless told otherwise; needs no branches."""


class DataConfig(Settings):
    """Where text comes from and how it is packed."""

    source: str = "stdlib"
    """A Hub data set's name, a local text, JSONL or Parquet file, folder or pattern (`shards/*.parquet`), or
    stdlib (Python's own sources)."""
    subset: str | None = None
    """The Hub data set's configuration."""
    text_column: str | None = None
    """Column that holds the text; found by name (text, messages, prompt and completion) where null."""
    context_length: int = Field(default=1024, ge=8)
    """Tokens per packed row."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop reading after so many tokens."""
    separate_documents: bool = True
    """Whether documents packed into one row are kept apart: no attention or state crosses from one to the
    next, and positions begin again."""
    streaming: bool = False
    """Read, tokenise and pack while training instead of before it: memory and start do not depend on the size
    of the data. Needs max_tokens, or max_steps of each stage."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """Documents shuffled together where streaming; shards are shuffled whole."""


class WindowDropout(Settings):
    """Scheduled sliding-window dropout (SSD): some training samples run without their window branch."""

    probabilities: tuple[float, ...] = (0.9, 0.75, 0.5)
    """Probability of dropping, each for an equal share of the steps."""
    per: Literal["sample", "layer", "head"] = "sample"
    """What is dropped together."""
    reading: Literal["literal", "renormalised"] = "renormalised"
    """How the linear branch reads without its window: at weight 1, or at the weight it has in the hybrid."""

    @model_validator(mode="after")
    def _check(self) -> WindowDropout:
        if not self.probabilities or any(not 0 <= p <= 1 for p in self.probabilities):
            raise ValueError("probabilities must be one or more numbers between 0 and 1")
        return self


class EarlyStopping(Settings):
    """When stage 2 stops before its steps are up, and which of its weights are kept.

    Rows of the training data are set aside to look at; they are trained on in neither stage.
    """

    every: int = Field(default=20, ge=1)
    """Steps between two looks at the rows set aside."""
    watch: str = LOSS
    """What to look at: loss (over all rows set aside), or a watched value: linear_share, gap, nll…"""
    mode: Literal["best", "fall"] = "best"
    """best: stop after `patience` looks in a row that do not improve on the best one, and keep the best one's
    weights; fall: after `patience` in a row each worse than the one before; keeps those before the fall."""
    patience: int = Field(default=3, ge=1)
    """How many such looks in a row stop it."""
    min_improvement: float = Field(default=0.0, ge=0)
    """Smallest change that counts, in the unit of what is watched (loss: nats per token)."""


class RecallWatch(Settings):
    """Recall questions asked at every look; the texts they are hidden in are training data."""

    task: str = "multikey"
    """What to ask; a task of `equipoise recall`."""
    length: int = Field(default=512, ge=32)
    """Tokens of text, question and answer together."""
    examples: int = Field(default=16, ge=2)
    """Questions a look."""
    needles: int = Field(default=8, ge=2)
    """Statements in each text."""
    answer_words: int = Field(default=3, ge=1)
    """Words (tokens) of an answer."""
    wording: Literal["sentences", "pairs"] = "sentences"
    """Sentences, or bare key-value pairs for models that know nothing else."""


class Watch(Settings):
    """Looks at both branches while training: each alone (at weight 1), both, none, on a few held-out rows.

    Rows that early stopping sets aside are looked at where there are any, else rows of the held-out split. A
    look changes nothing: neither weights nor random numbers of a run depend on it.
    """

    every: int = Field(default=50, ge=1)
    """Steps between two looks; with early stopping, stage 2 looks as often as that says."""
    rows: int = Field(default=8, ge=1)
    """Rows to look at, always the same, spread over those there are."""
    literal: bool = False
    """Also score each branch with the other's term zeroed, at the weight it has in the hybrid."""
    recall: RecallWatch | None = None
    """Also ask recall questions, of both branches and of the linear branch alone; null for none."""


class Schedule(Settings):
    """What both stages share: how long, how fast, how much at a time."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training tokens."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimiser steps; overrides epochs."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(default=8, ge=1)
    """Rows an optimiser step sees."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows held in memory at once; batch_size where null."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls afterwards."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped at this norm (stage 1: layer by layer)."""
    save_every: int = Field(default=200, ge=1)
    """Steps between two training checkpoints, from which a killed run goes on."""

    @model_validator(mode="after")
    def _divides(self) -> Schedule:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}"
            )
        return self


def _check_objectives(objectives: dict[str, float]) -> None:
    if not objectives:
        raise ValueError("objectives must name at least one objective")
    if any(weight <= 0 for weight in objectives.values()):
        raise ValueError(f"the weights of objectives must be positive, got {objectives}")


class TransferConfig(Schedule):
    """Stage 1, attention transfer: maps (and gates) learn the frozen donor's attention, layer by layer."""

    objectives: dict[str, float] = Field(default_factory=lambda: {"weights": 1.0})
    """Transfer objectives and their weights in the sum: weights, output, hybrid-output, far-output (output,
    where windows are not enough)."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Peak learning rate of AdamW."""
    fit_scores: bool = False
    """Whether scores of the linear branch (mixing competing or calibrated) start where they share the donor's
    attention out best, measured on the first rows, instead of at hybrid.gate_value."""

    @model_validator(mode="after")
    def _some(self) -> TransferConfig:
        _check_objectives(self.objectives)
        return self


class FinetuneConfig(Schedule):
    """Stage 2, LoRA fine-tuning with the hybrid active."""

    objectives: dict[str, float] = Field(default_factory=lambda: {NEXT_TOKEN: 1.0})
    """Objectives and their weights in the sum: next-token, distillation (KL to the donor), far-distillation
    (the same where windows are not enough), far-reads (what linear branches read there), keys-apart (features
    of different keys they write), hidden-states (after each layer, the donor's)."""
    rank: int = Field(default=8, ge=1)
    """LoRA rank."""
    alpha: float = Field(default=16, gt=0)
    """LoRA alpha."""
    targets: tuple[str, ...] | None = None
    """Modules that get LoRA; the attention projections where null."""
    train_maps: bool = False
    """Whether feature maps and gates go on learning."""
    map_learning_rate: float | None = Field(default=None, gt=0)
    """Their learning rate; learning_rate where null."""
    gate_learning_rate: float | None = Field(default=None, gt=0)
    """That of gates which are weights (mixing convex, shared), not scores; that of maps where null. One that
    learns as fast as maps is shut, for good, before they can read."""
    window_dropout: WindowDropout | None = None
    """Scheduled sliding-window dropout; null for none."""
    window_sizes: tuple[int, ...] | None = None
    """Window sizes to train with, each for an equal share of the steps; the last must be the model's own."""
    early_stopping: EarlyStopping | None = None
    """Stop early; null for never. Saves each time it looks, whatever save_every says."""

    @model_validator(mode="after")
    def _sizes(self) -> FinetuneConfig:
        _check_objectives(self.objectives)
        if self.window_sizes is not None and any(size < 1 for size in self.window_sizes):
            raise ValueError(f"window_sizes must be at least 1 token each, got {list(self.window_sizes)}")
        return self


class RunConfig(Settings):
    """A recipe: what to convert to and how to train it."""

    name: str
    """What the recipe is called."""
    summary: str = ""
    """What it does, in a sentence."""
    reference: str = ""
    """Where it was published."""
    hybrid: HybridConfig | None = Field(default_factory=HybridConfig)
    """The converted layers; null leaves the donor's softmax attention."""
    allocation: AllocationConfig | None = None
    """Share the state between layers and heads by measurement; null gives all layers what `hybrid` says."""
    transfer: TransferConfig | None = None
    """Stage 1; null skips it."""
    finetune: FinetuneConfig | None = None
    """Stage 2; null skips it."""
    data: DataConfig = Field(default_factory=DataConfig)
    """What it trains on."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 autocast over float32 masters; auto: bfloat16 on a GPU that has it, float32 elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in stage 2: slower, less memory."""
    watch: Watch | None = None
    """Look at both branches while training; null for never."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the log goes beside run.json: TensorBoard files in the output's logs/, or Weights & Biases."""
    checkpoint: Literal["delta", "full"] = "delta"
    """What is saved: what conversion added, beside the donor's name; or all weights."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.transfer is not None and (self.hybrid is None or self.hybrid.feature_map is None):
            raise ValueError("transfer trains feature maps; it needs a hybrid with a linear branch")
        if self.allocation is not None and (self.hybrid is None or self.hybrid.feature_map is None):
            raise ValueError("allocation shares bytes between two branches; it needs a hybrid with both")
        if self.hybrid is None and self.watch is not None and self.watch.recall is not None:
            raise ValueError("watch.recall needs a hybrid")
        if self.data.streaming and self.data.max_tokens is None:
            for name, stage in (("transfer", self.transfer), ("finetune", self.finetune)):
                if stage is not None and stage.max_steps is None:
                    raise ValueError(
                        f"data.streaming reads without an end: set data.max_tokens, or {name}.max_steps"
                    )
        tuned = self.finetune
        if tuned is None:
            return self
        watched = tuned.early_stopping.watch if tuned.early_stopping is not None else LOSS
        if watched != LOSS and self.watch is None:
            raise ValueError(f"early_stopping looks at {watched}, which is watched only with watch: {{}}")
        window = self.hybrid.window if self.hybrid is not None else None
        two_branches = self.hybrid is not None and window is not None and self.hybrid.feature_map is not None
        if tuned.window_dropout is not None and not two_branches:
            raise ValueError("window_dropout needs a hybrid with both branches")
        if tuned.window_sizes is not None and window is None:
            raise ValueError("window_sizes needs a hybrid with a window")
        hybrid = self.hybrid
        own = self.allocation or (hybrid and (hybrid.per_layer or hybrid.head_windows))
        if tuned.window_sizes is not None and own:
            raise ValueError(
                "window_sizes gives all heads one window, and these layers or heads have their own"
            )
        if tuned.window_sizes is not None and tuned.window_sizes[-1:] != (window,):
            raise ValueError(f"window_sizes must end with the hybrid's window, {window}")
        return self


def parse(kind: type[SettingsT], values: object) -> SettingsT:
    """Make settings from a plain mapping.

    Raises:
        ConfigError: not a mapping, an unknown field, a wrong type or value.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"expected a mapping of settings for {kind.__name__}, got {type(values).__name__}.")
    return kind(**{str(key): value for key, value in values.items()})


WHOLE = frozenset({"objectives"})
"""Mappings that are one setting: who names some objectives means these and no others."""


class DottedKey(dict[str, Any]):
    """A mapping that stands for part of a key, as in ``finetune.objectives.far-reads``: it adds to others."""


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged; where both have a value the override's counts, null included.

    Of the mappings in `WHOLE` the override's takes the place of the other, unless it is a `DottedKey`.
    """
    merged = type(base)(base)
    for key, value in override.items():
        old = merged.get(key)
        adds = isinstance(value, DottedKey) or key not in WHOLE
        merged[key] = (
            merge(old, value) if adds and isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["finetune.rank=16"]`` -> ``{"finetune": {"rank": 16}}``; values are YAML.

    Raises:
        ConfigError: not of the form key=value, or not YAML.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"expected key=value, for instance finetune.rank=16, got {assignment!r}.")
        try:
            value = read_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{assignment!r}: the value is not YAML: {error}") from None
        branch: dict[str, Any] = {}
        leaf = branch
        *parents, last = parts
        for parent in parents:
            leaf = leaf.setdefault(parent, DottedKey())
        leaf[last] = value
        tree = merge(tree, branch)
    return tree


def load_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Read a mapping from YAML.

    Raises:
        ConfigError: not YAML, or not a mapping; names ``source``.
    """
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of settings, got {type(values).__name__}.")
    return values
