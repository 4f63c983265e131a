"""What verbs write where: JSON alone on stdout, colours on terminals only, tracebacks where asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.cli import VERBS
from equipoise.commands.output import debugging

from .conftest import Cli


def equipoise(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, its output in pipes."""
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "equipoise", *arguments], capture_output=True, text=True, timeout=300,
        env=variables | environment,
    )  # fmt: skip


def test_a_pipe_gets_no_colours_and_whole_lines() -> None:
    for environment in ({}, {"TERM": "xterm-256color", "COLUMNS": "40"}):
        done = equipoise("generate", "no-such-directory/model", "x", "--top-p", "0", **environment)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == "error: --top-p: expected a share above 0 and up to 1, got 0.0.\n"


def test_tracebacks_only_with_debug(cli: Cli) -> None:
    assert "Traceback" not in equipoise("recipes", "sdd").stderr
    for arguments in (("--debug", "recipes", "sdd"), ("recipes", "sdd", "--debug")):
        shown = equipoise(*arguments)
        assert shown.returncode != 0
        assert "Traceback" in shown.stderr
        assert "UnknownNameError" in shown.stderr


def test_every_verb_takes_debug_after_its_name(cli: Cli) -> None:
    """lm-eval's arguments are its own."""
    for verb in (*((name,) for name, _, _ in VERBS), ("state", "show")):
        assert "--debug" in cli(*verb, "--debugging").stderr  # did you mean?
        assert cli(*verb, "--debug", "--help").exit_code == 0
    for arguments in (("--debug", "recipes"), ("recipes", "--debug"), ("recipes",)):
        assert cli(*arguments).exit_code == 0
        assert debugging() == ("--debug" in arguments)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """Named, since what would be found out is the shell that pytest was started from."""
    done = equipoise("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert f"_EQUIPOISE_COMPLETE=complete_{shell}" in done.stdout


def test_completion_knows_verbs_and_options() -> None:
    done = equipoise(_EQUIPOISE_COMPLETE="complete_bash", COMP_WORDS="equipoise conv", COMP_CWORD="1")
    assert done.stdout.split() == ["convert"]


def test_listings_as_json(cli: Cli) -> None:
    sweeps = json.loads(cli("sweep", "--json").stdout)
    assert {"name", "cells", "summary"} == set(sweeps[0])
    cells = json.loads(cli("sweep", sweeps[0]["name"], "--dry-run", "--json").stdout)
    assert len(cells) == sweeps[0]["cells"]
    assert {"row", "seed", "settings"} == set(cells[0])


@pytest.mark.parametrize("columns", ["40", "200"])
def test_recipes_on_a_terminal_of_any_width(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = cli("recipes")
    assert done.exit_code == 0
    table = done.stdout.splitlines()[:-1]  # the last line is a sentence
    assert max(map(len, table)) <= int(columns)
    assert "\x1b" not in done.stdout
