"""What linear branches read and write, beside the donor's attention in those heads: for stage 2.

Shapes: B rows, h heads with a linear branch, M states (one for each of those heads, or for those that share
keys and values), T tokens, P = T - 1 of them that another follows, D head_dim, E value_dim, F features.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.branches import converted_mixers, observe, rivals
from equipoise.models.families import ConversionError
from equipoise.ops.types import accumulation_dtype
from equipoise.train.objectives import LINEAR_ALONE

LARGEST_SCALE = 10.0
"""Of reads, and one over it the smallest."""
ALIKE = 0.9
"""Cosine of two keys from which they are one and the same key, which may share their features. In the
donors of docs/research a key that comes again has .95 and more with itself, others have .75 and less."""
LEAST_WRITTEN = 1e-6
"""Sum of a row's strengths of writing below which there is nothing to keep apart."""
WRITTEN = 256
"""Keys of a row, those written hardest, that are held against each other: pairs grow by the square."""


@dataclass(frozen=True)
class Keys:
    """What the states of one layer write.

    Attributes:
        phi_k: features; their norm is how hard a key is written.
        k: the keys themselves as maps see them, without gradient.
        sequences: which of a row's packed sequences a token is of; -1 for padding.
    """

    phi_k: Float[Tensor, "B M P F"]
    k: Float[Tensor, "B M P D"]
    sequences: Int[Tensor, "B P"]

    def crowding(self) -> Float[Tensor, " B"]:
        """How much of other keys' values a read at a key's own features would get, mean over states.

        Of each key, the sum of squared cosines with the features of the others of its sequence, every one as
        hard as it is written; then the mean over keys, those counting as hard as they are written too. The
        same key again is no other (`ALIKE`, after the sequence's mean key is taken off, as biases make all
        keys alike). Random directions in F dimensions have a mean square of 1 / F. Of `WRITTEN` keys a row.
        """
        hardness = self.phi_k.detach().norm(dim=-1).masked_fill((self.sequences < 0)[:, None], 0)
        hardness, kept = hardness.topk(min(WRITTEN, hardness.shape[-1]), dim=-1)
        phi, k = (x.gather(2, kept[..., None].expand(*kept.shape, x.shape[-1])) for x in (self.phi_k, self.k))
        of = self.sequences[:, None].expand_as(self.phi_k[..., 0]).gather(2, kept)
        together = (of[..., None] == of[..., None, :]) * hardness[..., None, :]
        unit = functional.normalize(phi, dim=-1)
        with torch.autocast(phi.device.type, enabled=False):
            mean = together @ k / together.sum(-1, keepdim=True).clamp_min(LEAST_WRITTEN)
            centred = functional.normalize(k - mean, dim=-1)
            cosines, alike = unit @ unit.mT, centred @ centred.mT >= ALIKE
        alike |= torch.eye(alike.shape[-1], dtype=torch.bool, device=alike.device)
        crowding = (cosines.square() * (hardness[..., None] * together).masked_fill(alike, 0)).sum((-1, -2))
        return (crowding / hardness.sum(-1).clamp_min(LEAST_WRITTEN)).mean(1)


@dataclass(frozen=True)
class Reads:
    """Of one layer.

    Attributes:
        own: what its linear branch reads, by itself.
        donor: the donor's attention output in the same heads, without gradient.
        keys: what its states write; None unless an objective asks.
    """

    own: Float[Tensor, "B h P E"]
    donor: Float[Tensor, "B h P E"]
    keys: Keys | None = None

    def error(self, weights: Float[Tensor, "B P"]) -> Float[Tensor, "B P"]:
        """Squared error at the best scale, mean over heads and E, over the donor's mean square in that row.

        A row's reads of one head may all be larger or smaller by one factor, without gradient: how loud a
        head says what it found is for what listens to it, and there the hybrid may want more of it than the
        donor, whose other heads say the same.
        """
        of_rows = weights[:, None, :, None]
        alike = (of_rows * self.own * self.donor).sum((2, 3), keepdim=True)
        size = (of_rows * self.own.square()).sum((2, 3), keepdim=True)
        tiny = torch.finfo(self.donor.dtype).tiny
        scale = (alike / size.clamp_min(tiny)).clamp(1 / LARGEST_SCALE, LARGEST_SCALE).detach()
        mean_square = self.donor.square().mean((1, 2, 3)).clamp_min(tiny)
        return (scale * self.own - self.donor).square().mean((1, 3)) / mean_square[:, None]


