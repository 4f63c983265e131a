"""The definitions, spelled out: quadratic masks and a token-by-token loop. Slow on purpose; they run in
float64.

Everything faster in equipoise is tested against these, so they share no code with it.
Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equipoise.ops.types import Branches, Layout


def _positions(valid: list[bool], segments: list[int]) -> tuple[list[int], list[int]]:
    """(rank, offset) of one row's tokens: real tokens before it and distance from the first, per segment."""
    ranks, offsets = [], []
    rank, first, previous = 0, 0, None
    for t, (real, segment) in enumerate(zip(valid, segments, strict=True)):
        if segment != previous:
            rank, first, previous = 0, t, segment
        if rank == 0:
            first = t
        ranks.append(rank)
        offsets.append(t - first)
        rank += int(real)
    return ranks, offsets


def visible_keys(
    length: int,
    *,
    window: int | None,
    layout: Layout,
    sinks: int,
    valid: list[bool],
    segments: list[int],
) -> tuple[Tensor, Tensor]:
    """(causal, window) masks [T, T] of one row, by the definitions of `hybrid_attention`."""
    ranks, offsets = (torch.tensor(x) for x in _positions(valid, segments))
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    segment = torch.tensor(segments)
    causal = (j <= i) & torch.tensor(valid)[None] & (segment[:, None] == segment[None])
    if window is None:
        return causal, torch.zeros_like(causal)
    if layout == "terraced":
        near = offsets[:, None] // window - offsets[None] // window <= 1
    else:
        near = i - j < window
    near = causal & (near | (ranks < sinks)[None])
    return causal, near


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def _row_flag(flag: bool | Tensor, row: int, head: int) -> bool:
    if isinstance(flag, bool):
        return flag
    return bool(flag[row] if flag.ndim == 1 else flag[row, head])


def hybrid_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    *,
    window: int | None,
    layout: Layout = "sliding",
    mixing: str = "convex",
    gate: float | Tensor = 0.5,
    overlap: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    branches: Branches | None = None,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Quadratic hybrid attention [B, H, T, E].

    Arguments as in `equipoise.ops.hybrid_attention`, features as tensors. What stands in padding counts as
    0, and its output is 0.
    """
    if key_mask is not None:
        absent = ~key_mask[:, None, :, None]
        q, k, v = (t.masked_fill(absent, 0) for t in (q, k, v))
        phi_q, phi_k = (None if t is None else t.masked_fill(absent, 0) for t in (phi_q, phi_k))
    batch, heads, length, size = q.shape
    branches = branches or Branches()
    factor = size**-0.5 if scale is None else scale
    gates = torch.as_tensor(gate, dtype=q.dtype, device=q.device).expand(batch, heads, length)
    out = []
    for b in range(batch):
        valid = [True] * length if key_mask is None else key_mask[b].tolist()
        segments = [0] * length if segment_ids is None else segment_ids[b].tolist()
        causal, near = visible_keys(
            length, window=window, layout=layout, sinks=sinks, valid=valid, segments=segments
        )
        causal, near = causal.to(q.device), near.to(q.device)
        for h in range(heads):
            key, value = k[b, h * k.shape[1] // heads], v[b, h * v.shape[1] // heads]
            scores = q[b, h] @ key.T * factor
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            products = torch.zeros_like(scores)
            if phi_q is not None and phi_k is not None:
                products = phi_q[b, h] @ phi_k[b, h * phi_k.shape[1] // heads].T
            flags = (
                _row_flag(branches.window, b, h) and window is not None,
                _row_flag(branches.linear, b, h) and phi_k is not None,
            )
            alone = branches.reading == "renormalised" or window is None or phi_k is None
            far = causal if overlap or window is None else causal & ~near
            sink = None if sink_logits is None else sink_logits[h].to(scores.dtype)
            out.append(
                _mixed(scores, products, value, causal, near, far, gates[b, h], mixing, flags, alone, sink)
            )
    result = torch.stack(out).view(batch, heads, length, -1)
    return result if key_mask is None else result.masked_fill(~key_mask[:, None, :, None], 0)


def _mixed(
    scores: Tensor, products: Tensor, value: Tensor, causal: Tensor, near: Tensor, far: Tensor,
    gate: Tensor, mixing: str, flags: tuple[bool, bool], alone: bool, sink: Tensor | None,
) -> Tensor:  # fmt: skip
    """One head's output [T, E] from its [T, T] scores, products of features and masks."""
    top = scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(near.any(-1, keepdim=True), top, 0.0)
    if sink is not None:
        top = torch.where(near.any(-1, keepdim=True), torch.maximum(top, sink), sink)
    exponentials = torch.where(near, scores - top, -torch.inf).exp()
    mass = exponentials.sum(-1, keepdim=True)
    if sink is not None:
        mass = mass + (sink - top).exp()
    softmax = _ratio(exponentials @ value, mass)
    if alone and flags == (True, False):
        return softmax
    if alone and flags == (False, True):
        weights = products * causal
        return _ratio(weights @ value, weights.sum(-1, keepdim=True))
    weights, gate = products * far, gate[:, None]
    if mixing == "convex":
        gate = torch.where(far.any(-1, keepdim=True), gate, 1.0)
        terms = gate * softmax, (1 - gate) * _ratio(weights @ value, weights.sum(-1, keepdim=True))
    elif mixing == "calibrated":
        weights = weights * (gate - top).exp()  # on the scale of the window's exponentials
        total = mass + weights.sum(-1, keepdim=True)
        terms = _ratio(exponentials @ value, total), _ratio(weights @ value, total)
    else:
        total = gate * mass + weights.sum(-1, keepdim=True)
        terms = _ratio(gate * exponentials @ value, total), _ratio(weights @ value, total)
    return terms[0] * flags[0] + terms[1] * flags[1]


