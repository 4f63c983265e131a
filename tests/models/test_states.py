"""Prompt states: going on from the file equals going on from memory to the last bit; nothing else loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM

from equipoise import HybridConfig, branches, describe_state, hybridize, load_state, read_prompt, save_state
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode
from equipoise.models.adapters import adapters_disabled, add_lora
from equipoise.models.reading import model_digest
from equipoise.models.states import StateError, StateMode, _digest
from support import random_tokens, tiny_model

BOOK, QUESTION = random_tokens(1, 150), random_tokens(1, 7, seed=1)


def converted_of(family: str = "llama", **settings: Any) -> Any:
    return hybridize(tiny_model(family), HybridConfig(**{"window": 8, **settings}))


@pytest.fixture
def saved(converted: Any, tmp_path: Path) -> Path:
    """The book, as the model of `converted` reads it."""
    save_state(tmp_path / "book.safetensors", read_prompt(converted, BOOK), converted)
    return tmp_path / "book.safetensors"


@pytest.mark.parametrize(
    ("family", "settings", "state"),
    [
        ("llama", {}, "both"),
        ("llama", {"sinks": 2, "layout": "terraced", "overlap": False}, "both"),
        ("llama", {"mixing": "shared", "overlap": False}, "both"),
        ("llama", {"layers": [1]}, "both"),
        ("llama", {"per_layer": {1: {"linear_heads": (1, 3), "head_windows": (8, 3)}}}, "both"),
        ("llama", {}, "linear"),
        ("llama", {}, "none"),
        ("gemma3_text", {}, "sinks"),
        ("gemma3_text", {}, "both"),
    ],
)
def test_continues_bit_by_bit(family: str, settings: dict[str, Any], state: str, tmp_path: Path) -> None:
    model = converted_of(family, **settings)
    with branches(model, state, reading="renormalised"), torch.inference_mode():
        live = read_prompt(model, BOOK, chunk=64)
        save_state(tmp_path / "book.safetensors", live, model)
        loaded = load_state(tmp_path / "book.safetensors", model)
        assert torch.equal(loaded.tokens, BOOK)
        before = loaded.cache.state_bytes()
        for tokens in (QUESTION, *QUESTION.split(1, 1)):
            mine, theirs = (model(tokens, past_key_values=s.cache).logits for s in (live, loaded))
            assert torch.equal(mine, theirs)
        assert loaded.cache.get_seq_length() == live.cache.get_seq_length() == 150 + 14
    if settings.get("layers") is None:
        assert loaded.cache.state_bytes() == live.cache.state_bytes() == before


def test_generates_as_from_the_whole_text(converted: Any, saved: Path) -> None:
    state = load_state(saved, converted)
    whole = torch.cat([BOOK, QUESTION], 1)
    expected = converted.generate(whole, max_new_tokens=12, do_sample=False)
    for _ in range(2):  # the state stays as it is
        found = converted.generate(**state.inputs(QUESTION), max_new_tokens=12, do_sample=False)
        assert torch.equal(found, expected)


def test_the_prompt_is_not_read_again(converted: Any, saved: Path) -> None:
    state, seen = load_state(saved, converted), []
    handle = converted.model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    converted.generate(**state.inputs(QUESTION), max_new_tokens=3, do_sample=False)
    handle.remove()
    assert seen == [7, 1, 1]


def test_a_state_goes_on_into_another(converted: Any, saved: Path, tmp_path: Path) -> None:
    first, second = BOOK[:, :64], BOOK[:, 64:]
    both = read_prompt(converted, second, after=read_prompt(converted, first), chunk=64)
    assert torch.equal(both.tokens, BOOK)
    described = save_state(tmp_path / "twice.safetensors", both, converted)
    assert described.tokens_digest == describe_state(saved).tokens_digest


def test_size_does_not_grow_with_the_book(converted: Any, saved: Path, tmp_path: Path) -> None:
    longer = save_state(
        tmp_path / "long.safetensors", read_prompt(converted, random_tokens(1, 1500)), converted
    )
    assert longer.state_bytes == describe_state(saved).state_bytes
    grown = (tmp_path / "long.safetensors").stat().st_size - saved.stat().st_size
    assert abs(grown - 4 * (1500 - 150)) < 64  # the ids themselves


@pytest.mark.parametrize("delta", [False, True])
def test_serves_the_model_saved_and_loaded_again(
    converted: Any, saved: Path, delta: bool, tmp_path: Path
) -> None:
    converted.save_pretrained(tmp_path / "model", delta=delta)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(load_state(saved, again).tokens, BOOK)


# ---- refused


@torch.no_grad()
def _one_weight(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


@torch.no_grad()
def _feature_map(model: Any) -> None:
    next(mixers_of(model)[1].parameters()).view(-1)[0] += 1e-3


def _setting(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}


@pytest.mark.parametrize("change", [_one_weight, _feature_map, _setting])
def test_another_model_is_refused(converted: Any, saved: Path, change: Callable[[Any], None]) -> None:
    load_state(saved, converted)
    change(converted)
    with pytest.raises(StateError, match=r"equipoise_llama with other weights or settings"):
        load_state(saved, converted)


def test_another_type_dtype_and_branch_state_are_refused(converted: Any, saved: Path) -> None:
    with pytest.raises(StateError, match=r"model of type equipoise_llama .*, got equipoise_qwen3"):
        load_state(saved, converted_of("qwen3"))
    with branches(converted, "linear"), pytest.raises(StateError, match="both, and the model is in linear"):
        load_state(saved, converted)
    with (
        branches(converted, "softmax"),
        pytest.raises(StateError, match="both, and the model is in soft"),
    ):
        load_state(saved, converted)
    with pytest.raises(StateError, match="model in float32, and this one is in bfloat16"):
        load_state(saved, converted.to(torch.bfloat16))


def test_adapters_switched_off_are_another_model(converted: Any) -> None:
    add_lora(converted, rank=2, alpha=4.0, targets=["q_proj"])
    before = model_digest(converted)
    with adapters_disabled(converted):
        assert model_digest(converted) != before
    assert model_digest(converted) == before


def test_what_has_no_constant_state_is_not_saved(converted: Any, tmp_path: Path) -> None:
    with branches(converted, "softmax"):
        state = read_prompt(converted, BOOK)
        with pytest.raises(StateError, match="keeps the keys of every token"):
            save_state(tmp_path / "x.safetensors", state, converted)
    assert not list(tmp_path.glob("*.safetensors"))


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    metadata = json.loads(_metadata(path)["equipoise"])
    change(metadata)
    save_file(load_file(path), path, {"equipoise": json.dumps(metadata)})


def test_damaged_files_are_refused(converted: Any, saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(StateError, match=r"not a complete safetensors file .*copy it again"):
            load_state(saved, converted)
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    saved.write_bytes(bytes(flipped))
    with pytest.raises(StateError, match="changed or damaged"):
        load_state(saved, converted)
    with pytest.raises(StateError, match="found no file"):
        load_state(tmp_path / "none.safetensors", converted)
    with pytest.raises(StateError, match="got a directory"):
        load_state(tmp_path, converted)


def test_changed_tokens_are_refused(converted: Any, saved: Path) -> None:
    tensors, metadata = load_file(saved), _metadata(saved)
    tensors["tokens"][0, 0] += 1
    save_file(tensors, saved, metadata)
    with pytest.raises(StateError, match="its tokens are not those it was written with"):
        load_state(saved, converted)


def forge(path: Path, change: Callable[[dict[str, torch.Tensor]], None], **described: Any) -> None:
    """Change tensors and have the file's own digests say that this is what was written."""
    tensors, metadata = load_file(path), json.loads(_metadata(path)["equipoise"])
    change(tensors)
    state = {name: tensor for name, tensor in tensors.items() if name != "tokens"}
    digests = {"state_digest": _digest(state), "tokens_digest": _digest({"tokens": tensors["tokens"]})}
    save_file(tensors, path, {"equipoise": json.dumps({**metadata, **digests, **described})})


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    def apply(tensors: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


@pytest.mark.parametrize(
    ("change", "described", "message"),
    [
        (put("layers.0.keys", lambda t: t[:, :, :3]), {}, r"layers\.0\.keys .* got .*\[1, 2, 3, 8\]"),
        (put("layers.1.linear_state", lambda t: t[..., :1]), {}, r"layers\.1\.linear_state"),
        (put("layers.0.linear_normalizer", lambda t: t.double()), {}, "expected .* float32"),
        (put("layers.0.folded", lambda t: t.expand(5)), {}, r"layers\.0\.folded"),
        (lambda t: t.pop("layers.1.values"), {}, r"expected the tensors \['layers\.1\.values'\]"),
        (lambda t: t.update({"layers.7.keys": torch.zeros(1)}), {}, r"got \['layers\.7\.keys'\]"),
        (lambda t: t.update({"x": torch.zeros(1)}), {}, r"got \['x'\]"),
        (lambda t: None, {"tokens": 3}, r"expected the tokens int32 \[1, 3\]"),
        (put("tokens", lambda t: t[0]), {}, "expected the tokens int32"),
        (put("tokens", lambda t: t + 10**6), {}, "expected tokens 0 to"),
        (put("tokens", lambda t: t[:, :0]), {"tokens": 0}, "expected the tokens int32"),
    ],
)  # fmt: skip
def test_other_tensors_under_valid_digests_are_refused(
    converted: Any, saved: Path, change: Callable[[Any], None], described: dict[str, Any], message: str
) -> None:
    forge(saved, change, **described)
    with pytest.raises(StateError, match=message):
        load_state(saved, converted)


@pytest.mark.parametrize(("layer", "length"), [(0, 5), (1, 7)])
def test_keys_of_local_layers_under_valid_digests(layer: int, length: int, tmp_path: Path) -> None:
    """A donor's own window holds its last keys: no more, and no fewer."""
    model, path = converted_of("gemma3_text"), tmp_path / "book.safetensors"
    for change in (lambda t: t[:, :, 1:], lambda t: torch.cat([t, t[:, :, :1]], 2)):
        save_state(path, read_prompt(model, BOOK), model)
        load_state(path, model)
        forge(path, put(f"layers.{layer}.keys", change))
        with pytest.raises(StateError, match=rf"layers\.{layer}\.keys float32 \[1, 2, {length}, 8\]"):
            load_state(path, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "expected version 1 of the format, got 2"),
        (lambda m: m.update(tokens="many"), r"description in its metadata is damaged \(tokens"),
        (lambda m: m.pop("model_digest"), r"damaged \(model_digest: Field required"),
    ],
)
def test_other_formats_are_refused(
    converted: Any, saved: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    _rewrite(saved, change)
    with pytest.raises(StateError, match=message):
        load_state(saved, converted)


def test_other_safetensors_files_are_refused(converted: Any, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(StateError, match="got another safetensors file"):
        load_state(tmp_path / "other.safetensors", converted)


def test_a_failed_write_leaves_the_old_file(
    converted: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr("equipoise.models.states.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_state(saved, read_prompt(converted, QUESTION), converted)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.glob("*book*")] == [saved.name]


def test_nothing_to_read_is_refused(converted: Any, saved: Path) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        read_prompt(converted, BOOK[:, :0])
    with pytest.raises(ValueError, match="at least one token"):
        load_state(saved, converted).inputs(BOOK[:, :0])


def test_tokens_waiting_beside_the_sums_are_in_the_file(converted: Any, tmp_path: Path) -> None:
    """As decoding on a GPU leaves them: added to the sums, since a slot that is free may hold anything."""
    read = read_prompt(converted, BOOK)
    layer: Any = read.cache.layers[0]
    before = layer.state.linear_state
    features, values = torch.full((1, 4, 16, 16), torch.nan), torch.full((1, 2, 16, 8), torch.nan)
    features[:, :, :3], values[:, :, :3] = 2.0, 0.5
    layer.state = replace(
        layer.state, pending=torch.tensor([3]), pending_features=features, pending_values=values
    )
    save_state(tmp_path / "book.safetensors", read, converted)
    loaded: Any = load_state(tmp_path / "book.safetensors", converted).cache.layers[0]
    assert loaded.state.pending is None
    torch.testing.assert_close(loaded.state.linear_state, before + 3)


def test_windows_measured_by_head_keep_no_state() -> None:
    with pytest.raises(StateError, match="keeps the keys of every token"):
        StateMode.of(AttentionMode("swa", head_windows=(2, 3)))
