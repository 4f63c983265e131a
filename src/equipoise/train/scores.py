"""Where scores of the linear branch start: at what the donor's softmax weighs beyond the window.

Mixing rules that set the linear branch beside the window's scores (`SCORED_RULES`) need a number on the scale
of q . k / sqrt(D), and that scale is the donor's own: a score that is 50 too low has no weight, and no
gradient either. Shapes as in `equipoise.ops.types`; n tokens are sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.branches import capture, converted_mixers
from equipoise.models.sharding import run_decoder
from equipoise.ops.mix import SCORED_RULES
from equipoise.ops.types import accumulation_dtype

QUERIES = 256
"""Tokens of each row that are looked at, evenly spaced: all pairs of a long text would not fit in memory."""
ROWS = 8
"""Rows that are looked at."""
NEWTON, LEAST_STEP, RIDGE = 100, 1e-6, 1e-3
"""Steps of Newton's method at most, the part of one that is still tried, and what keeps weights small that
tell nothing (per sampled token)."""


@dataclass
class Seen:
    """Of one layer, part by part.

    Attributes:
        q: queries [H, n, D].
        far: share of the donor's softmax that lies beyond the window [H, n].
        offset: logit of the linear branch's share at a score of 0 [H, n].
    """

    q: list[Tensor] = field(default_factory=list[Tensor])
    far: list[Tensor] = field(default_factory=list[Tensor])
    offset: list[Tensor] = field(default_factory=list[Tensor])


@torch.no_grad()
def fit_scores(
    model: nn.Module, inputs: Mapping[str, Int[Tensor, "B T"]], *, batch_size: int = 4
) -> dict[int, Float[Tensor, " H"]]:
    """Start the scores of a hybrid's linear branches where they share the donor's attention out best.

    The linear branch's share is sigmoid(q . w + b + offset) under these rules, and the donor's attention
    beyond the window what it should be: a logistic regression for each head, by Newton's method.

    Args:
        model: converted; gates of layers with such a rule are changed in place.
        inputs: of the model: input_ids, and attention_mask, segment_ids and position_ids where rows have any.
        batch_size: rows at a time.

    Returns:
        By layer, how far the fitted shares are from the donor's on average [H].
    """
    layers = {mixer.layer_idx: Seen() for mixer in converted_mixers(model) if scored(mixer)}
    if not layers:
        return {}

    def observer(mixer: HybridMixer, given: LayerInputs, output: Tensor) -> None:
        if mixer.layer_idx in layers:
            _look(mixer, given, layers[mixer.layer_idx])

    device = next(model.parameters()).device
    with capture(model, observer):
        for start in range(0, len(inputs["input_ids"]), batch_size):
            part: dict[str, Any] = {
                name: tensor[start : start + batch_size].to(device) for name, tensor in inputs.items()
            }
            run_decoder(model, **part)
    return {
        mixer.layer_idx: _start(mixer, layers[mixer.layer_idx])
        for mixer in converted_mixers(model)
        if mixer.layer_idx in layers
    }


def scored(mixer: HybridMixer) -> bool:
    """Whether the layer has a score to be learned."""
    return mixer.has_both and mixer.config.mixing in SCORED_RULES and mixer.gate_logit is not None


def _look(mixer: HybridMixer, given: LayerInputs, seen: Seen) -> None:
    length = given.q.shape[2]
    chosen = torch.linspace(0, length - 1, min(length, QUERIES), device=given.q.device).long()
    for row in range(given.q.shape[0]):  # one at a time: n x T scores of every head weigh enough
        _look_at(mixer, _row(given, row), chosen, seen)


def _row(given: LayerInputs, row: int) -> LayerInputs:
    def own(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[row : row + 1]

    return replace(
        given, q=own(given.q), k=own(given.k), v=own(given.v), key_mask=own(given.key_mask),
        segment_ids=own(given.segment_ids),
        rotation=given.rotation and given.rotation.map(lambda t: t[min(row, len(t) - 1)][None]),
    )  # fmt: skip


def _look_at(mixer: HybridMixer, given: LayerInputs, chosen: Tensor, seen: Seen) -> None:
    """Of one row. What is kept is small, and goes to the CPU, where there is float64 on every machine."""
    earlier, visible, near, real = _masks(mixer, given, chosen)
    dtype = accumulation_dtype(given.q.dtype)
    q = given.q[0, :, chosen].to(dtype)
    k = given.k[0].to(dtype).repeat_interleave(len(q) // given.k.shape[1], 0)
    scores = q @ k.mT * given.scale
    if given.softcap is not None:
        scores = given.softcap * torch.tanh(scores / given.softcap)
    inside = scores.masked_fill(~near, -torch.inf).logsumexp(-1)
    outside = scores.masked_fill(~(visible & ~near), -torch.inf).logsumexp(-1)
    if given.sink_logits is not None:
        inside = inside.logaddexp(given.sink_logits.to(dtype)[:, None])
    offset = -inside
    if mixer.config.mixing == "calibrated":  # which counts a score for every key
        offset = offset + _log_normaliser(mixer, given, chosen, earlier)
    kept = real & torch.isfinite(outside).any(0)  # the first tokens see nothing beyond a window
    asking = given.before_rotary().q[0, :, chosen].to(dtype)
    for found, values in ((seen.q, asking), (seen.far, (outside - inside).sigmoid()), (seen.offset, offset)):
        found.append(values[:, kept].cpu().double())


def _masks(mixer: HybridMixer, given: LayerInputs, chosen: Tensor) -> tuple[Tensor, ...]:
    """Keys that came before, those the donor sees [n, T], of these the window [H, n, T]; real tokens [n]."""
    length = given.q.shape[2]
    places = torch.arange(length, device=given.q.device)
    real = torch.ones_like(places, dtype=torch.bool) if given.key_mask is None else given.key_mask[0]
    segments = torch.zeros_like(places) if given.segment_ids is None else given.segment_ids[0]
    back = chosen[:, None] - places
    earlier = (segments[chosen, None] == segments) & (back >= 0) & real
    visible = earlier if given.sliding_window is None else earlier & (back < given.sliding_window)
    before = real.cumsum(0) - real.long()  # real tokens before each, and before its sequence
    begins = torch.cat([torch.ones_like(real[:1]), segments[1:] != segments[:-1]])
    first = torch.where(begins, places, 0).cummax(0).values
    sink = before - before[first] < mixer.config.sinks
    windows = torch.tensor(mixer.windows, device=places.device)
    return earlier, visible, visible & ((back < windows[:, None, None]) | sink), real[chosen]


def _log_normaliser(mixer: HybridMixer, given: LayerInputs, chosen: Tensor, earlier: Tensor) -> Tensor:
    """log of phi(q) . z at each token [H, n]; 0 for heads without a linear branch."""
    phi_q, phi_k = mixer.features(given)
    phi_q = phi_q[:, :, chosen]
    phi_k = phi_k.repeat_interleave(phi_q.shape[1] // phi_k.shape[1], 1)
    sums = (phi_q @ phi_k.mT).masked_fill(~earlier, 0).sum(-1)
    return torch.nan_to_num(mixer.on_all_heads(sums.log()))[0]


def _start(mixer: HybridMixer, seen: Seen) -> Tensor:
    """Fit w and b of every head, and put them into the layer's gate."""
    assert mixer.gate_logit is not None
    q, far, offset = (torch.cat(of, 1) for of in (seen.q, seen.far, seen.offset))
    if not q.shape[1]:  # no token sees beyond its window
        return far.new_zeros(len(far))
    seen_by = ((mixer.gate_weight, q), (mixer.gate_squares, q.square()))
    weights = [(weight, given) for weight, given in seen_by if weight is not None]
    given = torch.cat([*(given for _, given in weights), torch.ones_like(q[..., :1])], -1)
    found = logistic(given, far, offset)
    *parts, bias = found.split([*(weight.shape[-1] for weight, _ in weights), 1], -1)
    mixer.gate_logit.copy_(bias)
    for (weight, _), own in zip(weights, parts, strict=True):
        weight.copy_(own)
    fitted = (torch.einsum("hnd,hd->hn", given, found) + offset).sigmoid()
    return (fitted - far).abs().mean(1)


