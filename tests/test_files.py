"""Files written whole or not at all, and manifests that tell which directory is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from equipoise.files import (
    MANIFEST,
    damage,
    make_directory,
    move_directory,
    remove_directory,
    write_atomically,
    write_manifest,
    write_text,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every fsync and rename, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append(f"sync {'directory' if place.is_dir() else 'file'}")
        fsync(handle)

    def rename(source: Any, target: Any) -> None:
        seen.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    return seen


def test_content_first_then_the_name(tmp_path: Path, calls: list[str]) -> None:
    write_text(tmp_path / "a.json", "new\n")
    assert calls == ["sync file", "rename", "sync directory"]
    assert (tmp_path / "a.json").read_bytes() == b"new\n"


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(target, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert target.read_text() == "old"


def test_directories_are_made_so_that_they_stay(tmp_path: Path, calls: list[str]) -> None:
    make_directory(tmp_path / "a" / "b")
    assert calls == ["sync directory"] * 2
    make_directory(tmp_path / "a" / "b")
    assert len(calls) == 2


def test_a_directory_moves_when_all_of_it_is_on_the_disk(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "new" / "sub").mkdir(parents=True)
    (tmp_path / "new" / "sub" / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").touch()
    move_directory(tmp_path / "new", tmp_path / "old")
    assert calls == ["sync file", "sync directory", "sync directory", "rename", "rename", "sync directory"]
    assert [p.name for p in (tmp_path / "old").rglob("*")] == ["sub", "file"]
    remove_directory(tmp_path / "old")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    (tmp_path / "sub" / "b.bin").write_bytes(b"abc")
    write_manifest(tmp_path, step=3)
    return tmp_path


class TestManifest:
    def test_lists_everything(self, listed: Path) -> None:
        written = json.loads((listed / MANIFEST).read_text())
        assert written["step"] == 3
        assert {name: entry["bytes"] for name, entry in written["files"].items()} == {
            "a.bin": 10,
            "sub/b.bin": 3,
        }
        assert damage(listed) is None
        (listed / "README.md").write_text("added later, by a person")
        assert damage(listed) is None

    def test_one_flipped_bit(self, listed: Path) -> None:
        content = bytearray((listed / "a.bin").read_bytes())
        content[4] ^= 1
        (listed / "a.bin").write_bytes(content)
        assert damage(listed) == "a.bin is not what was written (its SHA-256 differs)"

    def test_cut_off_and_missing(self, listed: Path) -> None:
        (listed / "a.bin").write_bytes(b"0123")
        assert damage(listed) == "a.bin has 4 bytes, 10 were written"
        (listed / "a.bin").unlink()
        assert damage(listed) == "a.bin cannot be read (No such file or directory)"

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", '{"files": []}', '{"files": {"a.bin": 3}}', '{"files": {"a.bin": {}}}']
    )
    def test_that_is_damaged_itself(self, listed: Path, text: str) -> None:
        (listed / MANIFEST).write_text(text)
        assert "manifest.json cannot be read" in str(damage(listed))
        (listed / MANIFEST).unlink()
        assert "not written to its end" in str(damage(listed))

    @pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "sub/../../a", "..\\a", "C:\\a"])
    def test_that_leads_out_of_its_directory(self, listed: Path, name: str) -> None:
        entry = {"bytes": 10, "sha256": "0" * 64}
        (listed / MANIFEST).write_text(json.dumps({"files": {name: entry}}))
        assert "manifest.json cannot be read" in str(damage(listed))
