"""`equipoise verify` tells a saved model that is whole from one that is not."""

from __future__ import annotations

import shutil
from pathlib import Path

from .conftest import Cli


def test_what_is_whole_and_what_is_not(cli: Cli, convert: Cli, donor: Path, tmp_path: Path) -> None:
    assert convert("swa-sinks").exit_code == 0
    out = tmp_path / "out"
    done = cli("verify", out)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"{out}: ")
    assert "as they were written" in done.stdout
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    (copy / "mine.txt").write_text("not listed")
    assert cli("verify", copy).exit_code == 0
    text = (copy / "config.json").read_bytes()
    for content, words in (
        (text[:-1], "config.json has"),
        (text.replace(b'"', b"'", 1), "config.json is not what was written (its SHA-256 differs)"),
        (None, "config.json cannot be read (No such file"),
    ):
        (copy / "config.json").unlink() if content is None else (copy / "config.json").write_bytes(content)
        done = cli("verify", out, copy)
        assert done.exit_code == 1
        assert done.stdout.startswith(f"{out}: ")  # the whole one is told of all the same
        assert f"error: {copy}: {words}" in done.stderr


def test_what_has_no_manifest(cli: Cli, donor: Path, tmp_path: Path) -> None:
    done = cli("verify", donor, tmp_path / "none")
    assert done.exit_code == 1
    for place in (donor, tmp_path / "none"):
        assert f"{place}: expected a directory with a manifest.json" in done.stderr
