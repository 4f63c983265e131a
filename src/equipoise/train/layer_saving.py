"""A full checkpoint of a model that was never loaded: the donor's files beside the maps, under one index."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from equipoise.files import write_atomically, write_text
from equipoise.models.layer_loading import ShardedWeights
from equipoise.models.load import load_config
from equipoise.train.convert import RunRecord
from equipoise.train.outputs import RUN, staged


def save_full(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: RunRecord,
    output: Path,
    *,
    weights: ShardedWeights,
) -> None:
    """Write a checkpoint with all weights; the donor's are copied file by file, in their own dtype.

    Args:
        model: a converted skeleton with its trained maps in it.
        tokenizer: of the donor.
        record: becomes `run.json`.
        output: the directory.
        weights: of the donor.

    Raises:
        CheckpointError: a file of the donor is missing.
    """
    config: Any = model.config
    with staged(output) as staging:
        tokenizer.save_pretrained(staging)
        config.equipoise = dict(config.equipoise or {}, checkpoint="full", lora=False)
        config.architectures = [type(model).__name__]
        config.dtype = getattr(load_config(weights.name_or_path), "dtype", None) or config.dtype
        config.save_pretrained(staging)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(staging)
        index = _copy_weights(model, weights, staging)
        text = json.dumps({"metadata": {}, "weight_map": index}, indent=2, sort_keys=True)
        write_text(staging / SAFE_WEIGHTS_INDEX_NAME, text)
        write_text(staging / RUN, json.dumps(asdict(record), indent=2))


def _copy_weights(model: PreTrainedModel, weights: ShardedWeights, place: Path) -> dict[str, str]:
    """Copy the donor's files, write the maps; returns the file of each tensor."""
    shards = weights.shards()
    names = [f"model-{i + 1:05d}-of-{len(shards) + 1:05d}.safetensors" for i in range(len(shards) + 1)]
    renamed = dict(zip(shards, names, strict=False))
    for shard, name in renamed.items():
        source = weights.path(shard, "the donor")
        write_atomically(place / name, lambda path, source=source: shutil.copyfile(source, path))
    index = {key: renamed[shard] for key, shard in weights.files.items()}
    mixers = {n: t.contiguous() for n, t in model.state_dict().items() if ".hybrid." in n}
    write_atomically(place / names[-1], lambda path: save_file(mixers, path, metadata={"format": "pt"}))
    return index | dict.fromkeys(mixers, names[-1])