def _of_linear_heads(mixer: HybridMixer, output: Tensor) -> Tensor:
    """[B, H, T, E] of all heads as [B, h, P, E]."""
    output = mixer.of_linear_heads(output)[:, :, :-1]
    return output.to(accumulation_dtype(output.dtype))


def reading_mixers(model: nn.Module) -> list[HybridMixer]:
    """The layers whose linear branch is asked.

    Raises:
        ConversionError: none has one.
    """
    found = rivals(converted_mixers(model))
    if not found:
        raise ConversionError(
            "expected a layer with a window and a linear branch, as far-reads and keys-apart look at what "
            "linear branches read and write: leave them out where all layers have windows only."
        )
    return found


@contextmanager
def donor_outputs(model: nn.Module) -> Generator[dict[int, Tensor]]:
    """The donor's output in heads with a linear branch, by layer, whenever the donor itself runs inside."""
    asked, found = set(reading_mixers(model)), dict[int, Tensor]()

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if mixer in asked and mixer.mode.kind == "softmax":
            found[mixer.layer_idx] = _of_linear_heads(mixer, output).detach()

    with observe(model, observer, also=True):
        yield found


@contextmanager
def linear_inputs(model: nn.Module) -> Generator[dict[int, LayerInputs]]:
    """What the layers asked get in the hybrid's own pass, by layer, without gradients.

    So that maps alone learn to read: q, k and v answer to predictions, and with gradients from reads adapters
    learned those in place of text (docs/research/02).
    """
    asked, found = set(reading_mixers(model)), dict[int, LayerInputs]()

    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        if mixer in asked:
            found.setdefault(mixer.layer_idx, inputs.detach())

    with observe(model, observer, also=True):
        yield found


def reads_of(
    model: nn.Module, seen: Mapping[int, LayerInputs], wanted: Mapping[int, Tensor], *, keys: bool = False
) -> list[Reads]:
    """What linear branches read of such inputs, beside the donor's outputs; and what they write, if ``keys``.

    To be called after the pass, not by an observer in it: where activations are recomputed, a pass that does
    more than its repetition is refused by torch.
    """
    found = list[Reads]()
    for mixer in reading_mixers(model):
        inputs, donor = seen[mixer.layer_idx], wanted[mixer.layer_idx]
        phi_q, phi_k = mixer.features(inputs) if keys else (None, None)  # else operators map, and keep less
        with torch.autocast(inputs.q.device.type, enabled=False):
            output, _ = mixer.hybrid(inputs, branches=LINEAR_ALONE, phi_q=phi_q, phi_k=phi_k)
        own = _of_linear_heads(mixer, output)
        found.append(Reads(own, donor.to(own.device), None if phi_k is None else _keys(mixer, inputs, phi_k)))
    return found


def _keys(mixer: HybridMixer, inputs: LayerInputs, phi_k: Tensor) -> Keys:
    """Of the P tokens that another follows."""
    k = mixer.linear_inputs(inputs).before_rotary().k.to(phi_k.dtype)
    k = k.repeat_interleave(phi_k.shape[1] // k.shape[1], dim=1)  # a state may be of one query head
    sequences = inputs.segment_ids
    if sequences is None:
        sequences = torch.zeros(k.shape[0], k.shape[2], dtype=torch.long, device=k.device)
    if inputs.key_mask is not None:
        sequences = sequences.masked_fill(~inputs.key_mask, -1)
    return Keys(phi_k[:, :, :-1], k[:, :, :-1], sequences[:, :-1])
