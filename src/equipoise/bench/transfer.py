"""The transfer loss with its gradients: block by block against T x T matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from equipoise.bench.attention import too_large, too_long
from equipoise.bench.gate import LENGTHS, TOLERANCES, compare
from equipoise.bench.peers import OURS
from equipoise.bench.results import Row
from equipoise.bench.setting import BenchSetting, Call, Inputs, make_inputs
from equipoise.bench.timing import Contestant, race
from equipoise.ops.transfer_loss import FLOOR, transfer_cross_entropy

NAMES = {OURS: "equipoise.ops.transfer_loss.transfer_cross_entropy", "txt": "the same over T x T matrices"}
LIVE = 6
"""T x T matrices in float32 that the direct form holds at once, at least."""


def direct(q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, scale: float) -> Tensor:
    """The cross-entropy [B, H, T] as it is usually coded: softmax weights and predicted weights in full."""
    k, phi_k = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, phi_k))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    with torch.no_grad():
        weights = (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
    products = (phi_q @ phi_k.mT).masked_fill(later, 0)
    predicted = products / products.sum(-1, keepdim=True)
    return -(weights * predicted.clamp_min(FLOOR).log()).sum(-1)


def _step(setting: BenchSetting, x: Inputs, name: str) -> Call:
    """Loss, and gradients of the features."""
    scale = setting.head_dim**-0.5

    def call() -> tuple[Tensor, ...]:
        phi_q, phi_k = (t.detach().to(torch.float32).requires_grad_() for t in x.features())
        if name == OURS:
            loss = transfer_cross_entropy(x.q, x.k, phi_q, phi_k, scale=scale)
        else:
            loss = direct(x.q.float(), x.k.float(), phi_q, phi_k, scale)
        return loss, *torch.autograd.grad(loss.sum(), (phi_q, phi_k))

    return call


def check(setting: BenchSetting, names: Sequence[str]) -> list[str]:
    """Check losses and gradients against the direct form in float64.

    Raises:
        GateError: one is wrong.
    """
    small = setting.for_gate()
    for length in LENGTHS:
        x = make_inputs(small, length, seed=length)
        phi_q, phi_k = (t.detach().double().requires_grad_() for t in x.features())
        loss = direct(x.q.double(), x.k.double(), phi_q, phi_k, small.head_dim**-0.5)
        right = loss, *torch.autograd.grad(loss.sum(), (phi_q, phi_k))
        for name in names:
            # kernels multiply features in the donor's type; elsewhere they stay what they are
            rounds = name == OURS and setting.device != "cpu"
            tolerance = TOLERANCES[setting.dtype if rounds else "float32"]
            found: tuple[Tensor, ...] = _step(small, x, name)()  # pyright: ignore[reportAssignmentType]
            for what, one, other in zip(("loss", "phi(q)", "phi(k)"), found, right, strict=True):
                said = f"{what} of {name} at T = {length}"
                compare(said, one.detach(), other.detach(), tolerance, floor=1e-2)
    return [f"losses and gradients of {', '.join(names)} at T = {', '.join(map(str, LENGTHS))}"]


def measure(
    setting: BenchSetting, lengths: Sequence[int], names: Sequence[str], *, rounds: int, budget: float,
    told: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Time loss and gradients at each length; arguments as in `attention.measure`."""
    rows: list[Row] = []
    last: dict[str, tuple[int, float]] = {}
    for length in sorted(lengths):
        told(f"transfer {setting.dtype}, T = {length:,}")
        x = make_inputs(setting, length)
        square = 4 * setting.batch * setting.heads * length**2
        contestants: list[Contestant] = []
        for name in names:
            reason = too_large(LIVE * square, setting) if name != OURS else ""
            reason = reason or too_long(last.get(name), length, budget)
            if reason:
                contestants.append(Contestant(name=name, unavailable=reason))
            else:
                contestants.append(Contestant(name=name, prepare=_prepared(setting, x, name)))
        times = race(contestants, rounds=rounds, budget=budget, device=setting.device)
        for one in contestants:
            found = times.get(one.name)
            if found is not None:
                last[one.name] = length, found.median
            rows.append(
                Row(measure="transfer", length=length, name=one.name, times=found, reason=one.unavailable,
                    tokens=length)
            )  # fmt: skip
    return rows


def _prepared(setting: BenchSetting, x: Inputs, name: str) -> Callable[[], Call]:
    return lambda: _step(setting, x, name)