def logistic(
    given: Float[Tensor, "H n D"], target: Float[Tensor, "H n"], offset: Float[Tensor, "H n"]
) -> Float[Tensor, "H D"]:
    """Weights of sigmoid(x . w + offset) whose cross entropy to a target in [0, 1] is least, with a ridge.

    Starts from least squares for the target's logit, as Newton's method finds no way from where every share
    is 0 or 1; steps are halved until they help.
    """
    count, size = given.shape[1:]
    ridge = RIDGE * count * torch.eye(size, dtype=given.dtype, device=given.device)

    def loss(weights: Tensor) -> Tensor:
        logits = torch.einsum("hnd,hd->hn", given, weights) + offset
        entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
        return entropy + 0.5 * RIDGE * count * weights.square().sum(1)

    wanted = target.logit(1e-6) - offset
    weights = torch.linalg.solve(given.mT @ given + ridge, (given.mT @ wanted[..., None]))[..., 0]
    for _ in range(NEWTON):
        shares = (torch.einsum("hnd,hd->hn", given, weights) + offset).sigmoid()
        gradient = torch.einsum("hnd,hn->hd", given, shares - target) + RIDGE * count * weights
        curvature = (given * (shares * (1 - shares))[..., None]).mT @ given + ridge
        step = torch.linalg.solve(curvature, gradient[..., None])[..., 0]
        before, part = loss(weights), torch.ones_like(weights[:, :1])
        worse = loss(weights - part * step) > before
        while worse.any() and part.min() > LEAST_STEP:
            part = torch.where(worse[:, None], part / 2, part)
            worse = loss(weights - part * step) > before
        weights = torch.where(worse[:, None], weights, weights - part * step)
        if float(gradient.norm()) < 1e-8 * count:
            break
    return weights
