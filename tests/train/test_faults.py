"""The fault suite (`make faults`) at one seed and a few of its points; each has to end bit-equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.events import Event
from faults.points import POINTS
from faults.suite import World

ROOT = Path(__file__).parents[2]


def test_points_are_distinct() -> None:
    assert len({point.name for point in POINTS}) == len(POINTS) >= 20


def test_files_are_told_by_their_role(tmp_path: Path) -> None:
    from faults.events import Stream

    stream = Stream(tmp_path)
    stage = tmp_path / "out" / "training" / "transfer"
    for path, role in {
        stage / ".saving" / "checkpoint-4" / "optimizer.pt": "checkpoint/optimizer.pt",
        stage / "checkpoint-4" / ".manifest.0123456789ab.json": "checkpoint/manifest.json",
        stage / ".checkpoint-2.0123456789ab.removed" / "x.pt": "removed/x.pt",
        stage / "finished.json": "stage/finished.json",
        stage.parent / "start.json": "work/start.json",
        tmp_path / "out" / ".staging" / "config.json": "result/config.json",
        tmp_path / "out" / "config.json": "output/config.json",
        tmp_path / "elsewhere": None,
    }.items():
        assert stream.role(path) == role
    assert str(Event("written", "a")) == "written a"
    assert World.__doc__


ONLY = [
    "checkpoint: in place", "power lost: around a", "loss is NaN", "damaged: n", "a rank dies",
    "donor: a shard",
]  # fmt: skip
"""Parts of names: killed, without power, diverged, damaged, one of two ranks, the donor."""


@pytest.mark.slow
@pytest.mark.parametrize("only", ONLY)
def test_nothing_is_lost(only: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "faults",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--only",
        only,
        "--output",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "faults.json").read_text())
    assert outcomes
    assert all(outcome["wrong"] == "" for outcome in outcomes)
