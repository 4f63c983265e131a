"""Prompt states on disk: a document read once, as a safetensors file of constant size to go on from.

A state is sums over what one model computed, so the file carries the hashes of that model and of the tokens,
and loads nowhere else. The tokens themselves are in it too (four bytes each), for `generate` to see.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from equipoise.files import write_atomically
from equipoise.layers.cache import HybridCache, HybridCacheLayer
from equipoise.layers.mixer import AttentionMode
from equipoise.models.branches import converted_mixers
from equipoise.models.reading import PromptState, current_mode, model_digest, read_prompt, update_digest
from equipoise.ops import AttentionState, Branches
from equipoise.ops.types import TENSOR_NAMES

SUFFIX = ".safetensors"
FORMAT, VERSION = "equipoise prompt state", 1
_KEY = "equipoise"
"""Key of the description in the file's metadata, which holds strings only."""
_TOKENS = "tokens"


class StateError(RuntimeError):
    """A prompt state that cannot be used; the message says why, and what to do."""


class StateMode(BaseModel):
    """The branch state a prompt was read in."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["hybrid", "swa", "none"]
    window_branch: bool
    linear_branch: bool
    reading: Literal["literal", "renormalised"]
    window: int | None
    sinks: int

    @classmethod
    def of(cls, mode: AttentionMode) -> StateMode:
        """What a mode says.

        Raises:
            StateError: softmax attention keeps every key, and flags by row belong to one batch.
        """
        branches = mode.branches
        if mode.kind in ("softmax", "blend", "evicting") or mode.head_windows is not None:
            raise StateError(
                "softmax attention keeps the keys of every token, so there is no state of constant size to "
                "save. Read the prompt in a branch state of the hybrid: both, window, linear or sinks."
            )
        if not isinstance(branches.window, bool) or not isinstance(branches.linear, bool):
            raise StateError("a prompt read with branches switched by row or head cannot be saved.")
        return cls(
            kind=mode.kind, window_branch=branches.window, linear_branch=branches.linear,
            reading=branches.reading, window=mode.window, sinks=mode.sinks,
        )  # fmt: skip

    def mode(self) -> AttentionMode:
        """The mode to put a model in."""
        branches = Branches(self.window_branch, self.linear_branch, self.reading)
        return AttentionMode(self.kind, branches, self.window, self.sinks)

    def words(self) -> str:
        """The name a person knows it by."""
        if self.kind != "hybrid":
            return "none" if self.kind == "none" else f"window {self.window} with {self.sinks} sinks"
        if self.window_branch and self.linear_branch:
            return "both"
        return f"{'window' if self.window_branch else 'linear'} alone ({self.reading})"


class StateDescription(BaseModel):
    """The metadata of a state file."""

    model_config = ConfigDict(frozen=True)

    format: str
    version: int
    model_type: str
    model_name: str
    model_digest: str
    """SHA-256 of configuration and weights."""
    tokens: int
    """How many were read."""
    tokens_digest: str
    """SHA-256 of their ids."""
    state_digest: str
    """SHA-256 of the tensors, the tokens' aside."""
    state_bytes: int
    dtype: str
    """Of the model that read them."""
    mode: StateMode


def save_state(path: str | Path, state: PromptState, model: nn.Module) -> StateDescription:
    """Write a prompt's state, atomically.

    Args:
        path: a file, by custom ``*.safetensors``; its directory must exist.
        state: what `read_prompt` returned.
        model: the model that read it.

    Raises:
        StateError: a mode without a state of constant size.
    """
    converted_mixers(model)
    mode = StateMode.of(state.mode)
    tensors = _tensors(state.cache)
    tokens = state.tokens.to("cpu", torch.int32).contiguous()
    config: Any = model.config
    described = StateDescription(
        format=FORMAT, version=VERSION, model_type=str(config.model_type),
        model_name=str(config.name_or_path or ""), model_digest=model_digest(model),
        tokens=tokens.shape[1], tokens_digest=_digest({_TOKENS: tokens}), state_digest=_digest(tensors),
        state_bytes=sum(t.numel() * t.element_size() for t in tensors.values()), dtype=_dtype(model),
        mode=mode,
    )  # fmt: skip
    metadata = {_KEY: described.model_dump_json()}
    write_atomically(Path(path), lambda p: save_file({**tensors, _TOKENS: tokens}, p, metadata))
    return described


