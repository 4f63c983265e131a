"""The command line in this process, a tiny donor on disk, and a small text to train on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import transformers
from typer.testing import CliRunner, Result

from equipoise.cli import app
from support import tiny_model, tiny_tokenizer

Cli = Callable[..., Result]

SMALL = ("data.context_length=64", "hybrid.window=8")
"""Settings that make a run of any recipe with a hybrid tiny."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def libraries_as_before() -> Iterator[None]:
    """Verbs silence the libraries for their whole process; other tests share this one."""
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def cli() -> Cli:
    """Run a command line; gives exit code, stdout and stderr."""

    def run(*arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return run


@pytest.fixture(scope="session")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with its tokenizer."""
    place = tmp_path_factory.mktemp("donors") / "donor"
    tiny_model("llama", vocab_size=300).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 short documents as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    lines = (json.dumps({"text": f"def window{i}(size):\n    return size + {i}\n" * 4}) for i in range(40))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def convert(cli: Cli, donor: Path, corpus: Path, tmp_path: Path) -> Cli:
    """`equipoise convert` of the tiny donor into tmp_path/out in a few steps; options can be overridden."""

    def run(
        recipe: str, *more: object, source: Path = donor, data: Path = corpus, output: Path | None = None
    ) -> Result:
        settings = SMALL if recipe not in ("lora-only", "t2r", "hedgehog") else SMALL[:1]
        if recipe == "equipoise":  # a window of 8 in two layers pays for little
            settings = (
                *settings,
                "allocation.smallest_window=2",
                "allocation.rows=2",
                "hybrid.feature_multiple=1",
            )
        return cli(
            "convert", source, "--recipe", recipe, "--output", output or tmp_path / "out", "--data", data,
            "--max-steps", 2, *(part for setting in settings for part in ("--set", setting)), *more,
        )  # fmt: skip

    return run
