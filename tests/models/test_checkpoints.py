"""Full and delta checkpoints: exact, complete, recognised, and refused where they do not fit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise import ConversionError, HybridConfig, hybridize, record_donor, revert
from equipoise.layers.interface import mixers_of
from equipoise.models.load import load_tokenizer
from equipoise.models.storage import MIXERS, CheckpointError, fingerprint, write_atomically
from support import random_tokens, tiny_model, tiny_tokenizer

Logits = Callable[..., Tensor]
TOKENS = random_tokens(2, 20)
load = AutoModelForCausalLM.from_pretrained


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def scramble(model: Any) -> None:
    """Move the mixers away from where they start, so that a reload that initialises them anew shows."""
    for mixer in mixers_of(model):
        for parameter in mixer.parameters():
            parameter.data.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mixers_survive_and_stay_float32(
    converted: Any, tmp_path: Path, delta: bool, dtype: torch.dtype, logits: Logits
) -> None:
    scramble(converted)
    converted.save_pretrained(tmp_path / "saved", delta=delta)
    loaded = load(tmp_path / "saved", dtype=dtype)
    for one, other in zip(mixers_of(converted), mixers_of(loaded), strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert theirs.dtype == torch.float32
            assert torch.equal(mine, theirs)
    assert loaded.dtype == dtype
    assert not loaded.training
    if dtype == torch.float32:
        assert torch.equal(logits(loaded, TOKENS), logits(converted, TOKENS))
    else:
        rough = (logits(loaded, TOKENS).float() - logits(converted, TOKENS)).abs().max()
        assert 0 < rough < 0.3


def test_missing_mixers_start_as_new_ones_not_as_noise(converted: Any, tmp_path: Path) -> None:
    converted.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    kept = {n: t for n, t in weights.items() if ".hybrid." not in n}
    save_file(kept, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    fresh = mixers_of(hybridize(tiny_model(), HybridConfig(window=5, gate="per_head")))
    for one, other in zip(mixers_of(load(tmp_path / "saved")), fresh, strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_made_from_a_configuration(converted: Any) -> None:
    again = type(converted)(converted.config)
    fresh = mixers_of(hybridize(tiny_model(), HybridConfig(window=5, gate="per_head")))
    for one, other in zip(mixers_of(again), fresh, strict=True):
        assert torch.equal(one.phi_q.weight, other.phi_q.weight)
    config = AutoConfig.for_model("equipoise_llama", num_hidden_layers=1, hidden_size=32, vocab_size=8)
    with pytest.raises(ConversionError, match="does not say how to convert"):
        type(converted)(config)


@pytest.mark.parametrize("delta", [False, True])
def test_loading_options(converted: Any, tmp_path: Path, delta: bool, logits: Logits) -> None:
    converted.save_pretrained(tmp_path / "saved", delta=delta)
    expected = logits(converted, TOKENS)
    assert torch.equal(logits(load(tmp_path / "saved", attn_implementation="eager"), TOKENS), expected)
    model, info = load(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(model, TOKENS), expected)
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", config=config), TOKENS), expected)
    assert torch.equal(logits(type(converted).from_pretrained(tmp_path / "saved"), TOKENS), expected)
    used = load(tmp_path / "saved", config=copy.deepcopy(converted.config))  # of a model in use
    for loaded in (model, used):
        assert type(revert(loaded)).__name__ == "LlamaForCausalLM"
        assert loaded.config._attn_implementation == "sdpa"


def test_state_dicts_handed_in_are_saved(converted: Any, tmp_path: Path, logits: Logits) -> None:
    weights = {n: t + 0.1 if ".hybrid." in n else t for n, t in converted.state_dict().items()}
    for delta in (False, True):
        converted.save_pretrained(tmp_path / str(delta), delta=delta, state_dict=weights)
    one, other = (mixers_of(load(tmp_path / kind))[0].phi_q.weight for kind in ("True", "False"))
    assert torch.equal(one, other)
    assert torch.equal(one, mixers_of(converted)[0].phi_q.weight + 0.1)


def test_other_processes_write_nothing(converted: Any, tmp_path: Path) -> None:
    converted.save_pretrained(tmp_path / "saved", delta=True, is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_a_delta_keeps_its_own_settings(tmp_path: Path) -> None:
    """The donor is published with attention dropout; the conversion needed it off."""
    tiny_model(attention_dropout=0.1).save_pretrained(tmp_path / "donor")
    model = load(tmp_path / "donor", attention_dropout=0.0)
    hybridize(model, HybridConfig(window=5))
    record_donor(model, str(tmp_path / "donor"))
    model.save_pretrained(tmp_path / "delta", delta=True)
    assert load(tmp_path / "delta").config.attention_dropout == 0


def test_a_delta_needs_a_known_donor(tmp_path: Path) -> None:
    model = hybridize(tiny_model(), HybridConfig(window=5))
    with pytest.raises(ConversionError, match="set the donor with record_donor"):
        model.save_pretrained(tmp_path / "delta", delta=True)
    model.save_pretrained(tmp_path / "full")


@pytest.fixture
def delta(converted: Any, tmp_path: Path) -> Path:
    converted.save_pretrained(tmp_path / "delta", delta=True)
    return tmp_path / "delta"


def test_a_missing_donor_is_named(delta: Path, donor_path: Path) -> None:
    shutil.rmtree(donor_path)
    with pytest.raises(CheckpointError, match=rf"delta of the donor {donor_path}, which is not there"):
        load(delta)


def test_a_donor_moved_along_is_found(
    delta: Path,
    donor_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted: Any,
    logits: Logits,
) -> None:
    expected = logits(converted, TOKENS)
    (tmp_path / "elsewhere").mkdir()
    for path in (delta, donor_path):
        shutil.move(path, tmp_path / "elsewhere" / path.name)
    assert torch.equal(logits(load(tmp_path / "elsewhere" / "delta"), TOKENS), expected)
    monkeypatch.chdir(tmp_path / "elsewhere" / "delta")
    assert torch.equal(logits(load("."), TOKENS), expected)


def test_a_changed_donor_is_refused(delta: Path, donor_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(donor_path)
    with pytest.raises(CheckpointError, match=rf"{donor_path} holds other weights than the donor"):
        load(delta)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_fingerprints_see_the_whole_file(tmp_path: Path, place: float) -> None:
    """A donor fine-tuned with frozen embeddings starts with the same bytes."""
    weights = torch.zeros(8 << 20, dtype=torch.uint8)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    start = int(place * len(weights))
    weights[start : start + (64 << 10)] = 1  # one small matrix
    save_file({"w": weights}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


def test_a_donor_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected the donor's \*.safetensors files, found none"):
        fingerprint(tmp_path)


def test_a_truncated_delta_is_refused(delta: Path) -> None:
    whole = (delta / MIXERS).read_bytes()
    for size in (len(whole) - 100, 4, 0):
        (delta / MIXERS).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"{MIXERS}: not a complete safetensors file"):
            load(delta)
    (delta / MIXERS).unlink()
    with pytest.raises(CheckpointError, match=rf"expected {MIXERS}, found none"):
        load(delta)


@pytest.mark.parametrize("change", [{"gate": "fixed"}, {"feature_multiple": 1}, {"layers": [0]}])
def test_mixers_of_another_configuration_are_refused(delta: Path, change: dict[str, Any]) -> None:
    edit(delta, lambda c: c["equipoise"]["hybrid"].update(change))
    with pytest.raises(CheckpointError, match=r"config.json and hybrid.safetensors are not of one save"):
        load(delta)


def test_a_delta_that_names_no_donor(delta: Path) -> None:
    edit(delta, lambda c: c["equipoise"].pop("donor"))
    with pytest.raises(CheckpointError, match="does not name its donor"):
        load(delta)


def test_writing_is_atomic(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def broken(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, broken)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_atomically(target, lambda p: p.write_text("new"))
    assert target.read_text() == "new"


@pytest.mark.parametrize("delta", [False, True])
def test_generation_settings_come_back(converted: Any, tmp_path: Path, delta: bool) -> None:
    converted.generation_config.max_new_tokens = 7
    converted.generation_config.eos_token_id = 5
    converted.save_pretrained(tmp_path / "saved", delta=delta)
    loaded = load(tmp_path / "saved").generation_config
    assert (loaded.max_new_tokens, loaded.eos_token_id) == (7, 5)


def test_a_tokenizer_is_not_made_up(tmp_path: Path) -> None:
    """transformers makes one without words for a directory that has none."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer found beside the model\. Copy tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(tiny_tokenizer())
