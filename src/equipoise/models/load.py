"""Opening donors and converted models with errors a person can act on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from equipoise.distributed import ranks
from equipoise.models.families import check_family
from equipoise.models.layout import DROPOUTS
from equipoise.models.sharding import empty_donor
from equipoise.models.storage import CheckpointError, check_token_ids, load_tensors
from equipoise.secrets import has_secret

log = logging.getLogger(__name__)

_ODD = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError)
"""What the libraries raise over JSON that is not what they wrote."""
ADAPTERS = "adapter_config.json"
"""What a directory of peft adapters has."""


def load_donor(
    name_or_path: str,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    to_shard: bool = False,
) -> PreTrainedModel:
    """Load a causal language model to convert: float32 on CPU, its own dtype on a GPU; safetensors only.

    One ``to_shard`` (see `equipoise.models.sharding`) is read by the leader alone, into the CPU's memory;
    other ranks get a model whose weights are not there yet.

    Raises:
        CheckpointError: not a model, no weights, weights damaged or only as pickles.
        ConversionError: a family that does not convert (found out before any weight is read).
    """
    if (Path(name_or_path) / ADAPTERS).is_file():
        raise CheckpointError(
            f"{name_or_path}: expected a whole model to convert, got adapters of one. Merge them into "
            "their model first (peft's merge_and_unload) and save that."
        )
    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    check_family(str(config.model_type))
    dropouts = {field: 0.0 for field in DROPOUTS if getattr(config, field, 0)}
    for field in dropouts:
        log.info(
            "the donor's %s of %g is switched off: converted layers have none", field, getattr(config, field)
        )
    if to_shard and not ranks().is_leader:
        for field, value in dropouts.items():
            setattr(config, field, value)
        return empty_donor(config, trust_remote_code=trust_remote_code)
    dtype = "auto" if to_shard and torch.cuda.is_available() else None
    return _load(name_or_path, "cpu" if to_shard else device, trust_remote_code, dtype, **dropouts)


def load_model(
    name_or_path: str, *, device: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load any model transformers knows, converted ones included; errors as in `load_donor`.

    ``dtype`` overrides what `load_donor` says of it.
    """
    load_config(name_or_path)
    return _load(name_or_path, device, False, dtype)


_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken")


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    place = Path(name_or_path)
    if place.is_dir() and not any(path for kind in _TOKENIZER_FILES for path in place.glob(kind)):
        # transformers 5 would make up a tokenizer without words from config.json alone
        raise CheckpointError(
            f"{name_or_path}: no tokenizer found beside the model. Copy tokenizer.json and "
            "tokenizer_config.json there."
        )
    try:
        # said, not left open: transformers would ask on a terminal whether to run the code
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except _ODD as error:
        raise CheckpointError(
            f"{name_or_path}: no tokenizer found beside the model ({_first_line(error)}). Copy "
            "tokenizer.json and tokenizer_config.json there."
        ) from None


def load_config(name_or_path: str, *, trust_remote_code: bool = False, weights: bool = True) -> Any:
    """Read a model's configuration, and look whether its weights can be there; only small ones are read.

    A directory of adapters alone (as recipe lora-only makes) has its base model's. Without ``weights``,
    config.json is enough, and nothing else is looked for.

    Raises:
        CheckpointError: not a model, no weights, weights damaged or only as pickles.
    """
    if has_secret(name_or_path):
        raise CheckpointError(
            "expected a model's directory or name without a user, password or token in it, since files that "
            "are written carry it on. Give the token as HF_TOKEN, or log in with `hf auth login`."
        )
    path, base = Path(name_or_path), adapters_base(name_or_path)
    if base is not None:
        return load_config(base, trust_remote_code=trust_remote_code, weights=weights)
    if path.is_dir():
        _check_directory(path, weights=weights)
    elif path.exists():
        raise CheckpointError(f"{path}: expected a model's directory or its name on the Hub, got a file.")
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except _ODD as error:
        raise CheckpointError(
            f"{name_or_path}: expected a local model directory or a model's name on the Hub; "
            f"{_first_line(error)}"
        ) from None


def adapters_base(name_or_path: str) -> str | None:
    """The model that a directory of adapters alone (recipe `lora-only`) is for; None for anything else.

    Raises:
        CheckpointError: the description of the adapters is damaged, or their model is gone.
    """
    path = Path(name_or_path)
    alone = (path / ADAPTERS).is_file() and not (path / "config.json").is_file()
    return _base_of(path) if alone else None


def _base_of(path: Path) -> str:
    """The model that a directory of adapters belongs to."""
    try:
        base = str(json.loads((path / ADAPTERS).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / ADAPTERS}: not peft's description of adapters ({error}).") from None
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise CheckpointError(
            f"{path}: these are adapters of the model {base}, which is not there. Put it back, or correct "
            f"base_model_name_or_path in {ADAPTERS}."
        )
    return base


def _check_directory(path: Path, *, weights: bool) -> None:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: expected a model directory with a config.json, found none.")
    try:
        described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}/config.json: not JSON ({error}).") from None
    if not weights:
        return
    delta = (
        (described.get("equipoise") or {}).get("checkpoint") == "delta"
        if isinstance(described, dict)
        else False
    )
    check_index(path)
    files = sorted(path.glob("*.safetensors"))
    if not files and not delta and not (path / ADAPTERS).is_file():
        pickles = [p.name for p in path.glob("*.bin")]
        hint = f" Only {pickles[0]} is there: save the model again as safetensors." if pickles else ""
        raise CheckpointError(f"{path}: expected weights (*.safetensors), found none.{hint}")
    for file in files:
        if file.stat().st_size < 1 << 20:  # small ones are read whole; large ones fail on loading, by name
            load_tensors(file)


def check_index(directory: Path) -> None:
    """Refuse an index of shards that is damaged, incomplete, or names files outside the directory.

    Raises:
        CheckpointError: names the entry.
    """
    for path in sorted(directory.glob("*.safetensors.index.json")):
        try:
            shards = {
                str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not an index of weights ({error}); copy it again.") from None
        for shard in sorted(shards):
            if shard in ("", ".", "..") or any(mark in shard for mark in "/\\:\0"):
                raise CheckpointError(
                    f"{path}: refused: it says that weights are in {shard!r}, and shards lie beside their "
                    "index, under a plain name."
                )
            if not (directory / shard).is_file():
                raise CheckpointError(f"{directory}: expected the shard {shard}, found none; copy it again.")


def _load(
    name_or_path: str,
    device: str | None,
    trust_remote_code: bool,
    dtype: torch.dtype | str | None,
    **settings: float,
) -> PreTrainedModel:
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = "auto" if where.startswith("cuda") else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype or usual, use_safetensors=True, trust_remote_code=trust_remote_code,
            **settings,
        )  # fmt: skip
    except _ODD as error:
        raise CheckpointError(f"{name_or_path}: cannot load the model: {_first_line(error)}") from None
    except Exception as error:  # safetensors raises its own type, without a public base
        if type(error) is RuntimeError and "mismatched" in str(error):
            raise CheckpointError(
                f"{name_or_path}: its weights have other shapes than config.json says: not of one save."
            ) from None
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{name_or_path}: a weights file is damaged or cut off ({error}).") from None
    check_token_ids(model.generation_config, name_or_path)
    on_device: Any = model
    return on_device.to(where).eval()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
