"""crop: the state after it is, bit for bit, the one that never read what was taken back."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise import HybridConfig, branches, hybridize
from equipoise.layers import cache as cache_module
from equipoise.layers import rollback
from equipoise.layers.cache import CacheError, HybridCacheLayer
from equipoise.layers.mixer import HybridMixer, LayerInputs
from support import SINGLE_HEADS, normal, random_tokens, tiny_model

TOKENS = random_tokens(2, 40)
CONFIGS = {
    "convex": HybridConfig(window=5, gate="per_head"),
    "disjoint": HybridConfig(window=5, overlap=False),
    "shared": HybridConfig(window=4, mixing="shared", overlap=False, sinks=2, layout="terraced"),
    "single heads": HybridConfig(**SINGLE_HEADS),
    "linear": HybridConfig(window=None, gate="fixed"),
    "window": HybridConfig(window=5, feature_map=None, sinks=1),
}


@torch.no_grad()
def read(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(tokens, past_key_values=cache, attention_mask=mask).logits


def recording(model: Any) -> Any:
    cache = model.make_cache()
    cache.activate_past_recording()
    return cache


class Layer:
    """A converted layer by itself: its keys do not depend on how many tokens a projection took at once."""

    def __init__(self, config: HybridConfig, dtype: torch.dtype) -> None:
        self.mixer = HybridMixer(config, heads=4, kv_heads=2, head_dim=8, layer_idx=0).to(dtype)
        sizes = ((2, 4), (2, 2), (2, 2))
        self.q, self.k, self.v = (
            normal(batch, heads, 40, 8, seed=i, dtype=dtype) for i, (batch, heads) in enumerate(sizes)
        )

    def fresh(self) -> HybridCacheLayer:
        layer = HybridCacheLayer(self.mixer.mode)
        layer.activate_past_recording()
        return layer

    @torch.no_grad()
    def read(self, layer: HybridCacheLayer, start: int, stop: int, mask: Tensor | None = None) -> Tensor:
        rows = slice(start, stop)
        part = None if mask is None else mask[:, rows]
        inputs = LayerInputs(self.q[:, :, rows], self.k[:, :, rows], self.v[:, :, rows], 8**-0.5, None, part)
        return layer.attend(self.mixer, inputs)


def assert_same_bits(one: HybridCacheLayer, other: HybridCacheLayer) -> None:
    assert one.get_seq_length() == other.get_seq_length()
    assert (one.state is None) == (other.state is None)
    if one.state is None or other.state is None:
        return
    ours, theirs = one.state.tensors(), other.state.tensors()
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_cropped_states_have_the_bits_of_those_that_never_read_on(name: str, dtype: torch.dtype) -> None:
    layer = Layer(CONFIGS[name], dtype)
    for calls, count in (
        ((12, 1, 1, 1), 2),  # single tokens of a draft
        ((12, 6), 4),  # the end of a verified draft
        ((12, 6), 6),  # a whole call
        ((12, 2, 1, 1, 1), 4),  # into the middle of an earlier call
        ((3,), 2),  # within the prompt, shorter than the window
        ((12, 1), 13),  # everything
        ((20, 5), 0),
    ):
        cropped, straight = layer.fresh(), layer.fresh()
        start, keep = 0, sum(calls) - count
        for length in calls:
            layer.read(cropped, start, start + length)
            if start < keep:
                layer.read(straight, start, min(start + length, keep))
            start += length
        assert cropped.state is not None
        cropped.crop(-count)
        assert_same_bits(cropped, straight)
        straight.crop(0)
        before = copy.deepcopy(cropped)
        for at in range(keep, keep + 3):  # later steps change states in place, checkpoints never
            assert torch.equal(layer.read(cropped, at, at + 1), layer.read(straight, at, at + 1))
        assert_same_bits(cropped, straight)
        cropped.crop(-3)
        assert_same_bits(cropped, before)


def test_padding_is_read_again_as_padding() -> None:
    layer = Layer(CONFIGS["convex"], torch.float64)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :9] = False
    cropped, straight = layer.fresh(), layer.fresh()
    layer.read(cropped, 0, 20, mask)
    cropped.crop(-6)
    layer.read(straight, 0, 14, mask)
    assert_same_bits(cropped, straight)


def test_a_copy_goes_back_by_itself() -> None:
    layer = Layer(CONFIGS["convex"], torch.float64)
    cache, straight = layer.fresh(), layer.fresh()
    layer.read(cache, 0, 20)
    twin = copy.deepcopy(cache)
    layer.read(cache, 20, 30)
    twin.crop(-5)
    layer.read(straight, 0, 15)
    assert_same_bits(twin, straight)
    assert cache.get_seq_length() == 30


def test_rounds_of_drafts_end_where_plain_reading_does() -> None:
    model = hybridize(tiny_model(dtype=torch.float64), CONFIGS["shared"])
    whole = read(model, None, TOKENS)
    cache, at, outs = recording(model), 0, list[Tensor]()
    wrong = random_tokens(2, 7, seed=5)
    for accepted in (11, 1, 3, 0, 7, 2, 16):
        draft = torch.cat([TOKENS[:, at : at + accepted], wrong], 1)
        outs.append(read(model, cache, draft)[:, :accepted])
        cache.crop(-7)
        at += accepted
    assert cache.get_seq_length() == at == 40
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=1e-10)


def test_rows_selected_before_going_back() -> None:
    model = hybridize(tiny_model(dtype=torch.float64), CONFIGS["disjoint"])
    whole = read(model, None, TOKENS)
    for method, argument, rows in (
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
    ):
        cache = recording(model)
        read(model, cache, TOKENS[:, :20])
        read(model, cache, TOKENS[:, 20:25])
        getattr(cache, method)(argument)
        cache.crop(-8)
        rest = read(model, cache, TOKENS[rows, 17:])
        torch.testing.assert_close(rest, whole[rows, 17:], rtol=0, atol=1e-10)


def test_memory_is_bounded_however_long_nothing_is_cropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback, "DEPTH", 6)
    monkeypatch.setattr(cache_module, "DEPTH", 6)
    model = hybridize(tiny_model(dtype=torch.float64), CONFIGS["convex"])
    whole = read(model, None, TOKENS)
    cache, sizes = recording(model), list[int]()
    read(model, cache, TOKENS[:, :17])  # longer than what can be taken back
    assert cache.layers[0].past.length == 6
    for at in range(17, 40):
        read(model, cache, TOKENS[:, at : at + 1])
        sizes.append(cache.state_bytes())
        assert 6 <= cache.layers[0].past.length <= 12
    assert max(sizes[12:]) <= max(sizes[:12])
    cache.crop(-6)
    torch.testing.assert_close(read(model, cache, TOKENS[:, 34:]), whole[:, 34:], rtol=0, atol=1e-10)


def test_a_second_crop_reaches_behind_the_first() -> None:
    model = hybridize(tiny_model(dtype=torch.float64), CONFIGS["convex"])
    whole = read(model, None, TOKENS)
    cache = recording(model)
    read(model, cache, TOKENS[:, :20])
    cache.crop(-2)
    read(model, cache, TOKENS[:, 18:22])
    cache.crop(-9)
    assert cache.get_seq_length() == 13
    torch.testing.assert_close(read(model, cache, TOKENS[:, 13:]), whole[:, 13:], rtol=0, atol=1e-10)


def test_local_layers_go_back_too() -> None:
    model = hybridize(tiny_model("gemma3_text", dtype=torch.float64), CONFIGS["convex"])
    whole = read(model, None, TOKENS)
    cache = recording(model)
    read(model, cache, TOKENS[:, :20])
    cache.crop(-4)
    torch.testing.assert_close(read(model, cache, TOKENS[:, 16:]), whole[:, 16:], rtol=0, atol=1e-10)


def test_a_single_branch_goes_back() -> None:
    model = hybridize(tiny_model(dtype=torch.float64), CONFIGS["disjoint"])
    for state in ("window", "linear", "none", "sinks", "softmax"):
        with branches(model, state, reading="renormalised"):
            whole, cache = read(model, None, TOKENS), recording(model)
            read(model, cache, TOKENS[:, :20])
            read(model, cache, TOKENS[:, 20:25])
            cache.crop(-7)
            rest = read(model, cache, TOKENS[:, 18:])
            torch.testing.assert_close(rest, whole[:, 18:], rtol=0, atol=1e-10)


def test_what_cannot_be_taken_back_is_refused() -> None:
    model: Any = hybridize(tiny_model(), CONFIGS["convex"])
    cache = model.make_cache()
    read(model, cache, TOKENS[:, :20])
    cache.crop(0)
    with pytest.raises(CacheError, match=r"crop\(-1\) on one that does not.*activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    read(model, cache, TOKENS[:, 20:24])
    before = [t.clone() for t in cache.layers[0].state.tensors()]
    with pytest.raises(CacheError, match=r"at most 4 tokens.*got crop\(-5\)"):
        cache.crop(-5)
    with pytest.raises(CacheError, match=r"got crop\(3\): use crop\(-3\)"):
        cache.crop(3)
    assert cache.get_seq_length() == 24
    assert all(torch.equal(a, b) for a, b in zip(before, cache.layers[0].state.tensors(), strict=True))
    del model
    gc.collect()
    with pytest.raises(CacheError, match="the model this cache belongs to is gone"):
        cache.crop(-1)


def test_reset_forgets_and_goes_on_recording() -> None:
    model = hybridize(tiny_model(), CONFIGS["convex"])
    cache = recording(model)
    read(model, cache, TOKENS[:, :20])
    cache.reset()
    assert (cache.get_seq_length(), cache.state_bytes()) == (0, 0)
    read(model, cache, TOKENS[:, :6])
    cache.crop(-1)
    assert cache.get_seq_length() == 5
    cache.layers[0].record_past = False
    assert cache.layers[0].past is None
