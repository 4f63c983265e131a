"""`make advisories` says whether it asked: pip-audit itself passes where it could ask about nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from support import load_tool

ROOT = Path(__file__).parents[2]
FINE = {"name": "rich", "version": "1.0", "vulns": []}
BAD = {"name": "torch", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}
SKIPPED = {"name": "yarl", "skip_reason": "Dependency not found on PyPI and could not be audited: yarl (1)"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_tool("advisories")
    monkeypatch.setattr(module, "unreachable", lambda: None)
    return module


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([FINE, FINE], 0, "2 locked packages, no known vulnerability"),
        ([FINE, BAD], 1, "torch 2.0: PYSEC-1, fixed in 2.1"),
        ([SKIPPED, BAD], 1, "NOT CHECKED: 1 of 2 packages, yarl"),
        ([FINE, SKIPPED], 3, "NOT CHECKED: 1 of 2 packages, yarl"),
        ([], 3, "NOT CHECKED: 0 of 0"),
    ],
)
def test_what_is_known(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, packages: Any, code: int, words: str
) -> None:
    monkeypatch.setattr(tool, "_run", lambda command: json.dumps({"dependencies": packages}))
    monkeypatch.setattr(tool.venv, "create", lambda *_, **__: None)
    assert tool.main() == code
    assert words in capsys.readouterr().out


def test_offline(tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.undo()

    def refuse(*_: Any, **__: Any) -> Any:
        raise URLError("Name or service not known")

    monkeypatch.setattr(tool, "urlopen", refuse)
    monkeypatch.setattr(tool, "audited", lambda: pytest.fail("asked all the same"))
    assert tool.main() == 3
    assert "NOT CHECKED: https://pypi.org/pypi/pip/json does not answer (Name or" in capsys.readouterr().out


def test_pip_audit_that_fails(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "pip-audit"
    program.write_text("#!/bin/sh\necho 'ERROR: connection reset' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(tool, "HOME", tmp_path)
    assert tool.main() == 3
    assert "NOT CHECKED: pip-audit ended with 1: ERROR: connection reset" in capsys.readouterr().out
