"""Conversions on streamed data: what they see, killed and resumed, and how much memory that takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conversions import files, logits, quiet
from equipoise.config import ConfigError
from equipoise.data import shards
from equipoise.data.layouts import DataError
from equipoise.data.preparing import prepare_data
from equipoise.data.shards import Position, ShardedDocuments
from equipoise.data.streaming import StreamedRows
from equipoise.models.load import load_model
from equipoise.train.convert import convert
from equipoise.train.progress import ProgressReport
from ranks import launch, run_job
from support import tiny_tokenizer

STAGE = {"max_steps": 4, "save_every": 2, "batch_size": 4, "micro_batch_size": 2}


class KillError(Exception):
    """The process goes away."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> str:
    place = tmp_path / "shards"
    place.mkdir()
    for shard in range(4):
        lines = [json.dumps({"text": f"def window({shard}, {i}):\n" * (i % 7 + 1)}) for i in range(200)]
        (place / f"s{shard}.jsonl").write_text("\n".join(lines))
    return str(place)


def streaming(small: Any, source: str, recipe: str = "ssd", **stages: Any) -> Any:
    data = {
        "source": source,
        "context_length": 32,
        "streaming": True,
        "shuffle_buffer": 20,
        "max_tokens": None,
    }
    stages = {"transfer": STAGE, "finetune": STAGE, **stages}
    return small(recipe, data=data, **stages)


