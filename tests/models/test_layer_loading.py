"""One module's weights at a time, out of shards: the donor's, gone afterwards; damage is told by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from equipoise.config import HybridConfig
from equipoise.models.layer_loading import LayerLoader, ShardedWeights, load_skeleton
from equipoise.models.layer_running import LayerRunner
from equipoise.models.load import load_donor
from equipoise.models.storage import CheckpointError
from equipoise.models.surgery import hybridize
from support import random_tokens, tiny_model

CPU = torch.device("cpu")


def save(place: Path, name: str, shards: str = "20KB") -> str:
    tiny_model(name).to(torch.bfloat16).save_pretrained(place, max_shard_size=shards)
    return str(place)


@pytest.mark.parametrize("shards", ["20KB", "1GB"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_each_layer_is_the_donors_and_leaves_nothing(name: str, shards: str, tmp_path: Path) -> None:
    place = save(tmp_path / "donor", name, shards)
    whole = load_donor(place)
    model = load_skeleton(place)
    loader = LayerLoader(model, place, device=CPU)
    runner = LayerRunner(hybridize(model, HybridConfig(window=4, layers="all"), check=False), loader)
    expected = dict(whole.named_parameters())
    for index, prefix in enumerate(runner.layer_names):
        with runner.layer_loaded(index):
            inside = {
                n: p
                for n, p in model.named_parameters()
                if n.startswith(f"{prefix}.") and ".hybrid." not in n
            }
            assert inside
            assert all(torch.equal(p, expected[n]) and not p.requires_grad for n, p in inside.items())
            large = [
                n for n, p in model.named_parameters() if not p.is_meta and n not in inside and p.ndim > 1
            ]
            assert [n for n in large if "wpe" not in n] == []
        assert all(p.is_meta for p in model.parameters())
    for (one, buffer), (other, mine) in zip(whole.named_buffers(), model.named_buffers(), strict=True):
        assert one == other
        assert torch.equal(buffer, mine)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "cohere2", "gpt2"])
def test_embedding_layers_and_head_make_the_donors_loss(name: str, tmp_path: Path) -> None:
    """Tied heads, scaled embeddings, learned positions and capped logits included."""
    place = save(tmp_path / "donor", name)
    tokens = random_tokens(2, 12)
    labels = tokens.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        expected = load_donor(place)(tokens, labels=labels, use_cache=False).loss
    model = hybridize(load_skeleton(place), HybridConfig(window=4), check=False)
    runner = LayerRunner(model, LayerLoader(model, place, device=CPU))
    positions = torch.arange(12)[None].expand(2, -1)
    for module in model.modules():
        if hasattr(module, "mode"):
            module.mode = type(module.mode)("softmax")
    with runner.embedding_loaded(tokens) as embed:
        hidden = embed(tokens, position_ids=positions)
    for index in range(len(runner.layers)):
        with runner.layer_loaded(index):
            hidden = runner.run_layer(index, hidden, position_ids=positions)
    with runner.head_loaded() as loss:
        total, count = loss(hidden, labels)
    assert count == int((labels[:, 1:] != -100).sum())
    assert total / count == pytest.approx(float(expected), rel=1e-5)


class TestDamage:
    def test_a_shard_cut_off(self, tmp_path: Path) -> None:
        weights = ShardedWeights(save(tmp_path, "llama"))
        key = "model.layers.1.self_attn.q_proj.weight"
        shard = tmp_path / weights.files[key]
        shard.write_bytes(shard.read_bytes()[:-10])
        with (
            pytest.raises(
                CheckpointError, match=rf"{shard.name}, which holds weights of layer 1, is damaged"
            ),
            weights.opened([key], "layer 1"),
        ):
            pass

    def test_a_shard_missing(self, tmp_path: Path) -> None:
        weights = ShardedWeights(save(tmp_path, "llama"))
        key = "model.layers.1.self_attn.q_proj.weight"
        (tmp_path / weights.files[key]).unlink()
        with (
            pytest.raises(CheckpointError, match="holds weights of layer 1, found none"),
            weights.opened([key], "layer 1"),
        ):
            pass

    def test_a_tensor_missing(self, tmp_path: Path) -> None:
        place = save(tmp_path, "llama")
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
        index.write_text(json.dumps(content))
        model = load_skeleton(place)
        loader = LayerLoader(model, place, device=CPU)
        with (
            pytest.raises(CheckpointError, match=r"no weights of layer 1: model.layers.1.mlp.up_proj.weight"),
            loader.loaded(["model.layers.1"], "layer 1"),
        ):
            pass
        assert all(p.is_meta for p in model.parameters())

    @pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": {"a": "../../secret"}}'])
    def test_an_index_that_is_none(self, index: str, tmp_path: Path) -> None:
        save(tmp_path, "llama")
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=r"index of safetensors shards|names of files beside it"):
            ShardedWeights(str(tmp_path))

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="found none"):
            ShardedWeights(str(tmp_path))
