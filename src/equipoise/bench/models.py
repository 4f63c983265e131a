"""Whole models: a hybrid Llama of random weights against the same one through transformers' own sdpa."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from equipoise.bench.end_to_end import attention_rows, generate_rows
from equipoise.bench.gate import compare
from equipoise.bench.peers import OURS
from equipoise.bench.results import Row
from equipoise.bench.setting import BenchSetting, Call
from equipoise.bench.timing import Contestant, race

Shape = Literal["small", "1b", "8b"]
NAMES = {OURS: "the converted model", "sdpa": "the donor through transformers' sdpa"}


@dataclass(frozen=True)
class Sizes:
    """hidden, intermediate, layers, heads, kv_heads, vocabulary of a Llama with heads of 64 or 128."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES: dict[Shape, Sizes] = {
    "small": Sizes(512, 1376, 4, 8, 8, 8192),
    "1b": Sizes(2048, 8192, 16, 32, 8, 128256),
    "8b": Sizes(4096, 14336, 32, 32, 8, 128256),
}
"""small is for a CPU; 1b and 8b are Llama 3.2 1B's and Llama 3 8B's."""
MEASURES = ("prefill", "decode", "generate", "train")
"""What can be measured; generate comes with one layer's attention, and so with a prediction."""
_DECODED = 16
"""Tokens decoded in one timed call."""


def build(setting: BenchSetting, shape: Shape, layers: int | None) -> dict[str, Any]:
    """The two models, sharing nothing; the hybrid has Hedgehog maps as initialised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from equipoise.config import HybridConfig
    from equipoise.models.surgery import hybridize

    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=layers or sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, max_position_embeddings=131072,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    models: dict[str, Any] = {}
    for name in NAMES:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        model = model.to(setting.device, setting.torch_dtype).eval()
        if name == OURS:
            map_heads = setting.map_heads
            hybrid = HybridConfig(window=setting.window, map_heads=map_heads)
            model = hybridize(model, hybrid, check=False)
        models[name] = model
    return models


def check(models: dict[str, Any], setting: BenchSetting) -> list[str]:
    """Check that prefill and decoding give what one forward pass over everything gives.

    Raises:
        GateError: they do not.
    """
    tokens = _tokens(models[OURS], 131)
    tolerance = 2e-3 if setting.dtype == "float32" else 1e-1
    for name, model in models.items():
        with torch.no_grad():
            whole = model(tokens, use_cache=False).logits[:, -3:]
            cache = _cache(model, name)
            model(tokens[:, :-3], past_key_values=cache, use_cache=True, logits_to_keep=1)
            parts = [
                model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True).logits
                for at in range(tokens.shape[1] - 3, tokens.shape[1])
            ]
        compare(f"decoding by {name} after 128 tokens", torch.cat(parts, 1), whole.double(), tolerance)
    return ["logits of three tokens decoded after 128 against one pass over all"]


def _tokens(model: Any, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, model.config.vocab_size, (1, length), generator=generator).to(model.device)


def _cache(model: Any, name: str) -> Any:
    from transformers.cache_utils import DynamicCache

    return model.make_cache() if name == OURS else DynamicCache(config=model.config)


def measure(
    setting: BenchSetting, lengths: Sequence[int], models: dict[str, Any], measures: Sequence[str], *,
    rounds: int, budget: float, told: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Time to the first token, decoding, generating and a training step of each model at each length."""
    rows: list[Row] = []
    if "generate" in measures:
        options: dict[str, Any] = {"rounds": rounds, "budget": budget, "told": told}
        rows += attention_rows(setting, lengths, models, **options)
        rows += generate_rows(setting, lengths, models, _cache, _tokens, **options)
    known: tuple[tuple[str, Callable[[Any, str, int], tuple[Call, int | None]], int | None], ...] = (
        ("prefill", _prefill, None), ("decode", _decode, _DECODED), ("train", _train, None),
    )  # fmt: skip
    for measure_name, prepare, tokens in (one for one in known if one[0] in measures):
        for length in sorted(lengths):
            told(f"model {measure_name}, {length:,} tokens")
            prepared: dict[str, tuple[Call, int | None]] = {}
            with torch.set_grad_enabled(measure_name == "train"):
                for name, model in models.items():
                    prepared[name] = prepare(model, name, length)
                contestants = [
                    Contestant(name=name, prepare=_given(call), held=held)
                    for name, (call, held) in prepared.items()
                ]
                times = race(contestants, rounds=rounds, budget=budget, device=setting.device)
            rows += [
                Row(measure=measure_name, length=length, name=one.name, times=times[one.name], held=one.held,
                    tokens=tokens or length)
                for one in contestants
            ]  # fmt: skip
    return rows


def _given(call: Call) -> Callable[[], Call]:
    return lambda: call


def _prefill(model: Any, name: str, length: int) -> tuple[Call, int | None]:
    """Up to the logits that the first new token is drawn from."""
    tokens = _tokens(model, length)

    def call() -> object:
        out = model(tokens, past_key_values=_cache(model, name), use_cache=True, logits_to_keep=1)
        return out.logits

    return call, None


def _decode(model: Any, name: str, length: int) -> tuple[Call, int | None]:
    """Further tokens, one by one, after a context that was read before; the donor's cache is cut back."""
    tokens, cache = _tokens(model, length), _cache(model, name)
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = cache.state_bytes() if name == OURS else 2 * sum(layer.keys.nbytes for layer in cache.layers)

    def call() -> object:
        logits = tokens
        for at in range(_DECODED):
            out = model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            logits = out.logits
        if name != OURS:
            cache.crop(-_DECODED)
        return logits

    return call, held


def _train(model: Any, name: str, length: int) -> tuple[Call, int | None]:
    """Next-token loss and gradients of all parameters."""
    tokens = _tokens(model, length)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def call() -> object:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        return loss, torch.autograd.grad(loss, parameters, allow_unused=True)

    return call, None
