"""Files of LoLCATs checkpoints (arXiv 2410.10254): read without running code, and sorted by layer.

Shapes: H query heads, D head_dim, F columns of a feature map's W, r LoRA rank.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from equipoise.files import sha256
from equipoise.models.storage import CheckpointError, load_tensors

_INSIDE = ("model_state_dict", "state_dict", "model")
"""Entries under which training code keeps the state dict; LoLCATs' own and FSDP code use the outer two."""
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
_OWNERS = {"base_model", "model"}
_MAP = re.compile(r"layers\.(\d+)\.self_attn\.feature_map_([qk])\.mlp\.layer")
_FACTORS = re.compile(r"layers\.(\d+)\.self_attn\.window_factors")
_LORA = re.compile(r"layers\.(\d+)\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_SHOWN = 5


@dataclass(frozen=True)
class LolcatsWeights:
    """What files of one checkpoint hold together.

    Attributes:
        maps: W of a layer's queries ("q") and keys ("k"), each [H, D, F].
        factors: a layer's window factors before the sigmoid [1, H, 1, 1].
        lora: by module of a layer ("self_attn.q_proj"), then by layer: "A" [r, in] and "B" [out, r].
        files: name, size in bytes, SHA-256 and number of tensors of each file.
        replaced: tensors that a later file replaced by other values.
    """

    maps: dict[int, dict[str, Tensor]]
    factors: dict[int, Tensor]
    lora: dict[str, dict[int, dict[str, Tensor]]]
    files: tuple[dict[str, Any], ...]
    replaced: int


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch or safetensors file, by name; the file's content decides which it is.

    Raises:
        CheckpointError: not such a file, or a pickle that would run code (it is not run).
    """
    if not path.is_file():
        found = "a directory" if path.is_dir() else "none"
        raise CheckpointError(f"{path}: expected a checkpoint file (.pt or .safetensors), found {found}.")
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors: eight bytes of length, then JSON
    content = load_tensors(path) if start[8:] == b"{" else _load_pickle(path)
    if isinstance(content, Mapping):
        content = next((content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        what = "an empty one" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: expected a state dict (names and tensors), got {what}.")
    odd = [str(name) for name, value in content.items() if not _is_weight(value)]
    if odd:
        raise CheckpointError(
            f"{path}: expected finite floating-point tensors only, but {len(odd)} entries are not: "
            f"{some(odd)}."
        )
    return {str(name): tensor for name, tensor in content.items()}


def _load_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except UnpicklingError as error:  # torch's own words advise reading it with code allowed
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            reason = "neither a safetensors file nor a torch file of tensors alone; nothing in it was run"
            raise CheckpointError(f"{path}: not a checkpoint that can be read: {reason}.") from None
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors ({code[1]}), and reading that would run code from "
            "the file. Nothing was run. Ask its maker for the state dict alone, best as safetensors."
        ) from None
    except Exception as error:  # bytes that are no checkpoint raise all sorts of types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: not a checkpoint that can be read: {lines[0]}.") from None


def _is_weight(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())


def _canonical(name: str) -> str:
    """``base_model.model.model.layers.0.…`` -> ``layers.0.…``, wrappers left out wherever they stand."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] in _OWNERS:
        parts.pop(0)
    return ".".join(parts)


def read_weights(files: Sequence[Path]) -> LolcatsWeights:
    """Read the files of one checkpoint.

    Raises:
        CheckpointError: as `read_state`; names that LoLCATs does not write, or two different sets of LoRA.
    """
    merged: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    replaced = 0
    for path in files:
        state, own = read_state(path), set[str]()
        for raw, tensor in state.items():
            name = _canonical(raw)
            before = merged.get(name)
            if before is not None and not torch.equal(before.double(), tensor.double()):
                # LoLCATs' own loader lets later files count, but LoRA of stage 1 it merges before stage 2
                if name in own or ".lora_" in name:
                    raise CheckpointError(
                        f"{path}: {name} comes twice, with different values, and which one counts cannot be "
                        "told. Keep one; a first set of LoRA is to be merged into the donor."
                    )
                replaced += 1
            merged[name] = tensor
            own.add(name)
        described.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "tensors": len(state),
            }
        )
    return _sorted(merged, tuple(described), replaced)


def _sorted(merged: dict[str, Tensor], files: tuple[dict[str, Any], ...], replaced: int) -> LolcatsWeights:
    maps: dict[int, dict[str, Tensor]] = {}
    factors: dict[int, Tensor] = {}
    lora: dict[str, dict[int, dict[str, Tensor]]] = {}
    unknown: list[str] = []
    for name, tensor in merged.items():
        if match := _MAP.fullmatch(name):
            maps.setdefault(int(match[1]), {})[match[2]] = tensor
        elif match := _FACTORS.fullmatch(name):
            factors[int(match[1])] = tensor
        elif match := _LORA.fullmatch(name):
            lora.setdefault(match[2], {}).setdefault(int(match[1]), {})[match[3]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"expected feature maps (feature_map_q.mlp.layer), window_factors and LoRA weights, but "
            f"{len(unknown)} of {len(merged)} names are others: {some(unknown)}. Another kind of feature "
            "map cannot be imported; a donor's own weights are to be left out of the file."
        )
    return LolcatsWeights(maps, factors, lora, files, replaced)


def some(names: Sequence[object]) -> str:
    """The first few of a list, for a message."""
    shown = ", ".join(str(name) for name in names[:_SHOWN])
    return shown + (", …" if len(names) > _SHOWN else "")
