"""What a benchmark runs on: sizes, dtype, device, and the tensors made for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from equipoise.layers.feature_maps import FEATURE_MAPS, FeatureMap

Theme = Literal["prefill", "decode", "train", "transfer", "model"]
THEMES: tuple[Theme, ...] = ("prefill", "decode", "train", "transfer", "model")
Call = Callable[[], object]
"""One timed call, without arguments; returns the tensors that stay after it."""


class BenchError(RuntimeError):
    """A benchmark that cannot run, or whose operators are wrong."""


class UnavailableError(RuntimeError):
    """A contestant that cannot run here; the message is the reason that the results show."""


@dataclass(frozen=True, kw_only=True)
class BenchSetting:
    """The sizes of one layer and where it runs.

    Attributes:
        dtype: of q, k, v and of features given as tensors.
        device: ``cpu`` or ``cuda``.
        threads: torch's threads on CPU.
        batch, heads, kv_heads, head_dim: B, H, N, D.
        window, feature_dim: w, F.
        features: whether features come as tensors (``mapped``) or as Hedgehog maps that the call applies
            (``maps``).
        map_heads: whether phi(k) has a head per query head or per key/value head.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    window: int = 64
    feature_dim: int = 128
    features: Literal["mapped", "maps"] = "mapped"
    map_heads: Literal["query", "key_value"] = "query"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise BenchError(
                f"expected heads to be a multiple of kv-heads, got {self.heads} and {self.kv_heads}."
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BenchError("device cuda: torch finds no GPU here; use --device cpu.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def element(self) -> int:
        """Bytes of one number."""
        return self.torch_dtype.itemsize

    def for_gate(self) -> BenchSetting:
        """The same with few heads, for the reference is slow; grouping and dtype stay."""
        groups = self.heads // self.kv_heads
        kv_heads = min(self.kv_heads, 2)
        return replace(self, heads=groups * kv_heads, kv_heads=kv_heads)


@dataclass(frozen=True)
class Inputs:
    """q [B, H, T, D], k and v [B, N, T, D], and the features or maps of both."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | FeatureMap
    phi_k: Tensor | FeatureMap

    def features(self) -> tuple[Tensor, Tensor]:
        """phi(q) [B, H, T, F] and phi(k) [B, M, T, F] as tensors."""
        return _features(self.phi_q, self.q), _features(self.phi_k, self.k)

    def leaves(self) -> list[Tensor]:
        """What a training step differentiates: q, k, v, and features or the maps' weights."""
        maps = [phi if isinstance(phi, Tensor) else phi.weight for phi in (self.phi_q, self.phi_k)]
        return [self.q, self.k, self.v, *maps]

    def requires_grad(self) -> Inputs:
        """The same, cut from any graph, as leaves."""
        for leaf in self.leaves():
            leaf.requires_grad_()
        return self

    def part(self, rows: slice) -> Inputs:
        """Some of the tokens; maps stay."""
        cut = [t[:, :, rows] if isinstance(t, Tensor) else t for t in (self.phi_q, self.phi_k)]
        return Inputs(self.q[:, :, rows], self.k[:, :, rows], self.v[:, :, rows], *cut)


def _features(phi: Tensor | FeatureMap, tokens: Tensor) -> Tensor:
    return phi if isinstance(phi, Tensor) else phi(tokens.float())


def make_inputs(setting: BenchSetting, length: int, *, seed: int = 0) -> Inputs:
    """Random tensors of a setting: standard normal q, k, v, softmax features of random projections."""
    generator = torch.Generator().manual_seed(seed)
    dtype, device, size = setting.torch_dtype, setting.device, setting.head_dim

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(setting.batch, heads, length, width, generator=generator).to(device, dtype)

    q, k, v = normal(setting.heads, size), normal(setting.kv_heads, size), normal(setting.kv_heads, size)
    heads = setting.heads, setting.heads if setting.map_heads == "query" else setting.kv_heads
    if setting.features == "maps":
        phi_q, phi_k = (_map(setting, count, generator) for count in heads)
    else:
        phi_q, phi_k = (normal(count, setting.feature_dim).softmax(-1) for count in heads)
    return Inputs(q, k, v, phi_q, phi_k)


def _map(setting: BenchSetting, heads: int, generator: torch.Generator) -> FeatureMap:
    phi = FEATURE_MAPS["hedgehog"](heads, setting.head_dim, setting.feature_dim)
    phi.reset_parameters(generator)
    return phi.to(setting.device)
