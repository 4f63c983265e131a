"""docs/states.md: its commands and its Python run as they stand, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from equipoise import HybridConfig, hybridize
from support import tiny_model, tiny_tokenizer

from .conftest import Cli

TEXT = (Path(__file__).parents[2] / "docs" / "states.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's model and book where it expects them."""
    monkeypatch.chdir(tmp_path)
    hybridize(tiny_model("llama", vocab_size=300), HybridConfig(window=8)).save_pretrained("out/hedgecats")
    tiny_tokenizer().save_pretrained("out/hedgecats")
    Path("book.txt").write_text("the quick brown fox jumps\n" * 30, encoding="utf-8")


def test_commands(cli: Cli) -> None:
    listed = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line)[1:] for block in listed for line in block.splitlines()]
    assert [command[:2] for command in commands] == [["state", v] for v in ("save", "show", "continue")]
    for command in commands:
        done = cli(*command)
        assert done.exit_code == 0, done.stderr


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    (listing,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    exec(compile(listing, "states.md", "exec"), {})
    assert len(capsys.readouterr().out) > 2
    assert Path("book.safetensors").is_file()
