"""Who the hybrid operator is measured against: a whole sequence in, attention outputs out.

A builder makes what does not belong to the timed call (masks, compiled code) and returns the call. Shapes
follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from equipoise.bench.setting import BenchSetting, Inputs, UnavailableError
from equipoise.ops import hybrid_attention
from equipoise.ops.delta_kernels import fla_module
from equipoise.ops.mix import divide
from equipoise.registry import Registry

GATE = 0.5
OURS = "equipoise"
Answer = Literal["hybrid", "softmax", "window"]
Build = Callable[[BenchSetting, Inputs], Callable[[], Tensor]]


@dataclass(frozen=True)
class Peer:
    """A way to compute attention.

    Attributes:
        about: what it is, for the page.
        answer: what it computes, and so what it has to equal: the hybrid, full causal softmax, or the
            window's softmax alone.
        build: makes the call.
        bytes_at: memory it needs at a length at least, so that it is not started where that is missing.
    """

    about: str
    answer: Answer
    build: Build
    bytes_at: Callable[[BenchSetting, int], int] = lambda setting, length: 0


PEERS: Registry[Peer] = Registry("peer")


def _register(
    name: str, about: str, answer: Answer, bytes_at: Callable[[BenchSetting, int], int] | None = None
) -> Callable[[Build], Build]:
    def file(build: Build) -> Build:
        PEERS.register(name)(Peer(about, answer, build, bytes_at or (lambda setting, length: 0)))
        return build

    return file


def _square(setting: BenchSetting, length: int) -> int:
    return setting.batch * setting.heads * length * length


@_register(OURS, "equipoise.ops.hybrid_attention", "hybrid")
def _ours(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
    return lambda: hybrid_attention(x.q, x.k, x.v, x.phi_q, x.phi_k, window=setting.window, gate=GATE)[0]


@_register("sdpa", "torch's scaled_dot_product_attention, full and causal", "softmax")
def _sdpa(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
    grouped = setting.heads != setting.kv_heads
    return lambda: scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=grouped)


def _band_bytes(setting: BenchSetting, length: int) -> int:
    return length * length * (setting.element + 1)


@_register("band", "torch's scaled_dot_product_attention with an additive band mask", "window", _band_bytes)
def _band(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
    seen = band_mask(x.q.shape[2], setting)
    mask = torch.zeros(seen.shape, dtype=x.q.dtype, device=x.q.device).masked_fill_(~seen, -torch.inf)
    del seen
    grouped = setting.heads != setting.kv_heads
    return lambda: scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=mask, enable_gqa=grouped)


def band_mask(length: int, setting: BenchSetting) -> Tensor:
    """[T, T], True for the window's keys."""
    i = torch.arange(length, device=setting.device, dtype=torch.int32)
    return (i[None] <= i[:, None]) & (i[None] > i[:, None] - setting.window)


@_register("flex", "torch's flex_attention, compiled, with a block mask of the window", "window")
def _flex(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
    if x.q.requires_grad and setting.device == "cpu":
        raise UnavailableError("flex_attention has no backward on CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - setting.window)

    length, grouped = x.q.shape[2], setting.heads != setting.kv_heads
    try:
        mask = create_block_mask(near, None, None, length, length, device=setting.device)
        compiled: Any = torch.compile(flex_attention)
        compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=grouped)
    except Exception as error:  # whatever the compiler, or the one it calls, stumbles over
        reason = str(error).strip().splitlines() or [""]
        raise UnavailableError(f"torch.compile failed: {type(error).__name__}: {reason[0][:200]}") from error
    return lambda: compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=grouped)


