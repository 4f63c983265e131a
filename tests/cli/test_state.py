"""`equipoise state`: a text is read once, continued any number of times, refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from equipoise import HybridConfig, hybridize
from support import tiny_model, tiny_tokenizer

from .conftest import Cli

HALF = "the quick brown fox jumps\ndef window(size):\n    return size\n" * 10
BOOK = HALF * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Llama with its tokenizer."""
    place = tmp_path_factory.mktemp("models") / "hybrid"
    hybridize(tiny_model("llama", vocab_size=300), HybridConfig(window=8)).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    return path


def test_continues_as_if_it_had_read_the_whole(cli: Cli, model: Path, book: Path, tmp_path: Path) -> None:
    saved = cli("state", "save", model, "--file", book, "--output", tmp_path / "states")
    assert saved.exit_code == 0, saved.stderr
    state = tmp_path / "states" / "book.safetensors"
    assert f"file      {state}" in saved.stdout
    assert "read 300 tokens" in saved.stderr
    before = state.read_bytes()
    whole = cli("generate", model, BOOK + "return", "--max-new-tokens", 9)
    for _ in range(2):
        found = cli("state", "continue", model, state, "return", "--max-new-tokens", 9)
        assert found.exit_code == 0, found.stderr
        assert found.stdout == whole.stdout
        assert "went on from" in found.stderr
    told = json.loads(
        cli("state", "continue", model, state, "return", "--max-new-tokens", 9, "--json").stdout
    )
    assert told["text"] == whole.stdout.rstrip("\n")
    assert (told["prompt"], told["state_tokens"], told["new_tokens"]) == ("return", 300, 9)
    assert state.read_bytes() == before


def test_a_text_in_two_parts_is_one(cli: Cli, model: Path, tmp_path: Path) -> None:
    first, second, whole = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "whole"))
    assert cli("state", "save", model, "--text", HALF, "--output", first).exit_code == 0
    assert cli("state", "save", model, "--text", HALF, "--after", first, "--output", second).exit_code == 0
    assert cli("state", "save", model, "--file", "-", "--output", whole, stdin=BOOK).exit_code == 0
    hashes = [
        json.loads(cli("state", "show", path, "--json").stdout)["tokens_digest"] for path in (second, whole)
    ]
    assert hashes[0] == hashes[1]


def test_the_branch_state_is_the_files(cli: Cli, model: Path, book: Path, tmp_path: Path) -> None:
    state = tmp_path / "linear.safetensors"
    saved = cli("state", "save", model, "--file", book, "--branch", "linear", "--output", state)
    assert "branches  linear alone (renormalised)" in saved.stdout
    whole = cli("generate", model, BOOK + "return", "--branch", "linear", "--max-new-tokens", 9)
    found = cli("state", "continue", model, state, "return", "--max-new-tokens", 9)
    assert found.stdout == whole.stdout


def test_long_texts_come_with_a_word(cli: Cli, model: Path, tmp_path: Path) -> None:
    done = cli("state", "save", model, "--text", BOOK * 2, "--output", tmp_path / "x.safetensors")
    assert "more than the 512 positions" in done.stderr
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one text: either with --file or with --text"),
        (["--text", "a", "--file", "b"], "expected one text"),
        (["--file", "missing.txt"], "--file missing.txt: cannot be read (No such file or directory)"),
        (["--text", ""], "at least one token"),
        (["--text", "a", "--branch", "softmax"], "keeps the keys of every token"),
        (["--text", "a", "--branch", "liner"], "Did you mean 'linear'"),
        (["--text", "a", "--after", "none.safetensors"], "expected a prompt state, found no file"),
    ],
)
def test_what_cannot_be_saved(
    cli: Cli, model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    output = tmp_path / "states"
    done = cli("state", "save", model, "--output", output, *arguments)
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert not output.exists()


def test_what_does_not_fit_is_refused(cli: Cli, model: Path, donor: Path, book: Path, tmp_path: Path) -> None:
    state = tmp_path / "book.safetensors"
    cli("state", "save", model, "--file", book, "--output", state)
    other = hybridize(tiny_model("llama", vocab_size=300, seed=1), HybridConfig(window=8))
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    for name, message in ((tmp_path / "other", "with other weights"), (donor, "expected a converted model")):
        done = cli("state", "continue", name, state, "return")
        assert done.exit_code in (1, 2)
        assert message in done.stderr
    empty = cli("state", "continue", model, state, "")
    assert empty.exit_code == 2
    assert "at least one token" in empty.stderr
    state.write_bytes(state.read_bytes()[:-10])
    cut = cli("state", "show", state)
    assert cut.exit_code == 1
    assert "not a complete safetensors file" in cut.stderr


def test_interrupting_saves_nothing(
    cli: Cli, model: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **named: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr("equipoise.models.reading.read_chunks", interrupt)
    done = cli("state", "save", model, "--file", book, "--output", tmp_path / "states")
    assert done.exit_code == 130
    assert "no state was saved" in done.stderr
    assert not (tmp_path / "states").exists()


def test_help_has_an_example_per_verb(cli: Cli) -> None:
    assert "equipoise state continue" in cli("state", "--help").stdout
    for verb in ("save", "show", "continue"):
        assert f"equipoise state {verb} " in cli("state", verb, "--help").stdout
