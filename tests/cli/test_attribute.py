"""`equipoise attribute` on a tiny hybrid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from equipoise.cli import app

from .conftest import Cli

FEW = ("--documents", 3, "--context-length", 24, "--resamples", 20, "--draws", 2)


@pytest.fixture(scope="module")
def hybrid(donor: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny donor converted: two layers of four heads."""
    place = tmp_path_factory.mktemp("attribute") / "ssd"
    done = CliRunner().invoke(
        app,
        [
            "convert", str(donor), "--recipe", "ssd", "--output", str(place), "--data", str(corpus),
            "--max-steps", "2", "--set", "data.context_length=64", "--set", "hybrid.window=8",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return place


def test_attribute_writes_its_report(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    done = cli("attribute", hybrid, "--output", tmp_path / "out", *FEW)
    assert done.exit_code == 0, done.stderr
    data = json.loads((tmp_path / "out" / "attribution.json").read_text())
    assert data["model"] == "ssd"
    assert data["metric"]["documents"] == 3
    assert data["metric"]["data"].endswith("corpus.jsonl (held out)")
    assert len(data["heads"]) == 2 * 2 * 8  # few enough to be taken one by one
    assert [(game["game"], game["stopped_by"]) for game in data["shapley"]] == [
        (game, "exact") for game in ("window", "linear") for _ in range(2)
    ]
    assert data["measures"]
    assert "most in layer" in done.stdout
    assert str(tmp_path / "out" / "attribution.html") in done.stdout
    assert (tmp_path / "out" / "attribution.md").is_file()


def test_attribute_json_is_all_there_is_on_stdout(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    done = cli(
        "attribute", hybrid, "--output", tmp_path, *FEW, "--no-heads", "--games", "all, linear", "--seed", 3,
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (tmp_path / "attribution.json").read_text()
    data = json.loads(done.stdout)
    assert data["heads"] == []
    assert {game["game"] for game in data["shapley"]} == {"all", "linear"}
    assert data["seed"] == 3


def test_many_heads_are_left_out_and_that_is_said(
    cli: Cli, hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise.commands.depth.FEW_HEADS", 7)
    done = cli("attribute", hybrid, "--output", tmp_path, *FEW, "--games", "linear")
    assert done.exit_code == 0, done.stderr
    assert "8 heads: taken apart by layer only" in done.stderr
    assert json.loads((tmp_path / "attribution.json").read_text())["heads"] == []


@pytest.mark.parametrize("games", ["", "both", "window,window", "linear,nothing"])
def test_games_that_are_not_there(cli: Cli, hybrid: Path, tmp_path: Path, games: str) -> None:
    done = cli("attribute", hybrid, "--output", tmp_path, "--games", games)
    assert done.exit_code == 2
    assert "expected some of window, linear, all" in done.stderr


def test_a_plain_donor_is_refused(cli: Cli, donor: Path, tmp_path: Path) -> None:
    done = cli("attribute", donor, "--output", tmp_path)
    assert done.exit_code == 2
    assert "expected a converted model" in done.stderr