def linear_attention_recurrent(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Linear attention one token at a time, [B, H, T, F] and [B, H, T, E] -> ([B, H, T, E], (S, z)).

    S_t = S_{t-1} + phi(k_t) v_t^T, z_t = z_{t-1} + phi(k_t), o_t = phi(q_t)^T S_t / phi(q_t)^T z_t
    (arXiv 2006.16236, equations 16-20).
    """
    batch, heads, length, size = phi_q.shape
    sums = phi_q.new_zeros(batch, heads, size, v.shape[-1]) if state is None else state[0]
    normalizer = phi_q.new_zeros(batch, heads, size) if state is None else state[1]
    out = []
    for t in range(length):
        sums = sums + phi_k[:, :, t, :, None] * v[:, :, t, None, :]
        normalizer = normalizer + phi_k[:, :, t]
        weight = (phi_q[:, :, t] * normalizer).sum(-1, keepdim=True)
        out.append(_ratio((phi_q[:, :, t, :, None] * sums).sum(-2), weight))
    return torch.stack(out, 2), (sums, normalizer)


def window_attention_recurrent(q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int = 0) -> Tensor:
    """Softmax over the last ``window`` tokens and the first ``sinks``, one token at a time (equal heads)."""
    out = []
    for t in range(q.shape[2]):
        seen = sorted(set(range(max(0, t - window + 1), t + 1)) | set(range(min(sinks, t + 1))))
        scores = (k[:, :, seen] * q[:, :, t, None]).sum(-1) * q.shape[-1] ** -0.5
        out.append((scores.softmax(-1)[..., None] * v[:, :, seen]).sum(2))
    return torch.stack(out, 2)


def hybrid_attention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, *,
    window: int, mixing: str = "convex", gate: float | Tensor = 0.5, overlap: bool = True, sinks: int = 0,
) -> Tensor:  # fmt: skip
    """Hybrid attention as it decodes, one token at a time: a list of keys in the window, and (S, z).

    A key joins (S, z) at once with ``overlap``, else when it leaves the window; disjoint sinks never do.
    Sliding window of at least 1, equal heads, no padding, both branches.

    Args:
        q, k, v: [B, H, T, D], [B, H, T, D], [B, H, T, E]; any dtype, computed in float64.
        phi_q, phi_k: features [B, H, T, F].
        gate: g of ``convex``, gamma of ``shared``; broadcasts to [B, H, T].

    Returns:
        [B, H, T, E] in float64.

    Source: arXiv 2510.05901 section 2 (convex), arXiv 2410.10254 (shared), arXiv 2006.16236 (S, z).
    """
    q, k, v, phi_q, phi_k = (t.double() for t in (q, k, v, phi_q, phi_k))
    batch, heads, length, size = q.shape
    gates = torch.as_tensor(gate, dtype=q.dtype, device=q.device).expand(batch, heads, length)[..., None]
    sums = q.new_zeros(batch, heads, phi_k.shape[-1], v.shape[-1])
    normalizer = q.new_zeros(batch, heads, phi_k.shape[-1])
    held: list[int] = []
    folded, out = 0, []
    for t in range(length):
        held.append(t)
        leaving = [j for j in held if t - j >= window and j >= sinks]
        held = [j for j in held if j not in leaving]
        for j in [t] if overlap else leaving:
            sums = sums + phi_k[:, :, j, :, None] * v[:, :, j, None, :]
            normalizer = normalizer + phi_k[:, :, j]
            folded += 1
        scores = (k[:, :, held] * q[:, :, t, None]).sum(-1) * size**-0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        near, near_total = (weights[..., None] * v[:, :, held]).sum(2), weights.sum(-1, keepdim=True)
        far = (phi_q[:, :, t, :, None] * sums).sum(2)
        far_total = (phi_q[:, :, t] * normalizer).sum(-1, keepdim=True)
        g = gates[:, :, t]
        if mixing == "shared":
            out.append((g * near + far) / (g * near_total + far_total))
        elif folded == 0:
            out.append(near / near_total)
        else:
            out.append(g * near / near_total + (1 - g) * _ratio(far, far_total))
    return torch.stack(out, 2)


def donor_softmax_reference(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(softmax weights [B, H, T, T], pairs they may cover [B, 1, T, T]); rows of padding see nothing."""
    batch, length = q.shape[0], q.shape[2]
    masks: list[Tensor] = []
    for b in range(batch):
        real = torch.ones(length, dtype=torch.bool) if key_mask is None else key_mask[b]
        segments = [0] * length if segment_ids is None else segment_ids[b].tolist()
        causal, near = visible_keys(
            length, window=window, layout="sliding", sinks=0, valid=real.tolist(), segments=segments
        )
        masks.append((causal if window is None else near) & real.cpu()[:, None])
    mask = torch.stack(masks)[:, None].to(q.device)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., :length]
    return torch.where(mask.any(-1, keepdim=True), weights, 0.0), mask


