"""Conversions by layers in processes of their own: killed, helped, under torchrun, and their memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

MIB = 1 << 20
_BASELINE = """
import equipoise.train.layer_convert
from pathlib import Path
print(Path("/proc/self/status").read_text())
"""


@pytest.fixture
def command(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    donor = tmp_path / "donor"
    tiny_model(vocab_size=320, num_hidden_layers=3).save_pretrained(donor, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(donor)

    def words(output: str, *more: str, place: str = str(donor)) -> list[str]:
        return [
            "-m", "equipoise", "convert", place, "--recipe", "zero-shot", "--output", str(tmp_path / output),
            "--data", text, "--stream-layers", "--set", "watch=null", "--set", "hybrid.window=4",
            "--set", "data.context_length=32", "--set", "data.max_tokens=2000",
            "--set", "transfer.batch_size=2", "--set", "transfer.save_every=3", "--max-steps", "12", *more,
        ]  # fmt: skip

    return words


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def maps(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "hybrid.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = maps(one), maps(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (one / "training").exists()


def test_killed_twice_helped_and_bit_equal(command: Any, tmp_path: Path) -> None:
    """SIGKILL in the embedding and in a layer's training; a second process helps the one that goes on."""
    finish(start(command("whole")))
    work = tmp_path / "cut" / "training"
    for number, sign in enumerate(("inputs/layer-0000/*", "layer-0000/checkpoint-*")):
        process = start(command("cut", *(["--resume"] if number else [])))
        while process.poll() is None and not any(work.glob(sign)):
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    main = start(command("cut", "--resume"))
    while main.poll() is None and not any(work.glob("inputs/done/embed")):
        time.sleep(0.01)
    helper = start(command("cut", "--join"))
    finish(main)
    helper.communicate(timeout=120)
    assert_equal(tmp_path / "cut", tmp_path / "whole")


def test_ranks_of_torchrun_share_the_layers(command: Any, tmp_path: Path) -> None:
    finish(start(command("whole")))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = finish(start([*torchrun, *command("ranks")]))
    assert_equal(tmp_path / "ranks", tmp_path / "whole")
    assert said.count("held-out loss") == 1  # one rank finishes; what the others train they do quietly


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_layer(command: Any, tmp_path: Path) -> None:
    """Twelve layers of 13 MiB in float32: anonymous pages stay under four of them above the baseline."""
    place = tmp_path / "wide"
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "num_attention_heads": 8}
    model = tiny_model(vocab_size=320, num_hidden_layers=12, num_key_value_heads=8, **sizes)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert layer > 12 * MIB
    model.to(torch.bfloat16).save_pretrained(place, max_shard_size="8MB")
    tiny_tokenizer().save_pretrained(place)
    told = subprocess.run(
        [sys.executable, "-c", _BASELINE], capture_output=True, text=True, check=True
    ).stdout
    before = _anonymous(told)
    process, peak = start(command("wide-out", "--max-steps", "2", place=str(place))), 0
    while process.poll() is None:
        peak = max(peak, _anonymous(_status(process.pid)))
        time.sleep(0.01)
    finish(process)
    assert before < peak < before + 4 * layer + 24 * MIB < before + 6 * layer + 12 * MIB


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def _anonymous(status: str) -> int:
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
