"""What comes before every measurement: contestants have to be right, against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.bench.peers import GATE, PEERS, Answer
from equipoise.bench.setting import BenchError, BenchSetting, Inputs, UnavailableError, make_inputs
from equipoise.ops.reference import hybrid_attention_reference

LENGTHS = (1, 63, 131)
"""Odd, and around the chunk's 64."""
TOLERANCES = {"float32": 2e-4, "bfloat16": 4e-2}
"""Largest difference, relative to the largest entry of what is right."""


class GateError(BenchError):
    """An operator or peer gave a wrong answer; no time of it would mean anything."""


def compare(what: str, ours: Tensor, right: Tensor, tolerance: float, *, floor: float = 1e-30) -> None:
    """Raise where a result is off.

    Args:
        what: what is compared, for the error.
        ours, right: the result and the reference.
        tolerance: largest difference allowed, over the largest entry of ``right``.
        floor: the least that this entry counts as: what cancels to nothing has no scale of its own.

    Raises:
        GateError: what is wrong, by how much.
    """
    largest = max(right.abs().max().item(), floor)
    off = (ours.double() - right).abs().max().item() / largest
    if not off <= tolerance:  # NaN is wrong as well
        raise GateError(
            f"correctness gate: {what} is off by {off:.1e} of its largest entry, allowed {tolerance:.0e}; "
            "nothing was timed."
        )


def right_answer(setting: BenchSetting, x: Inputs, answer: Answer) -> Tensor:
    """The reference's output in float64 [B, H, T, E]."""
    q, k, v = (t.double() for t in (x.q, x.k, x.v))
    phi_q = phi_k = None
    if answer == "hybrid":
        phi_q, phi_k = (t.double() for t in x.features())
    window = setting.window if answer != "softmax" else x.q.shape[2]
    return hybrid_attention_reference(q, k, v, phi_q, phi_k, window=window, gate=GATE)


def check_attention(setting: BenchSetting, names: Sequence[str], *, gradients: bool) -> list[str]:
    """Check operators and peers by name; returns what was checked, in words.

    Raises:
        GateError: one of them is wrong.
    """
    small, said = setting.for_gate(), list[str]()
    for name in names:
        try:
            for length in LENGTHS:
                x = make_inputs(small, length, seed=length)
                check = _check_gradients if gradients else _check_output
                check(small, x, name, length)
        except UnavailableError:
            continue
        said.append(name)
    what = "outputs and gradients" if gradients else "outputs"
    return [f"{what} of {', '.join(said)} at T = {', '.join(map(str, LENGTHS))}"]


def _check_output(setting: BenchSetting, x: Inputs, name: str, length: int) -> None:
    peer = PEERS[name]
    with torch.no_grad():
        out = peer.build(setting, x)()
        right = right_answer(setting, x, peer.answer)
    compare(f"the output of {name} at T = {length}", out, right, TOLERANCES[setting.dtype])


def _check_gradients(setting: BenchSetting, x: Inputs, name: str, length: int) -> None:
    peer = PEERS[name]
    x.requires_grad()
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(x.q.shape, generator=generator).to(x.q)
    out = peer.build(setting, x)()
    found = _gradients(out, x, given)
    right = right_answer(setting, x, peer.answer)
    expected = _gradients(right, x, given.double())
    where = f"of {name} at T = {length}"
    compare(f"the output {where}", out.detach(), right.detach(), TOLERANCES[setting.dtype])
    # those of a single token's features cancel to nothing: they are judged by the size of the others
    largest = max(other.abs().max().item() for other in expected if other is not None)
    for leaf, one, other in zip(("q", "k", "v", "phi(q)", "phi(k)"), found, expected, strict=True):
        if one is not None and other is not None:
            what = f"the gradient of {leaf} {where}"
            compare(what, one, other.double(), TOLERANCES[setting.dtype], floor=0.1 * largest)
        elif (one is None) != (other is None) and length > 1:
            raise GateError(f"correctness gate: the gradient of {leaf} {where} is missing.")


def _gradients(out: Tensor, x: Inputs, given: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(out, x.leaves(), given.to(out.dtype), allow_unused=True)
