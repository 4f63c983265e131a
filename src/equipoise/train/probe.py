"""How much of a layer's output, and of its training signal, goes through each branch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from equipoise.layers.guards import NumericalGuard
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.ops import Branches

_WINDOW, _LINEAR = Branches(linear=False), Branches(window=False)
_ALONE = Branches(window=False, reading="renormalised")


@dataclass
class BranchProbe:
    """An observer (see `equipoise.models.branches.observe`) that adds up norms over the layers of one batch.

    The share is |linear term| / (|window term| + |linear term|), norms over everything, of the hybrid as it
    is without dropout. A branch's gradient is the part of the loss gradient that reaches the layers' q, k, v
    through it alone, in the mode the layer ran in: where the window was dropped, all of it is linear.
    """

    output: dict[str, float] = field(default_factory=lambda: {"window": 0.0, "linear": 0.0})
    gradient: dict[str, float] = field(default_factory=lambda: {"window": 0.0, "linear": 0.0})

    guard: NumericalGuard | None = field(default_factory=NumericalGuard)

    def __call__(self, mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if self.guard is not None:
            self.guard(mixer, inputs.detach())
        if mixer.config.window is None or mixer.config.feature_map is None:
            return
        detached = inputs.detach()
        mode = mixer.mode
        if output.requires_grad:
            output.register_hook(lambda grad: self._gradients(mixer, mode, detached, grad))
        with torch.no_grad():
            for name, branches in (("window", _WINDOW), ("linear", _LINEAR)):
                term, _ = mixer.hybrid(detached, branches=branches, window=mode.window)
                self.output[name] += term.float().square().sum().item()

    def _gradients(self, mixer: HybridMixer, mode: AttentionMode, inputs: LayerInputs, grad: Tensor) -> None:
        for name in ("window", "linear"):
            with torch.enable_grad():
                copy = inputs.detach()
                leaves = [t.requires_grad_() for t in (copy.q, copy.k, copy.v)]
                term = _term(mixer, mode, copy, name)
                grads = torch.autograd.grad(term, leaves, grad.to(term.dtype), allow_unused=True)
            self.gradient[name] += sum(g.float().square().sum().item() for g in grads if g is not None)

    def results(self) -> dict[str, float]:
        """linear_output_share, window_gradient, linear_gradient, and the guard's counts; what was seen."""
        window, linear = (self.output[name] ** 0.5 for name in ("window", "linear"))
        results = {} if self.guard is None else self.guard.results()
        if window + linear == 0:
            return results
        results["linear_output_share"] = linear / (window + linear)
        if any(self.gradient.values()):
            results |= {f"{name}_gradient": value**0.5 for name, value in self.gradient.items()}
        return results


def _term(mixer: HybridMixer, mode: AttentionMode, inputs: LayerInputs, branch: str) -> Tensor:
    """What one branch adds to the layer's output in its mode; the two of them sum to it."""
    kept = mode.branches.window  # a bool, or one per row or head: False where the window was dropped
    if branch == "window":
        return mixer.hybrid(inputs, branches=Branches(kept, linear=False), window=mode.window)[0]
    with_window = mixer.hybrid(inputs, branches=_LINEAR, window=mode.window)[0]
    if kept is True or mode.branches.reading == "literal":
        return with_window
    alone = mixer.hybrid(inputs, branches=_ALONE, window=mode.window)[0]
    kept = torch.as_tensor(kept, device=alone.device)
    return torch.where(kept.view(*kept.shape, *[1] * (alone.ndim - kept.ndim)), with_window, alone)
