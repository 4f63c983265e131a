"""A donor without its weights: a skeleton on the meta device, and its tensors read from the shards as needed.

How names and tensors on disk differ from the model's (renamed heads, fused experts) is transformers' own
business: the loader that `from_pretrained` ends in is handed one module's share of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file
from transformers.utils.logging import is_progress_bar_enabled

from equipoise.models.families import check_family
from equipoise.models.layout import DROPOUTS
from equipoise.models.load import load_config
from equipoise.models.storage import CheckpointError, load_generation_config

ROWS_AT_ONCE = 4096
"""Rows of an embedding matrix read at a time, to pick from."""


class ShardedWeights:
    """The safetensors files of a model, by the names of its tensors there.

    Args:
        name_or_path: local directory, or name on the Hub; shards that are not in its cache are fetched when
            they are first read.

    Raises:
        CheckpointError: no safetensors weights there, or an index that cannot be read.
    """

    def __init__(self, name_or_path: str) -> None:
        self.name_or_path = name_or_path
        index = self._find(SAFE_WEIGHTS_INDEX_NAME)
        single = self._find(SAFE_WEIGHTS_NAME)
        self.files: dict[str, str] = {}
        """File of each tensor."""
        if single is not None:  # transformers' own order: an index beside a single file is not read
            with self._open(SAFE_WEIGHTS_NAME, "the model") as file:
                self.files = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        elif index is not None:
            self.files = _weight_map(index)
        else:
            raise CheckpointError(f"{name_or_path}: expected weights (*.safetensors), found none.")

    def shards(self) -> list[str]:
        """Names of the files, sorted."""
        return sorted(set(self.files.values()))

    def path(self, shard: str, wanted: str) -> Path:
        """Where a shard lies.

        Raises:
            CheckpointError: it is missing; says for what it is ``wanted``.
        """
        found = self._find(shard)
        if found is None:
            raise CheckpointError(
                f"{self.name_or_path}: expected {shard}, which holds weights of {wanted}, found none. Copy "
                "or download the donor again."
            )
        return found

    @contextmanager
    def opened(self, keys: Iterable[str], wanted: str) -> Generator[dict[str, Any]]:
        """Slices of tensors by name; read, and valid, inside the block only.

        Raises:
            CheckpointError: a shard is missing, cut off or damaged, or lacks a tensor.
        """
        with ExitStack() as stack:
            open_files: dict[str, Any] = {}
            slices: dict[str, Any] = {}
            for key in keys:
                shard = self.files[key]
                if shard not in open_files:
                    open_files[shard] = stack.enter_context(self._open(shard, wanted))
                try:
                    slices[key] = open_files[shard].get_slice(key)
                except SafetensorError as error:
                    raise self._damaged(shard, wanted, error) from None
            yield slices

    @contextmanager
    def _open(self, shard: str, wanted: str) -> Generator[Any]:
        path = self.path(shard, wanted)
        try:
            file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise self._damaged(shard, wanted, error) from None
        with file as entered:
            yield entered

    def _damaged(self, shard: str, wanted: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.name_or_path}: {shard}, which holds weights of {wanted}, is damaged or cut off ({error})."
            " Copy or download it again."
        )

    def _find(self, name: str) -> Path | None:
        place = Path(self.name_or_path)
        if place.is_dir():
            return place / name if (place / name).is_file() else None
        try:
            found = cached_file(self.name_or_path, name, _raise_exceptions_for_missing_entries=False)
        except EntryNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self.name_or_path}: cannot fetch {name}: {error}") from None
        return None if found is None else Path(found)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in found.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors shards ({error!r}).") from None
    for name in names.values():
        if Path(name).name != name:
            raise CheckpointError(f"{index}: expected names of files beside it, got {name!r}.")
    return names


def load_skeleton(
    name_or_path: str, *, device: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The donor as `load_donor` gives it, but with every parameter on the meta device; buffers are real.

    Raises:
        CheckpointError: not a model, or no weights.
        ConversionError: a family that does not convert.
    """
    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    check_family(str(config.model_type))
    for field in DROPOUTS:
        if getattr(config, field, 0):
            setattr(config, field, 0.0)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if where.type == "cpu" else _own_dtype(config, name_or_path)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.config.name_or_path = name_or_path
    load_generation_config(model, name_or_path, {})
    for name, buffer in list(model.named_buffers()):
        _assign(model, name, buffer.to(where))
    return model.requires_grad_(False).eval()


