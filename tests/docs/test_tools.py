"""What the tools made is up to date: the listing of public names, and the figures of the method."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import equipoise
from support import load_tool

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@pytest.fixture(scope="module")
def names() -> Any:
    return load_tool("public_names")


def test_listing_is_up_to_date(names: Any) -> None:
    made = names.listing()
    assert made == names.LISTING.read_text(encoding="utf-8"), (
        "public names changed; if so meant: make reference"
    )


def test_every_exported_name_is_in_the_reference(names: Any) -> None:
    shown = names.shown_names()
    assert len(shown) == len(set(shown))
    assert {f"equipoise.{name}" for name in equipoise.__all__} <= set(shown)


def test_public_names_exist_and_are_documented(names: Any) -> None:
    for name in names.shown_names():
        home, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(home), last)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert inspect.getdoc(found), f"{name} has no docstring"


def test_public_signatures_are_typed(names: Any) -> None:
    """Every parameter and every result has a type."""
    for line in names.listing().splitlines():
        match = re.fullmatch(r"\s*[\w.]+\((.*)\)( -> .*)?", line)
        if match is None or line.startswith("class "):
            continue
        assert match[2] is not None or "__init__" in line, f"no type of the result: {line}"


def test_a_changed_default_shows(names: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "src" / "equipoise" / "hybrid_config.py").read_text(encoding="utf-8")
    package = tmp_path / "src" / "equipoise"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    changed = source.replace("window: int | None = Field(default=64", "window: int | None = Field(default=65")
    assert changed != source
    (package / "hybrid_config.py").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(names, "ROOT", tmp_path)
    monkeypatch.setattr(names, "shown_names", lambda: ["equipoise.hybrid_config.HybridConfig"])
    assert "default=65" in names.listing()


@pytest.mark.slow
def test_typing_marker_is_in_the_wheel(tmp_path: Path) -> None:
    """In the wheel itself: package data is easily declared and left out all the same."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "out", "tests", "docs", "benchmarks", "*.so")
    )
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "equipoise/py.typed" in zipfile.ZipFile(wheel).namelist()


# ---- figures


def test_figures_are_up_to_date() -> None:
    """Equal but for the last digits of coordinates, which depend on the machine's arithmetic."""
    method = load_tool("method_figures")
    drawn = method.figures()
    assert {path.name for path in method.FOLDER.glob("*.svg")} == set(drawn)
    for name, svg in drawn.items():
        kept = (method.FOLDER / name).read_text(encoding="utf-8")
        assert NUMBER.sub("0", kept) == NUMBER.sub("0", svg), f"{name} changed; if so meant: make figures"
        ours, theirs = ([float(n) for n in NUMBER.findall(text)] for text in (kept, svg))
        assert ours == pytest.approx(theirs, abs=2e-3), f"{name} changed; if so meant: make figures"


def test_figures_are_shown() -> None:
    method = load_tool("method_figures")
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for path in method.FOLDER.glob("*.svg"):
        assert f"(figures/method/{path.name})" in page