@pytest.mark.parametrize(
    ("label", "step"), [pytest.param("ssd transfer", 3, marks=pytest.mark.slow), ("ssd finetune", 3)]
)
def test_killed_and_resumed_equals_a_run_that_was_not(
    label: str,
    step: int,
    source: str,
    donor: str,
    small: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = streaming(small, source)
    whole = convert(donor, run, tmp_path / "whole", console=quiet())

    def at(self: ProgressReport, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.label == label and state.global_step == step:
            raise KillError

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReport, "on_step_end", at)
        with pytest.raises(KillError):
            convert(donor, run, tmp_path / "cut", console=quiet())
    started: list[Any] = []
    read = ShardedDocuments.read

    def noted(self: ShardedDocuments, position: Any) -> Any:
        if self.side == "train":
            started.append(position)
        return read(self, position)

    monkeypatch.setattr(ShardedDocuments, "read", noted)
    record = convert(donor, run, tmp_path / "cut", resume=True, console=quiet())
    assert started[0] != Position()  # what the checkpoint had behind it was not read again
    assert record.held_out == whole.held_out
    models = [load_model(str(tmp_path / name)) for name in ("whole", "cut")]
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


@pytest.mark.parametrize("recipe", ["ssd", "hedgecats"])
def test_rows_are_shared_out_as_promised(recipe: str, source: str, donor: str, small: Any) -> None:
    run = streaming(small, source, recipe)
    data = prepare_data(run, load_model(donor), tiny_tokenizer(), seed=0)
    assert isinstance(data.rows, StreamedRows)
    assert len(data.rows) == 16
    stops_early = run.finetune.early_stopping is not None
    assert data.rows.documents.side == ("rest" if stops_early else "train")
    assert (data.aside is not None) == stops_early
    other = prepare_data(run, load_model(donor), tiny_tokenizer(), seed=1)
    assert not torch.equal(other.rows[0]["input_ids"], data.rows[0]["input_ids"])
    assert torch.equal(other.held_out[0]["input_ids"], data.held_out[0]["input_ids"])


def test_epochs_of_max_tokens(source: str, donor: str, small: Any, tmp_path: Path) -> None:
    data = {"source": source, "context_length": 32, "streaming": True, "max_tokens": 32 * 10}
    stage = {"max_steps": None, "epochs": 2, "batch_size": 4}
    record = convert(donor, small("zero-shot", data=data, transfer=stage), tmp_path / "out", console=quiet())
    assert record.stages["transfer"]["steps"] == 2 * 2  # 10 rows are 2 whole steps


def test_the_end_must_be_known(source: str, small: Any) -> None:
    with pytest.raises(ConfigError, match=r"set data.max_tokens, or finetune.max_steps"):
        streaming(small, source, finetune={"max_steps": None})


def test_damaged_shard_stops_the_run_and_keeps_its_checkpoints(
    source: str, donor: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, count, limit = shards._open_file, 0, 10**9

    def failing(path: Path) -> Any:
        nonlocal count
        count += 1
        if count > limit:
            raise OSError("cut short")
        return opened(path)

    monkeypatch.setattr(shards, "_open_file", failing)
    run = streaming(small, source, "zero-shot", transfer={**STAGE, "max_steps": 10_000})
    prepare_data(run, load_model(donor), tiny_tokenizer(), seed=0)
    limit = 2 * count + 2  # the layout's, and the first shard of the training rows
    with pytest.raises(DataError, match=r"jsonl: expected a shard that can be read to its end, got OSError"):
        convert(donor, run, tmp_path / "out", console=quiet())
    assert list((tmp_path / "out" / "training" / "transfer").glob("checkpoint-*"))


@pytest.mark.slow
def test_killed_by_the_system(source: str, donor: str, small: Any, tmp_path: Path) -> None:
    """SIGKILL at whatever point: nothing of the process is there to clean up."""
    steps = 40
    command = [
        sys.executable, "-m", "equipoise", "convert", donor, "--recipe", "zero-shot", "--data", source,
        "--streaming", "--max-steps", str(steps), "--set", "data.context_length=32",
        "--set", "hybrid.window=4",
        "--set", "transfer.batch_size=4", "--set", "transfer.save_every=2", "--set", "data.shuffle_buffer=20",
    ]  # fmt: skip
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True, capture_output=True)
    cut = tmp_path / "cut"
    for reached in (4, 24):
        process = subprocess.Popen(
            [*command, "--output", str(cut), "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        place = cut / "training" / "transfer"
        while process.poll() is None and not any(
            int(path.name.split("-")[1]) >= reached for path in place.glob("checkpoint-[0-9]*")
        ):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    subprocess.run([*command, "--output", str(cut), "--resume"], check=True, capture_output=True)
    models = [load_model(str(tmp_path / name)) for name in ("whole", "cut")]
    assert torch.equal(logits(models[0]), logits(models[1]))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_read_what_one_process_reads(
    parallel: str, source: str, donor: str, small: Any, tmp_path: Path
) -> None:
    """Over gloo, in float64, from shards that each rank reads for itself."""
    run = streaming(small, source).model_dump(mode="json")
    job = {"donor": donor, "run": run, "float64": True}
    run_job({**job, "output": str(tmp_path / "one")})
    done = launch(2, [{**job, "output": str(tmp_path / "two"), "parallel": parallel}], tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("hybrid.safetensors", "lora/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / place / name) for place in ("two", "one"))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-12)
    one, two = (json.loads((tmp_path / place / "run.json").read_text()) for place in ("one", "two"))
    assert two["held_out"] == pytest.approx(one["held_out"], abs=1e-9)
    assert two["train_tokens"] == one["train_tokens"]


MEMORY = """
import resource, sys
from equipoise.data.shards import Position, ShardedDocuments
from equipoise.data.streaming import StreamedRows
from support import tiny_tokenizer
documents = ShardedDocuments(sys.argv[1], seed=0, buffer=200)
rows = StreamedRows(documents, tiny_tokenizer(), context_length=1024, count=10**9)
index = 0
while rows.position(index).place.turn == 0:
    rows[index]
    index += 1
print(index, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """A whole pass over ten times the shards, of 20 MB more text."""
    import pyarrow
    from pyarrow.parquet import write_table

    peaks: list[int] = []
    for shards_ in (2, 20):
        place = tmp_path / str(shards_)
        place.mkdir()
        for shard in range(shards_):
            texts = [f"{shard} {i} the quick brown fox jumps " * 35 for i in range(1000)]
            write_table(pyarrow.table({"text": texts}), place / f"{shard}.parquet", row_group_size=100)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(place)],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        rows, peak = map(int, done.stdout.split())
        assert rows > 200 * shards_
        peaks.append(peak)
    assert abs(peaks[1] - peaks[0]) < 24, peaks
