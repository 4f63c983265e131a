"""`equipoise audit` of native hybrids, from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from typer.testing import CliRunner, Result

from equipoise.cli import app
from equipoise.config import HybridConfig
from equipoise.models.surgery import hybridize
from native_models import native_model
from support import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def libraries_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verbs silence the libraries for their whole process; other tests share this one."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two native hybrids, a plain model and a conversion, and ten documents."""
    place = tmp_path_factory.mktemp("native")
    models: dict[str, Any] = {
        "falcon": native_model("falcon_h1", vocab_size=300),
        "lfm": native_model("lfm2", vocab_size=300),
        "small": native_model("lfm2"),
        "llama": tiny_model(vocab_size=300),
        "converted": hybridize(tiny_model(vocab_size=300), HybridConfig(window=4)),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    unknown = json.loads((place / "lfm" / "config.json").read_text())
    (place / "unknown").mkdir()
    (place / "unknown" / "config.json").write_text(
        json.dumps({**unknown, "model_type": "qwen3", "layer_types": ["conv", "full_attention"] * 2})
    )
    (place / "unknown" / "model.safetensors").write_bytes((place / "lfm" / "model.safetensors").read_bytes())
    text = [json.dumps({"text": f"def window{i}(size):\n    return size + {i}\n" * 3}) for i in range(10)]
    (place / "text.jsonl").write_text("\n".join(text), encoding="utf-8")
    return place


def audit(folder: Path, output: Path, *models: str, more: tuple[object, ...] = ()) -> Result:
    arguments = [
        "audit", *(folder / model for model in models), "--output", output, "--data", folder / "text.jsonl",
        "--context-length", 16, "--max-windows", 1, "--resamples", 30, *more,
    ]  # fmt: skip
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_two_models_in_one_report(folder: Path, tmp_path: Path) -> None:
    done = audit(folder, tmp_path / "out", "falcon", "lfm")
    assert done.exit_code == 0, done.stderr
    content = json.loads((tmp_path / "out" / "native.json").read_text())
    assert [model["model_type"] for model in content["models"]] == ["falcon_h1", "lfm2"]
    for model in content["models"]:
        assert model["metric"] | {"text_sha256": ""} == {
            "name": "nll", "unit": "nats/token", "documents": 8, "tokens": 8 * 15, "context_length": 16,
            "bootstrap_resamples": 30, "data": str(folder / "text.jsonl"), "text_sha256": "",
        }  # fmt: skip
        assert (model["calibration"]["documents"], model["calibration"]["held_out"]) == (2, True)
        assert f"What zeroing means in {model['model_type']}: {model['meaning']}" in done.stdout
    for words in ("falcon: ", "lfm: ", "side by side", str(tmp_path / "out" / "native.html")):
        assert words in done.stdout
    assert "8 documents, 8 contexts of up to 16 tokens" in done.stderr
    assert not (tmp_path / "out" / "audit.json").exists()


def test_json_is_all_there_is_on_stdout(folder: Path, tmp_path: Path) -> None:
    done = audit(folder, tmp_path / "out", "falcon", more=("--json",))
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (tmp_path / "out" / "native.json").read_text()
    assert "native.html" in done.stderr


@pytest.mark.parametrize(
    ("models", "code", "words"),
    [
        (("falcon", "converted"), 2, ("not both in one report", "falcon: ships as a hybrid", "on its own")),
        (("llama", "lfm"), 2, ("not both in one report", "llama: converted, or plain")),
        (
            ("llama",),
            2,
            ("expected a converted model", "plain llama", "ships with transformers", "falcon_h1"),
        ),
        (("unknown",), 2, ("mixers are known here", "falcon_h1", "got 'qwen3'", "type conv")),
        (("falcon", "falcon"), 2, ("one of them twice",)),
        (("small",), 1, ("below the vocabulary's size 64", "own tokenizer")),
    ],
    ids=["converted", "plain beside", "plain", "unknown", "twice", "vocabulary"],
)
def test_refusals(
    folder: Path, tmp_path: Path, models: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    done = audit(folder, tmp_path / "out", *models)
    assert done.exit_code == code, done.output
    message = " ".join(done.stderr.split())
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_context_longer_than_the_models(folder: Path, tmp_path: Path) -> None:
    done = audit(folder, tmp_path / "out", "falcon", more=("--context-length", 999))
    assert done.exit_code == 2
    assert "at most 256" in done.stderr
