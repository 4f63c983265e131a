"""`equipoise push`: what is uploaded and what is not, over HTTP, against a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from equipoise import HybridConfig, hybridize, record_donor
from equipoise.cli import app
from hub_server import serve
from support import tiny_model, tiny_tokenizer

ROUND_TRIP = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
import equipoise
from equipoise.cli import app
from equipoise.models.adapters import add_lora
from support import random_tokens, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

def cli(*arguments):
    done = CliRunner().invoke(app, [str(x) for x in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout

place, load = Path(sys.argv[1]), AutoModelForCausalLM.from_pretrained
tokens = random_tokens(2, 20)
logits = lambda model: model(tokens).logits
tiny_model(vocab_size=300).push_to_hub("me/donor")
with torch.no_grad():
    model = equipoise.hybridize(load("me/donor"), equipoise.HybridConfig(window=5))
    equipoise.record_donor(model, "me/donor")
    add_lora(model, rank=2, alpha=4.0, targets=["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".hybrid." in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for kind in ("delta", "full"):
        model.save_pretrained(place / kind, delta=kind == "delta")
        tiny_tokenizer().save_pretrained(place / kind)
        (place / kind / "training").mkdir()
        for other in ("notes.txt", "events.out", "training/model.safetensors", "optimizer.pt"):
            (place / kind / other).write_text("mine")
    (place / "full" / "README.md").write_text("# my own words")
    for kind in ("delta", "full"):
        done = json.loads(cli("push", place / kind, f"me/{kind}", "--private", "--json"))
        assert f"/me/{kind}/commit/" in done["url"], done
        assert done["checkpoint"] == kind
        assert torch.equal(logits(load(f"me/{kind}")), logits(model)), kind
        assert AutoTokenizer.from_pretrained(f"me/{kind}").get_vocab() == tiny_tokenizer().get_vocab()
    assert "the repository's own stays" in cli("push", place / "delta", "me/delta")
print("done")
"""


def test_push_and_load_again(tmp_path: Path) -> None:
    with serve() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", ROUND_TRIP, str(tmp_path)], capture_output=True, text=True,
            env=environment, cwd=Path(__file__).parents[2], timeout=300,
        )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["done"], done.stdout + done.stderr[-3000:]
    shared = {
        "README.md", "config.json", "generation_config.json", "lora/adapter_config.json",
        "lora/adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert set(hub.files["me/delta"]) == shared | {"hybrid.safetensors"}
    assert set(hub.files["me/full"]) == shared | {"model.safetensors"}
    assert hub.files["me/full"]["README.md"] == b"# my own words"
    card = hub.files["me/delta"]["README.md"].decode()
    assert "base_model: me/donor" in card
    assert 'from_pretrained("me/delta")' in card
    everything = b"".join(content for name in ("me/delta", "me/full") for content in hub.files[name].values())
    assert str(tmp_path).encode() not in everything


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A local donor and its hybrid, `full` and `delta`."""
    tiny_model().save_pretrained(tmp_path / "donor")
    model = hybridize(tiny_model(), HybridConfig(window=5))
    record_donor(model, str(tmp_path / "donor"))
    for kind in ("full", "delta"):
        model.save_pretrained(tmp_path / kind, delta=kind == "delta")
        tiny_tokenizer().save_pretrained(tmp_path / kind)
    return tmp_path


@pytest.fixture(autouse=True)
def nobody_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object, **kwargs: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", reached)


def push(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_a_dry_run_lists_and_uploads_nothing(local: Path) -> None:
    done = push(local / "full", "you/model", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "model.safetensors" in done.stdout
    assert "card: written now, without an audit; full checkpoint" in done.stdout
    assert "nothing was uploaded to you/model" in done.stdout
    found = json.loads(push(local / "full", "you/model", "--dry-run", "--json").stdout)
    assert found["url"] is None
    assert found["files"]["model.safetensors"] == (local / "full" / "model.safetensors").stat().st_size
    assert "README.md" in found["files"]
    assert not (local / "full" / "README.md").exists()


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_delta_of_a_local_donor_is_refused(local: Path, dry: list[str]) -> None:
    done = push(local / "delta", "you/model", *dry)
    assert done.exit_code == 2
    assert "has to name a donor on the Hub" in done.stderr
    assert "equipoise export" in done.stderr


def test_what_is_no_converted_model_is_refused(local: Path) -> None:
    plain = push(local / "donor", "you/model")
    assert (plain.exit_code, "expected a converted model, got a plain llama" in plain.stderr) == (2, True)
    absent = push(local / "nowhere", "you/model")
    assert (absent.exit_code, "expected a local directory" in absent.stderr) == (1, True)


def test_a_hub_that_does_not_take_it_is_said_in_a_sentence(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    def no_login(*args: object, **kwargs: object) -> None:
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", no_login)
    done = push(local / "full", "you/model")
    assert done.exit_code == 1
    assert "cannot write to you/model on the Hub (Token is required)" in done.stderr
    assert "hf auth login" in done.stderr
