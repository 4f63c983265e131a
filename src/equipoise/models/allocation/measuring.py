"""What windows cost a donor, by layer and head: divergences of its predictions on a few rows.

Shapes: B rows of T tokens, P = T - 1 predictions, L converted layers, H query heads, J window sizes, V words
of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from equipoise.layers.mixer import AttentionMode, Blend, HybridMixer
from equipoise.models.branches import converted_mixers
from equipoise.models.divergence import divergence, log_probabilities

SOFTMAX = AttentionMode("softmax")
KEPT = 2**28
"""Bytes of the donor's predictions that are kept between measurements, on the model's device."""
NOTHING = 1e-6
"""Nats per token that are rounding: two ways to compute the same attention differ by as much."""
Windows = int | Sequence[int] | None
"""Of a layer: tokens in all heads, or in each key/value head; None for full softmax."""
Tick = Callable[[], None]


class DonorDivergence:
    """Mean KL(donor || donor with other attention), in nats per token, on fixed rows.

    The donor's own predictions are kept where all of them fit into `KEPT` bytes. Else they are computed again
    for every measurement: of 16 rows and a large vocabulary they are more than most machines can spare.

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
        self.kept: dict[int, Tensor] = {}
        self.tokens = rows * (inputs["input_ids"].shape[1] - 1)

    @property
    def batches(self) -> int:
        """Batches of one measurement."""
        return len(self.parts)

    def windowed(
        self,
        windows: Sequence[Windows],
        *,
        sinks: int | Sequence[int],
        heads: Sequence[Sequence[int]] | None = None,
        softmax_share: float = 1.0,
    ) -> float:
        """With windows and sinks in the layers; untrained.

        Args:
            windows: by converted layer: tokens in all heads, or in each key/value head, or softmax if None.
            sinks: tokens that join every window, or by converted layer.
            heads: by layer, the query heads that keep a share of full softmax all the same.
            softmax_share: which share.
        """
        modes: list[AttentionMode] = []
        each = [sinks] * len(self.mixers) if isinstance(sinks, int) else sinks
        for place, (mixer, window, own) in enumerate(zip(self.mixers, windows, each, strict=True)):
            kept = () if heads is None or softmax_share == 0 else heads[place]
            modes.append(windowed_mode(mixer, window, own, kept, softmax_share, self.model.device))
        total = 0.0
        with torch.no_grad():
            for place in range(self.batches):
                total += float(self._divergence(place, modes).sum())
                self.tick()
        return total / self.tokens

    def worth(
        self, sizes: Sequence[int], *, sinks: int, steps: int = 6, weigh_lookups: bool = False
    ) -> Float[Tensor, "L H J"]:
        """Nats per token that each widening of each head's window restores: integrated gradients.

        Widening j goes from the j-th of the J sizes to the next one, the last from the largest to softmax.
        All heads go from the smallest window to the donor together, (1 - a) window + a softmax, and the
        divergence's gradient by the share of each widening is averaged over a = 1 / (2 steps), 3 / (2
        steps), ... (Sundararajan et al. 2017). The values sum to the divergence of the smallest windows
        everywhere, but for the sum's own error.

        Args:
            sizes: windows in tokens, rising.
            sinks: tokens that join every window.
            steps: points of the path; each takes a forward and a backward pass.
            weigh_lookups: weigh each token by what the smallest windows lose there, over its mean: lookups
                lose several nats, and what a mean of the past restores is spread over all tokens.
        """
        most = max(mixer.heads for mixer in self.mixers)
        found = torch.zeros(len(self.mixers), most, len(sizes), dtype=torch.float64)
        windows = (*sizes, None)
        weights = self._lost([sizes[0]] * len(self.mixers), sinks) if weigh_lookups else None
        for step in range(steps):
            for place in range(self.batches):
                shares = [
                    torch.full(
                        (len(sizes), mixer.heads), (step + 0.5) / steps, device=self.model.device,
                        requires_grad=True,
                    )
                    for mixer in self.mixers
                ]  # fmt: skip
                modes = [AttentionMode("blend", sinks=sinks, blend=_path(windows, share)) for share in shares]
                lost = self._divergence(place, modes)
                lost = lost.sum() if weights is None else (weights[place] * lost).sum()
                gradients = torch.autograd.grad(lost, shares)
                for rows, gradient in zip(found, gradients, strict=True):
                    rows[: gradient.shape[1]] -= gradient.T.cpu().double() / (steps * self.tokens)
                self.tick()
        return found

    @torch.no_grad()
    def _lost(self, windows: Sequence[int], sinks: int) -> list[Tensor]:
        """By batch, what windows lose at each token [B, T - 1], over its mean; all 1 if they lose nothing."""
        modes = [AttentionMode("swa", window=window, sinks=sinks) for window in windows]
        found = [self._divergence(place, modes) for place in range(self.batches)]
        mean = sum(float(of.double().sum()) for of in found) / self.tokens
        return [of / mean if mean > NOTHING else torch.ones_like(of) for of in found]

    def _donor(self, batch: Mapping[str, Tensor], place: int) -> Tensor:
        if place in self.kept:
            return self.kept[place]
        with torch.no_grad(), _in_modes(self.mixers, [SOFTMAX] * len(self.mixers)):
            found = self._log_probabilities(batch)
        if self.tokens * found.shape[-1] * found.element_size() <= KEPT:
            self.kept[place] = found
        return found

    def _divergence(self, place: int, modes: Sequence[AttentionMode]) -> Float[Tensor, "B P"]:
        batch = {name: tensor.to(self.model.device) for name, tensor in self.parts[place].items()}
        donor = self._donor(batch, place)
        with _in_modes(self.mixers, modes):
            other = self._log_probabilities(batch)
            return divergence(donor, other)

    def _log_probabilities(self, batch: Mapping[str, Tensor]) -> Tensor:
        return log_probabilities(self.model(**batch, use_cache=False).logits[:, :-1])


def _path(windows: tuple[int | None, ...], share: Tensor) -> Blend:
    """The smallest window, and a share of every widening [J, H]."""
    ends = share.new_ones(1, share.shape[1]), share.new_zeros(1, share.shape[1])
    return Blend(windows, torch.cat([ends[0], share]) - torch.cat([share, ends[1]]))


def windowed_mode(
    mixer: HybridMixer, window: Windows, sinks: int, kept: Sequence[int], share: float, device: torch.device
) -> AttentionMode:
    """Windows and sinks of a layer; query heads that are kept have a share of full softmax all the same."""
    if window is None:
        return SOFTMAX
    own = [window] * mixer.kv_heads if isinstance(window, int) else list(window)
    sizes = sorted(set(own))
    if len(sizes) == 1 and not kept:
        return AttentionMode("swa", window=sizes[0], sinks=sinks)
    if not kept:
        return AttentionMode("swa", head_windows=tuple(own), sinks=sinks)
    weights = torch.zeros(len(sizes) + 1, mixer.heads, device=device)
    for head in range(mixer.heads):
        softmax = share if head in kept else 0.0
        weights[sizes.index(own[head * mixer.kv_heads // mixer.heads]), head] = 1 - softmax
        weights[-1, head] = softmax
    return AttentionMode("blend", sinks=sinks, blend=Blend((*sizes, None), weights))


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
