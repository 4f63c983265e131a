"""`equipoise bench` on sizes that take milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.bench import decode, gate, timing, transfer
from equipoise.bench.peers import OURS, PEERS

from .conftest import Cli

SIZES = ("--heads", 2, "--kv-heads", 2, "--head-dim", 8, "--window", 8, "--feature-dim", 16, "--rounds", 2)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUND", 1e-4)
    for module in (gate, decode, transfer):
        monkeypatch.setattr(module, "LENGTHS", (1, 9))


@pytest.mark.parametrize(
    ("theme", "against"),
    [("prefill", "sdpa,band,fla"), ("train", "sdpa,txt"), ("decode", "sdpa,concat"), ("transfer", "txt")],
)
def test_themes(theme: str, against: str, cli: Cli, tmp_path: Path) -> None:
    result = cli(
        "bench", theme, "--lengths", "32,70", "--against", against, *SIZES, "--check", "--output", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert "no bar is set" in result.stdout
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert path.name.startswith(f"{theme}-float32_")
    assert [(r["length"], r["name"]) for r in data["rows"]] == [
        (length, name) for length in (32, 70) for name in (OURS, *against.split(","))
    ]
    for entry in data["rows"]:
        if entry["name"] == "fla":
            assert "GPU" in entry["reason"]
            continue
        assert entry["seconds"] > 0
        assert len(entry["rounds"]["wall"]) == 2
        assert (entry["times_ours"] is None) == (entry["name"] == OURS)
    assert len(list(tmp_path.glob("*.svg"))) == 1


def test_bfloat16_with_maps(cli: Cli, tmp_path: Path) -> None:
    result = cli(
        "bench", "prefill", "--lengths", 20, "--against", "none", *SIZES, "--dtype", "bfloat16",
        "--features", "maps", "--output", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert next(tmp_path.glob("*.json")).name.startswith("prefill-bfloat16-maps_")


@pytest.mark.slow
def test_model(cli: Cli, tmp_path: Path) -> None:
    result = cli("bench", "model", "--lengths", 20, "--layers", 1, "--rounds", 1, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    data = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    assert [(r["measure"], r["name"]) for r in data["rows"]] == [
        (measure, name)
        for measure in ("attention", "attention", "generate", "generate", "prefill", "decode", "train")
        for name in (OURS, "sdpa")
    ]
    (found,) = data["end_to_end"]
    assert (found["length"], found["at_most"]) == (20, 1.5)
    assert found["ratio"] == pytest.approx(found["seconds_a_token"] / found["predicted"])
    assert f"{found['ratio']:.2f}x what the operators predict" in " ".join(result.stdout.split())


def test_a_failing_gate_ends_it(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = PEERS["sdpa"]  # another answer than the hybrid's
    monkeypatch.setitem(PEERS._entries, OURS, type(wrong)(wrong.about, "hybrid", wrong.build))
    result = cli("bench", "prefill", "--lengths", 32, *SIZES, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "correctness gate" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("prefill", "--lengths", "a"), "--lengths"),
        (("prefill", "--against", "sdap"), "sdpa"),
        (("prefill", "--heads", 3, "--kv-heads", 2), "multiple"),
        (("cpu", "--heads", 16), "leave other options"),
        (("speed",), "prefill"),
        (("model", "--measures", "generat"), "Did you mean"),
    ],
)
def test_wrong_usage(options: tuple[object, ...], words: str, cli: Cli, tmp_path: Path) -> None:
    result = cli("bench", *options, "--output", tmp_path)
    assert result.exit_code == 2
    assert words in result.stderr
