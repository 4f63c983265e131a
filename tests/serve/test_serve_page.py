"""docs/serve.md: its commands parse, its client runs, its limits are the settings'."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from equipoise.cli import app
from equipoise.serve.app import Served
from equipoise.serve.settings import ServeSettings

from .conftest import Serve

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
VERB: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


def test_commands_and_options_exist() -> None:
    commands = [shlex.split(line)[1:] for line in TEXT.splitlines() if line.startswith("equipoise ")]
    assert commands
    for command in commands:
        assert command[0] == "serve"
        VERB.make_context("serve", command[1:])
    known = {option for parameter in VERB.params for option in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)", TEXT)) <= known


def test_defaults_are_those_of_the_table() -> None:
    limits = ServeSettings(context_length=2)
    listed = dict(re.findall(r"^\| `(--[\w-]+)`[^|]*\| ([^|]*?) \|", TEXT, re.MULTILINE))
    assert listed["--max-tokens"] == f"{limits.max_tokens:,}"
    assert listed["--max-sequences"] == f"{limits.max_sequences}, 2GiB"
    assert listed["--queue"] == str(limits.queue_size)
    assert listed["--request-timeout"] == f"{limits.request_timeout:g} s"
    assert listed["--shutdown-timeout"] == f"{limits.shutdown_timeout:g} s"
    defaults = {parameter.name: parameter.default for parameter in VERB.params}
    for name in ("max_tokens", "max_sequences", "request_timeout", "shutdown_timeout"):
        assert defaults[name] == getattr(limits, name)
    assert defaults["queue"] == limits.queue_size
    assert ServeSettings(context_length=2, state_memory=defaults["state_memory"]) == limits


def test_client(serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (listing,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(Served, "models", lambda self: ["hedgecats"])
    running = serve()
    exec(compile(listing.replace("http://127.0.0.1:8000/v1", running.url), "serve.md", "exec"), {})
    assert capsys.readouterr().out