@_register("fla", "flash-linear-attention's chunk_linear_attn, a window by SDPA, and their mix", "hybrid")
def _fla(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
    if setting.device != "cuda":
        raise UnavailableError("flash-linear-attention runs on GPUs only")
    ops, reason = fla_module("fla.ops.linear_attn")
    if reason:
        raise UnavailableError(reason)
    groups = setting.heads // setting.kv_heads

    def call() -> Tensor:
        phi_q, phi_k = x.features()
        phi_k = phi_k.repeat_interleave(setting.heads // phi_k.shape[1], 1)
        values = x.v.repeat_interleave(groups, 1)
        turned = (t.transpose(1, 2).to(x.q.dtype) for t in (phi_q, phi_k, values))
        linear = ops.chunk_linear_attn(*turned, scale=1.0, normalize=True)[0].transpose(1, 2)
        return torch.lerp(linear, local_softmax(setting, x), GATE)

    return call


@_register("composed", "chunked linear attention and windowed SDPA in batched torch, mixed", "hybrid")
def _composed(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
    def call() -> Tensor:
        phi_q, phi_k = (t.to(torch.float32) for t in x.features())
        linear = batched_linear(phi_q, phi_k, x.v.float())
        return torch.lerp(linear.to(x.q.dtype), local_softmax(setting, x), GATE)

    return call


def batched_linear(phi_q: Tensor, phi_k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """Causal linear attention of all chunks at once [B, H, T, E]: sums of chunks, accumulated."""
    batch, heads, length, size = phi_q.shape
    phi_k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (phi_k, v))
    missing = -length % chunk
    phi_q, phi_k, v = (
        pad(t, (0, 0, 0, missing)).view(batch, heads, -1, chunk, t.shape[-1]) for t in (phi_q, phi_k, v)
    )
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column sums the weights
    sums = (phi_k.mT @ values).cumsum(2)
    before = torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], 2)
    near = (phi_q @ phi_k.mT).tril() @ values
    both = (near + phi_q @ before).view(batch, heads, length + missing, -1)[:, :, :length]
    return divide(both[..., :-1], both[..., -1:])


def local_softmax(setting: BenchSetting, x: Inputs) -> Tensor:
    """The window's softmax by SDPA on blocks of w queries and the 2 w keys they may see [B, H, T, E]."""
    window, groups = setting.window, setting.heads // setting.kv_heads
    k, v = (t.repeat_interleave(groups, 1) for t in (x.k, x.v))
    batch, heads, length, size = x.q.shape
    missing = -length % window
    q, k, v = (pad(t, (0, 0, 0, missing)).view(batch, heads, -1, window, t.shape[-1]) for t in (x.q, k, v))
    k, v = (torch.cat([pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], 3) for t in (k, v))
    i = torch.arange(window, device=q.device)[:, None] + window
    j = torch.arange(2 * window, device=q.device)[None]
    seen = (j <= i) & (j > i - window)
    first = seen & (j >= window)  # the first block has none before it
    blocks = q.shape[2]
    mask = torch.cat([first[None], seen[None].expand(blocks - 1, -1, -1)])
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(batch, heads, length + missing, -1)[:, :, :length]


def _txt_bytes(setting: BenchSetting, length: int) -> int:
    return 5 * 4 * _square(setting, length)


@_register("txt", "the hybrid over T x T matrices, as LoLCATs codes it for training", "hybrid", _txt_bytes)
def _txt(setting: BenchSetting, x: Inputs) -> Callable[[], Tensor]:
    near = band_mask(x.q.shape[2], setting)
    groups = setting.heads // setting.kv_heads

    def call() -> Tensor:
        k, v = (t.repeat_interleave(groups, 1) for t in (x.k, x.v))
        phi_q, phi_k = (t.to(torch.float32) for t in x.features())
        phi_k = phi_k.repeat_interleave(setting.heads // phi_k.shape[1], 1)
        scores = (x.q @ k.mT).float() * setting.head_dim**-0.5
        softmax = scores.masked_fill(~near, -torch.inf).softmax(-1)
        weights = (phi_q @ phi_k.mT).tril()
        window, linear = softmax @ v.float(), divide(weights @ v.float(), weights.sum(-1, keepdim=True))
        return torch.lerp(linear, window, GATE).to(x.q.dtype)

    return call
