"""Write a random Llama of any size, shard by shard: a donor for measurements that never is in memory whole.

    python tools/random_donor.py DIRECTORY [--hidden 3072] [--layers 28] [--heads 24] [--kv-heads 8] …

Weights are bfloat16, normal with standard deviation 0.02; a byte-level tokenizer lies beside them. One
layer a shard. The defaults make 3.0 billion parameters, 6.0 GB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

DEVIATION = 0.02


def main() -> None:
    """Read the options and write the donor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    sizes = {"hidden": 3072, "layers": 28, "heads": 24, "kv-heads": 8, "mlp": 8192, "vocab": 32768}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    config = LlamaConfig(
        hidden_size=chosen.hidden, num_hidden_layers=chosen.layers, num_attention_heads=chosen.heads,
        num_key_value_heads=chosen.kv_heads, intermediate_size=chosen.mlp, vocab_size=chosen.vocab,
        max_position_embeddings=8192, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        bos_token_id=256, eos_token_id=257, tie_word_embeddings=False,
    )  # fmt: skip
    print(f"{write(config, chosen.directory):,} bytes of weights in {chosen.directory}")


def write(config: LlamaConfig, directory: Path) -> int:
    """Fill a directory with a model of this configuration and a tokenizer; returns its weights' bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config)
    shards: dict[str, list[str]] = {}
    for name in skeleton.state_dict():
        parts = name.split(".")
        shards.setdefault(parts[2] if "layers" in parts else parts[-2], []).append(name)
    generator, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: skeleton.get_parameter(name).shape for name in names}
        tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return total


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # norms
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, DEVIATION, generator=generator)


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<bos>", "<eos>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


if __name__ == "__main__":
    main()
