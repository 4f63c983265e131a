"""Pushing to a Hub and loading from it: over HTTP, with the real client, against a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise import ConversionError, HybridConfig, hybridize, record_donor
from hub_server import serve
from support import tiny_model

PUSH = """
import sys, torch
from pathlib import Path
import equipoise
from equipoise.layers.interface import mixers_of
from transformers import AutoModelForCausalLM
sys.path.insert(0, "tests")
from support import random_tokens, tiny_model

tokens = random_tokens(2, 20)
logits = lambda model: model(tokens).logits
load = AutoModelForCausalLM.from_pretrained
tiny_model().push_to_hub("me/donor")
local = Path(sys.argv[1])
tiny_model().save_pretrained(local)

with torch.no_grad():
    model = equipoise.hybridize(load("me/donor"), equipoise.HybridConfig(window=5))
    for mixer in mixers_of(model):
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter))
    equipoise.record_donor(model, "me/donor")
    url = model.push_to_hub("me/delta", delta=True, private=True)
    assert "/me/delta/commit/" in url, url
    assert torch.equal(logits(load("me/delta")), logits(model))
    equipoise.record_donor(model, str(local))
    model.push_to_hub("me/full")
    assert torch.equal(logits(load("me/full")), logits(model))
    model.push_to_hub("me/full")  # again: the card is there now, and is the owner's
print("done")
"""


def test_push_and_load(tmp_path: Path) -> None:
    with serve() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "local donor")], capture_output=True, text=True,
            env=environment, cwd=Path(__file__).parents[2], timeout=300,
        )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-3000:]
    delta, full = hub.files["me/delta"], hub.files["me/full"]
    assert sorted(delta) == ["README.md", "config.json", "generation_config.json", "hybrid.safetensors"]
    assert sorted(full) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    card = delta["README.md"].decode()
    assert "base_model: me/donor" in card
    assert 'from_pretrained("me/delta")' in card
    assert "Not audited" in card
    # nobody is told where on its maker's disk a donor lay
    assert str(tmp_path) not in full["config.json"].decode() + full["README.md"].decode()
    assert json.loads(full["config.json"])["equipoise"]["donor"]["name"] == "local donor"
    assert hub.requests.count("HEAD /me/full/resolve/main/README.md") == 2


def test_a_delta_of_a_local_donor_is_not_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object, **kwargs: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", reached)
    tiny_model().save_pretrained(tmp_path / "donor")
    model = hybridize(tiny_model(), HybridConfig(window=5))
    record_donor(model, str(tmp_path / "donor"))
    with pytest.raises(ConversionError, match="has to name a donor on the Hub"):
        model.push_to_hub("me/x", delta=True)
    with pytest.raises(ConversionError, match="use push_to_hub"):
        model.save_pretrained(tmp_path / "saved", delta=True, push_to_hub=True)