def _own_dtype(config: Any, name_or_path: str) -> torch.dtype:
    """What ``dtype="auto"`` is: the configuration's, or the first floating-point tensor's on disk."""
    if getattr(config, "dtype", None) is not None:
        return config.dtype
    weights = ShardedWeights(name_or_path)
    for key in weights.files:
        with weights.opened([key], "the model") as slices:
            tensor = slices[key][:1]
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


class LayerLoader:
    """Fills modules of a skeleton with the donor's weights, for the time of a block.

    Args:
        model: of `load_skeleton`; may have been converted since.
        name_or_path: of the donor.
        device: where the weights go.
    """

    def __init__(self, model: PreTrainedModel, name_or_path: str, *, device: torch.device) -> None:
        self.model: Any = model
        self.weights = ShardedWeights(name_or_path)
        self.device = device
        self._transforms: list[Any] = list(get_model_conversion_mapping(model) or [])
        renamings = [one for one in self._transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in self._transforms if isinstance(one, WeightConverter)]
        own = model.state_dict()
        self.sources: dict[str, list[str]] = {}
        """Keys on disk of each of the model's tensors (or of the first of those that are made together)."""
        for key in self.weights.files:
            name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
            self.sources.setdefault(name if name in own or key not in own else key, []).append(key)

    @contextmanager
    def loaded(self, prefixes: Iterable[str], wanted: str) -> Generator[None]:
        """Have the parameters of some modules in memory inside the block, all others on meta.

        Args:
            prefixes: names of modules (``model.layers.3``), or of parameters; mixers are left as they are.
            wanted: what they are called in errors: "layer 3".

        Raises:
            CheckpointError: a shard is missing or damaged, or weights of these modules are in none.
        """
        chosen = tuple(prefixes)
        names = [n for n in self.model.state_dict(keep_vars=True) if _within(n, chosen) and not _is_ours(n)]
        before = {name: _tensor(self.model, name) for name in names}
        try:
            if names:
                self._fill(names, wanted)
            yield
        finally:
            for name, tensor in before.items():
                _assign(self.model, name, tensor)

    def _fill(self, names: list[str], wanted: str) -> None:
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        # what is tied is on disk under one name; the other module is lent the tensor, and left as it was
        shared = {name: tied[name] for name in names if name in tied and name not in self.sources}
        lenders = {name: _tensor(self.model, name) for name in shared.values() if name not in names}
        config = LoadStateDictConfig(
            device_map={"": self.device}, dtype=self.model.dtype, weight_mapping=self._transforms,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
        )  # fmt: skip
        keys = [key for name in names for key in self.sources.get(shared.get(name, name), ())]
        with self.weights.opened(keys, wanted) as slices, _quiet():
            convert_and_load_state_dict_in_model(self.model, slices, config)
        for name, lender in shared.items():
            _assign(self.model, name, _tensor(self.model, lender))
        for name, tensor in lenders.items():
            _assign(self.model, name, tensor)
        missing = [name for name in names if _tensor(self.model, name).is_meta]
        if missing:
            raise CheckpointError(
                f"{self.weights.name_or_path}: no weights of {wanted}: {missing[0]} is in none of its files, "
                f"or of another shape there ({len(missing)} such). Copy or download the donor again."
            )
        for name in names:
            _tensor(self.model, name).requires_grad_(False)

    def embedding_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of an embedding matrix [R, D], in the model's dtype; the rest is not kept.

        Args:
            name: of the parameter.
            rows: sorted indices [R].

        Raises:
            CheckpointError: as `loaded`.
        """
        keys = self.sources.get(name, [])
        if len(keys) != 1:
            raise CheckpointError(
                f"{self.weights.name_or_path}: no weights of the embedding: {name} is in none of its files."
            )
        dtype, parts = _tensor(self.model, name).dtype, []
        with self.weights.opened(keys, "the embedding") as slices:
            whole = slices[keys[0]]
            for low in range(0, whole.get_shape()[0], ROWS_AT_ONCE):
                chosen = rows[(rows >= low) & (rows < low + ROWS_AT_ONCE)]
                if len(chosen):
                    parts.append(whole[low : low + ROWS_AT_ONCE][chosen - low].to(self.device, dtype))
        return torch.cat(parts)


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _is_ours(name: str) -> bool:
    return ".hybrid." in name


def _tensor(model: nn.Module, name: str) -> Any:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, tensor)


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' bar for every layer."""
    from transformers.utils import logging

    shown = is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


__all__ = ["LayerLoader", "ShardedWeights", "load_skeleton"]