def transfer_cross_entropy_reference(
    q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, *, floor: float = 1e-12, **options: Any
) -> Tensor:
    """-sum_j p_ij log a_ij [B, H, T] with every T x T matrix written out.

    Arguments as in `equipoise.ops.transfer_loss.transfer_cross_entropy`.
    """
    p, mask = donor_softmax_reference(q, k, **options)
    products = phi_q @ phi_k.repeat_interleave(q.shape[1] // phi_k.shape[1], 1).mT
    products = products.clamp_min(floor) * mask
    a = products / products.sum(-1, keepdim=True).clamp_min(1e-300)
    return -(p * torch.where(mask, a, 1.0).log()).sum(-1)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, segment_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The delta rule token by token, from features q, k [B, h, T, F] and values [B, h, T, E], in float64.

    Returns:
        The output [B, h, T, E], and S after the last token [B, h, F, E].
    """
    q, k, v = (t.double() for t in (q, k, v))
    rows: list[Tensor] = []
    states: list[Tensor] = []
    for b in range(q.shape[0]):
        sums, segment, outs = q.new_zeros(q.shape[1], q.shape[-1], v.shape[-1]), None, list[Tensor]()
        for t in range(q.shape[2]):
            if key_mask is not None and not key_mask[b, t]:
                outs.append(v.new_zeros(v.shape[1], v.shape[-1]))
                continue
            if segment_ids is not None and segment != int(segment_ids[b, t]):
                sums, segment = torch.zeros_like(sums), int(segment_ids[b, t])
            strength = k[b, :, t].norm(dim=-1, keepdim=True)
            unit = k[b, :, t] / strength.clamp_min(1e-12)
            missing = v[b, :, t] - (unit[:, None] @ sums)[:, 0]
            sums = sums + (strength * unit)[:, :, None] * missing[:, None]
            outs.append((q[b, :, t, None] @ sums)[:, 0])
        rows.append(torch.stack(outs, 1))
        states.append(sums)
    return torch.stack(rows), torch.stack(states)