def describe_state(path: str | Path) -> StateDescription:
    """Read a state file's description, and nothing else of it.

    Raises:
        StateError: missing, cut off, not a prompt state, or of another version of the format.
    """
    if Path(path).is_dir():
        raise StateError(f"{path}: expected a prompt state's file, got a directory.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise StateError(f"{path}: expected a prompt state, found no file.") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise StateError(
            f"{path}: not a complete safetensors file ({error}); copy it again, or save the state again."
        ) from None
    if _KEY not in metadata:
        raise StateError(
            f"{path}: expected a prompt state made by `equipoise state save`, got another safetensors file."
        )
    try:
        found = _Header.model_validate_json(metadata[_KEY])
        if found.format == FORMAT and found.version != VERSION:
            raise StateError(
                f"{path}: expected version {VERSION} of the format, got {found.version}: the file was "
                "written by another version of equipoise. Save the state again with this one."
            )
        return StateDescription.model_validate_json(metadata[_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StateError(
            f"{path}: the description in its metadata is damaged ({where}: {first['msg']})."
        ) from None


class _Header(BaseModel):
    format: str
    version: int


def load_state(path: str | Path, model: nn.Module) -> PromptState:
    """Read a prompt's state to go on from; equal to the last bit to the cache that was saved.

    Args:
        path: the file.
        model: the model that read the prompt, in the same branch state (see ``describe_state(path).mode``).

    Raises:
        StateError: missing, damaged, of another format, model, dtype or branch state.
        ConversionError: the model is not converted.
    """
    converted_mixers(model)
    described = describe_state(path)
    _check_model(path, described, model)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    tokens = tensors.pop(_TOKENS, torch.zeros(1, 0, dtype=torch.int32))
    for what, digest, expected in (
        ("tokens", _digest({_TOKENS: tokens}), described.tokens_digest),
        ("state", _digest(tensors), described.state_digest),
    ):
        if digest != expected:
            raise StateError(
                f"{path}: its {what} are not those it was written with (SHA-256 {digest[:12]}…, expected "
                f"{expected[:12]}…): the file was changed or damaged. Copy it again, or save it again."
            )
    device = next(model.parameters()).device
    _check_shapes(path, described, model, tensors, tokens)
    cache = _fill(model, described, {name: tensor.to(device) for name, tensor in tensors.items()})
    return PromptState(cache, tokens.long().to(device), current_mode(model))


def _check_model(path: str | Path, described: StateDescription, model: nn.Module) -> None:
    config: Any = model.config
    again = "Use the model it was made with, or save the state again."
    if config.model_type != described.model_type:
        raise StateError(
            f"{path}: expected a model of type {described.model_type} ({described.model_name}), got "
            f"{config.model_type}. {again}"
        )
    if _dtype(model) != described.dtype:
        raise StateError(
            f"{path}: was read by the model in {described.dtype}, and this one is in {_dtype(model)}. Load "
            f"the model with dtype={described.dtype}, or save the state again."
        )
    mode = current_mode(model)
    if not described.mode.mode().same_as(mode):
        own = "softmax" if mode.kind == "softmax" else StateMode.of(mode).words()
        raise StateError(
            f"{path}: was read in branch state {described.mode.words()}, and the model is in {own}. Load "
            "and use it inside `with equipoise.branches(model, describe_state(path).mode.mode()):`."
        )
    if model_digest(model) != described.model_digest:
        raise StateError(
            f"{path}: was read by a {described.model_type} with other weights or settings "
            f"({described.model_name or 'no name'}, SHA-256 {described.model_digest[:12]}…). {again}"
        )


def _check_shapes(
    path: str | Path, described: StateDescription, model: Any, tensors: dict[str, Tensor], tokens: Tensor
) -> None:
    """Hold the tensors to those the model makes of one token: a digest tells damage, not who wrote it."""

    def refuse(what: str, expected: object, got: object) -> StateError:
        return StateError(
            f"{path}: expected {what} {expected} of this model, got {got}: the file was not written by "
            "`equipoise state save`. Save the state again."
        )

    def form(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    count, vocabulary = described.tokens, model.config.get_text_config(decoder=True).vocab_size
    if tokens.dtype != torch.int32 or list(tokens.shape) != [1, count] or count < 1:
        raise refuse("the tokens", f"int32 [1, {count}]", form(tokens))
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise refuse("tokens", f"0 to {vocabulary - 1}", f"{int(tokens.min())} to {int(tokens.max())}")
    made = read_prompt(model, torch.zeros(1, 1, dtype=torch.long, device=model.device)).cache
    own = _tensors(made)
    if own.keys() != tensors.keys():
        raise refuse("the tensors", sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys()))
    for name, one in own.items():
        layer: Any = made.layers[int(name.split(".")[1])]
        if not isinstance(layer, HybridCacheLayer):  # keys and values of every token, or of a donor's window
            limit = int(layer.sliding_window) - 1 if getattr(layer, "is_sliding", False) else count
            one = one.expand(-1, -1, min(count, limit), -1)
        if form(one) != form(tensors[name]):
            raise refuse(name, form(one), form(tensors[name]))


def _dtype(model: nn.Module) -> str:
    kind: Any = model.dtype
    return str(kind).removeprefix("torch.")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        update_digest(digest, name, tensor)
    return digest.hexdigest()


# ---- a cache as named tensors


def _tensors(cache: HybridCache) -> dict[str, Tensor]:
    """Everything the cache holds, by layer and name, on the CPU and without the memory of views."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, HybridCacheLayer):
            held = {name: value for name, value in vars(layer).items() if name in TENSOR_NAMES}
        else:  # settled: slots of waiting tokens may hold anything
            held = {} if layer.state is None else _named(layer.state.settled())
        for name, tensor in held.items():
            if tensor is not None:
                found[f"layers.{index}.{name}"] = tensor.detach().cpu().clone().contiguous()
    return found


def _named(state: AttentionState) -> dict[str, Tensor | None]:
    """A state's tensors by name; those of heads with other windows as others.0.keys and so on."""
    named = {name: getattr(state, name) for name in TENSOR_NAMES}
    for place, other in enumerate(state.others):
        named |= {f"others.{place}.{name}": tensor for name, tensor in _named(other).items()}
    return named


def _state(tensors: dict[str, Tensor]) -> AttentionState:
    """The other way."""
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in own:
            place, _, rest = name.removeprefix("others.").partition(".")
            parts.setdefault(int(place), {})[rest] = tensor
    known: dict[str, Any] = {**own, "others": tuple(_state(parts[place]) for place in sorted(parts))}
    return AttentionState(**known)


def _fill(model: Any, described: StateDescription, tensors: dict[str, Tensor]) -> HybridCache:
    """A fresh cache with the tensors in it, as if the model had just read the tokens."""
    cache: HybridCache = model.make_cache()
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}."
        held = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        one: Any = layer
        if isinstance(layer, HybridCacheLayer):
            one.state = _state(held) if held else None
            one.length = described.tokens
            one.dtype = held["keys"].dtype if held else model.dtype
            one.device = model.device
            one.is_initialized = True
            continue
        one.lazy_initialization(held["keys"], held["values"])
        one.keys, one.values = held["keys"], held["values"]
        if hasattr(one, "cumulative_length"):
            one.cumulative_length = described.tokens
    return cache
