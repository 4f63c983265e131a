"""What windows cost a donor, by layer and head: divergences of its predictions on a few rows.

Shapes: B rows of T tokens, L converted layers, H query heads, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from equipoise.layers.mixer import AttentionMode, HybridMixer
from equipoise.models.branches import converted_mixers
from equipoise.models.divergence import divergence, log_probabilities

SOFTMAX = AttentionMode("softmax")
Tick = Callable[[], None]


class DonorDivergence:
    """Mean KL(donor || donor with other attention), in nats per token, on fixed rows.

    The donor's own predictions are computed again for every batch, rather than kept: B x T x V numbers are
    more than most machines can spare.

    Args:
        model: converted, without adapters; left in the modes it was in.
        inputs: of the model, each [B, T]: input_ids, and segment_ids and position_ids where rows are packed.
        batch_size: rows at a time.
        tick: called after each batch of each measurement, for a bar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Int[Tensor, "B T"]],
        *,
        batch_size: int,
        tick: Tick = lambda: None,
    ) -> None:
        self.model, self.tick = model, tick
        self.mixers = converted_mixers(model)
        rows = len(inputs["input_ids"])
        self.parts = [
            {name: tensor[start : start + batch_size] for name, tensor in inputs.items()}
            for start in range(0, rows, batch_size)
        ]
        self.tokens = rows * (inputs["input_ids"].shape[1] - 1)

    @property
    def batches(self) -> int:
        """Batches of one measurement."""
        return len(self.parts)

    def windowed(
        self,
        windows: Sequence[int | None],
        *,
        sinks: int,
        heads: Sequence[Sequence[int]] | None = None,
        softmax_share: float = 1.0,
    ) -> float:
        """With windows and sinks in the layers, softmax where None; untrained.

        Args:
            windows: by converted layer, in tokens.
            sinks: tokens that join every window.
            heads: by layer, those that keep a share of full softmax all the same.
            softmax_share: which share.
        """
        modes: list[AttentionMode] = []
        for place, (mixer, window) in enumerate(zip(self.mixers, windows, strict=True)):
            kept = () if heads is None or softmax_share == 0 else heads[place]
            if window is None:
                modes.append(SOFTMAX)
            elif kept:
                weight = torch.zeros(mixer.heads, device=self.model.device)
                weight[list(kept)] = softmax_share
                modes.append(AttentionMode("blend", window=window, sinks=sinks, softmax_weight=weight))
            else:
                modes.append(AttentionMode("swa", window=window, sinks=sinks))
        total = 0.0
        with torch.no_grad():
            for batch in self.parts:
                total += float(self._divergence(batch, modes))
                self.tick()
        return total / self.tokens

    def head_importance(self, windows: Sequence[int], *, sinks: int, steps: int = 6) -> Float[Tensor, "L H"]:
        """Nats per token that full softmax in each head restores over windows: integrated gradients.

        Every head runs (1 - a) window + a softmax, and the divergence's gradient by each head's a is averaged
        over a = 1 / (2 steps), 3 / (2 steps), …: the path from windows everywhere to the donor (Sundararajan
        et al. 2017). The values sum to the divergence of windows everywhere, but for the sum's own error.
        """
        found = torch.zeros(len(self.mixers), max(mixer.heads for mixer in self.mixers), dtype=torch.float64)
        for step in range(steps):
            share = (step + 0.5) / steps
            for batch in self.parts:
                weights = [
                    torch.full((mixer.heads,), share, device=self.model.device, requires_grad=True)
                    for mixer in self.mixers
                ]
                modes = [
                    AttentionMode("blend", window=window, sinks=sinks, softmax_weight=weight)
                    for window, weight in zip(windows, weights, strict=True)
                ]
                gradients = torch.autograd.grad(self._divergence(batch, modes), weights)
                for row, gradient in zip(found, gradients, strict=True):
                    row[: len(gradient)] -= gradient.cpu().double() / (steps * self.tokens)
                self.tick()
        return found

    def _divergence(self, batch: Mapping[str, Tensor], modes: Sequence[AttentionMode]) -> Tensor:
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        with torch.no_grad(), _in_modes(self.mixers, [SOFTMAX] * len(self.mixers)):
            donor = self._log_probabilities(batch)
        with _in_modes(self.mixers, modes):
            other = self._log_probabilities(batch)
            return divergence(donor, other).sum()

    def _log_probabilities(self, batch: Mapping[str, Tensor]) -> Tensor:
        return log_probabilities(self.model(**batch, use_cache=False).logits[:, :-1])


@contextmanager
def _in_modes(mixers: Sequence[HybridMixer], modes: Sequence[AttentionMode]) -> Generator[None]:
    before = [mixer.mode for mixer in mixers]
    for mixer, mode in zip(mixers, modes, strict=True):
        mixer.mode = mode
    try:
        yield
    finally:
        for mixer, mode in zip(mixers, before, strict=True):
            mixer.mode = mode
