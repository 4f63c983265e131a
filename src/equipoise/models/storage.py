"""Files of a checkpoint: checked when read, the donor found and recognised."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from equipoise.files import write_atomically as write_atomically

MIXERS = "hybrid.safetensors"
"""Feature maps and gates in a delta checkpoint."""
_HEAD, _SAMPLES, _SAMPLE = 1 << 20, 256, 1 << 12


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says what is wrong and what to do."""


def fingerprint(directory: Path) -> str:
    """Hash of a local donor's weights: of each safetensors file name, size, first MiB and 256 pages spread
    over the rest."""
    digest = hashlib.sha256()
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: expected the donor's *.safetensors files, found none.")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD))
            for offset in range(_HEAD, size, max(_SAMPLE, size // _SAMPLES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def describe_donor(name_or_path: str, config: Any) -> dict[str, Any]:
    """What a delta needs to find its donor again: path and fingerprint, or Hub name and commit."""
    path = Path(name_or_path)
    if path.is_dir():
        return {"name": str(path.resolve()), "revision": None, "fingerprint": fingerprint(path)}
    return {"name": name_or_path, "revision": getattr(config, "_commit_hash", None), "fingerprint": None}


def resolve_donor(checkpoint: Any, described: dict[str, Any] | None) -> tuple[str, str | None]:
    """(name or path, revision) of the donor a delta belongs to.

    A local donor that is not where it was is looked for beside the checkpoint, so that a folder holding both
    can be moved.

    Raises:
        CheckpointError: not there, or not the donor the delta was made from.
    """
    if described is None:
        raise CheckpointError(f"{checkpoint}: the delta does not name its donor; was config.json edited?")
    name, expected = str(described["name"]), described.get("fingerprint")
    if expected is None:
        return name, described.get("revision")
    places = [Path(name), Path(str(checkpoint)).resolve().parent / Path(name).name]
    found = [place for place in places if place.is_dir()]
    if not found:
        raise CheckpointError(
            f"{checkpoint}: this is a delta of the donor {name}, which is not there. Put the donor back, or "
            f"beside the checkpoint as {places[1]}."
        )
    for place in found:
        if fingerprint(place) == expected:
            return str(place), None
    raise CheckpointError(
        f"{checkpoint}: {found[0]} holds other weights than the donor this delta was made from; "
        "the feature maps would not fit. Point it at the original donor."
    )


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: missing, cut off or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a safetensors file, found none.") from None
    except (SafetensorError, ValueError, TypeError) as error:  # the latter over a header of bad UTF-8
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); copy or make it again."
        ) from None


def load_mixers(model: nn.Module, checkpoint: Any, hub: dict[str, Any]) -> None:
    """Fill the feature maps and gates from a delta.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights are not this model's.
    """
    path = _file(checkpoint, MIXERS, hub)
    weights = load_tensors(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if ".hybrid." in name}
    if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
        odd = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        raise CheckpointError(
            f"{path}: expected the {len(own)} mixer weights of this configuration, got {len(weights)} "
            f"(first that differs: {odd[0]}); config.json and {MIXERS} are not of one save."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def load_generation_config(model: Any, checkpoint: Any, hub: dict[str, Any]) -> None:
    """Take over the checkpoint's generation settings, where it has any; errors as `check_token_ids`."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint, **hub)
    except OSError:  # transformers' way to say that there is no such file
        return
    check_token_ids(model.generation_config, checkpoint)


_LARGEST_ID = 2**31 - 1


def check_token_ids(settings: Any, checkpoint: Any) -> None:
    """Refuse generation settings whose token ids no tensor of tokens can hold.

    Args:
        settings: transformers' GenerationConfig; None for a model without.
        checkpoint: what the message names.

    Raises:
        CheckpointError: names the setting and its value.
    """
    for name, value in {} if settings is None else settings.to_dict().items():
        if not name.endswith(("token_id", "suppress_tokens")) or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            # -1 stands for "none" in some published models
            if not isinstance(one, int) or isinstance(one, bool) or not -1 <= one <= _LARGEST_ID:
                raise CheckpointError(
                    f"{checkpoint}: expected a token id (a whole number up to {_LARGEST_ID}) as {name} in "
                    f"generation_config.json or config.json, got {one!r}; copy the file again."
                )


def lora_folder(checkpoint: Any, hub: dict[str, Any]) -> Path:
    """The local folder with a checkpoint's adapters."""
    _file(checkpoint, "lora/adapter_config.json", hub)
    return _file(checkpoint, "lora/adapter_model.safetensors", hub).parent


def _file(checkpoint: Any, name: str, hub: dict[str, Any]) -> Path:
    local = Path(str(checkpoint))
    if local.is_dir():
        if not (local / name).is_file():
            raise CheckpointError(f"{local}: expected {name}, found none; the checkpoint is incomplete.")
        return local / name
    found = cached_file(checkpoint, name, **hub)
    if found is None:
        raise CheckpointError(
            f"{checkpoint}: expected {name} on the Hub, found none; the checkpoint is incomplete."
        )
    return Path(found)
