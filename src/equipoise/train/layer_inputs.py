"""What layers get, on disk: one safetensors file a micro batch and layer, removed once nobody needs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from equipoise.files import write_atomically
from equipoise.models.storage import load_tensors

HIDDEN = "hidden"
"""Name of the tensor in a file."""


class InputStore:
    """Hidden states [B, T, D] by layer and micro batch, and what comes with each micro batch.

    Files are written whole or not at all, so that one that is there counts after a kill too.

    Args:
        root: a folder of its own; may be shared by several processes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def _batch(self, micro: int) -> Path:
        return self.root / "batches" / f"{micro:06d}.safetensors"

    def _hidden(self, layer: int, micro: int) -> Path:
        return self.folder(layer) / f"{micro:06d}.safetensors"

    def folder(self, layer: int) -> Path:
        """Where a layer's inputs lie."""
        return self.root / f"layer-{layer:04d}"

    def put_batch(self, micro: int, batch: dict[str, Tensor]) -> None:
        """Keep a micro batch's tokens, segments and positions."""
        _write(self._batch(micro), batch)

    def has_batch(self, micro: int) -> bool:
        """Whether `put_batch` was called for it."""
        return self._batch(micro).is_file()

    def batch(self, micro: int, device: torch.device) -> dict[str, Tensor]:
        """What `put_batch` kept.

        Raises:
            CheckpointError: it did not, or the file is damaged.
        """
        return {name: tensor.to(device) for name, tensor in load_tensors(self._batch(micro)).items()}

    def put(self, layer: int, micro: int, hidden: Tensor) -> None:
        """Keep what a layer gets."""
        _write(self._hidden(layer, micro), {HIDDEN: hidden})

    def has(self, layer: int, micro: int) -> bool:
        """Whether `put` was called for it."""
        return self._hidden(layer, micro).is_file()

    def get(self, layer: int, micro: int, device: torch.device) -> Tensor:
        """What a layer gets.

        Raises:
            CheckpointError: not kept, or the file is damaged.
        """
        return load_tensors(self._hidden(layer, micro))[HIDDEN].to(device)

    def drop(self, layer: int, micro: int | None = None) -> None:
        """Remove what a layer got, all of it or one micro batch's."""
        if micro is None:
            shutil.rmtree(self.folder(layer), ignore_errors=True)
        else:
            self._hidden(layer, micro).unlink(missing_ok=True)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda place: save_file(own, place))
