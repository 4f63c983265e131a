"""Verbs on several ranks: the very numbers of one process; and verbs that run in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import equipoise
from benchmark_support import write_tasks
from equipoise.config import HybridConfig
from equipoise.models.auto import record_donor
from equipoise.models.load import load_donor
from ranks import launch
from support import tiny_tokenizer

from .conftest import Cli


def numbers(value: Any) -> Any:
    """A report without what differs from run to run: times, paths, dates."""
    if isinstance(value, dict):
        odd = ("second", "time", "date", "path", "score_files", "created")
        return {k: numbers(v) for k, v in value.items() if not any(word in k for word in odd)}
    return [numbers(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_audit_and_evaluate_give_the_same_numbers(
    cli: Cli, donor: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid = tmp_path / "hybrid"
    model: Any = equipoise.hybridize(load_donor(str(donor)), HybridConfig(window=4))
    record_donor(model, str(donor))
    model.save_pretrained(hybrid, delta=True)
    tiny_tokenizer().save_pretrained(hybrid)
    tasks = write_tasks(tmp_path / "tasks")

    def commands(name: str) -> list[list[str]]:
        audit = [
            "audit", str(hybrid), "--data", str(corpus), "--context-length", "64", "--batch-size", "3",
            "--resamples", "50", "--output", str(tmp_path / f"audit-{name}"),
        ]  # fmt: skip
        evaluate = [
            "evaluate", str(hybrid), "--tasks", "two,four,told", "--include-path", str(tasks),
            "--resamples", "50", "--batch-size", "3", "--branches", "both,linear", "--output",
            str(tmp_path / f"evaluate-{name}"),
        ]  # fmt: skip
        return [audit, evaluate]

    for arguments in commands("one"):
        done = cli(*arguments)
        assert done.exit_code == 0, done.stderr
    jobs = [{"arguments": arguments} for arguments in commands("two")]
    both = launch(2, jobs, tmp_path, HF_DATASETS_CACHE=str(tmp_path / "datasets"))
    assert both.returncode == 0, both.stderr
    for verb in ("audit", "evaluate"):
        one, two = (
            json.loads((tmp_path / f"{verb}-{name}" / f"{verb}.json").read_text()) for name in ("one", "two")
        )
        assert numbers(one) == numbers(two)
    assert both.stdout.count("data:") == 2


@pytest.mark.parametrize(
    ("arguments", "verb"), [(["recipes"], "recipes"), (["generate", "model", "text"], "generate")]
)
def test_other_verbs_run_in_one_process(
    arguments: list[str], verb: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli(*arguments)
    assert done.exit_code == 2, done.stderr
    assert f"equipoise {verb} runs in one process" in done.stderr
    monkeypatch.setenv("RANK", "1")
    assert "error" not in cli(*arguments).stderr  # rank 0 has said it


def test_environment_that_makes_no_sense(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "two")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("audit", "model", "--output", "out")
    assert done.exit_code == 2, done.stderr
    assert "got RANK=two and WORLD_SIZE=2" in done.stderr
