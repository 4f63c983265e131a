"""Objectives of stage 2: what the hybrid's predictions are drawn towards.

A new one is one function under `FINETUNE_OBJECTIVES.register`. It sees the predictions of one micro batch and
returns one number per token.

Shapes: B rows of T tokens; P = T - 1 predictions of the tokens that follow another; V words of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from equipoise.config import NEXT_TOKEN
from equipoise.data.packing import IGNORED_LABEL
from equipoise.layers.interface import mixers_of
from equipoise.models.adapters import adapters_disabled
from equipoise.models.branches import branches
from equipoise.models.divergence import divergence, log_probabilities
from equipoise.models.families import ConversionError
from equipoise.ops.types import accumulation_dtype
from equipoise.registry import Registry
from equipoise.train.objectives import LEAST_LOST
from equipoise.train.reads import Reads, donor_outputs, linear_inputs, reads_of

DONOR, WINDOWED_DONOR = "donor", "windowed_donor"
AT_ONCE = 64
"""Tokens whose predictions are compared at once: vocabularies in float32 would be most of the memory."""


@dataclass(frozen=True)
class Predictions:
    """What a micro batch's tokens are predicted to be.

    Attributes:
        logits: of the model that trains.
        targets: the tokens themselves; `IGNORED_LABEL` where a token is not trained on.
        references: log-probabilities [B, T - 1, V] of other models, as far as the objectives ask for them:
            ``donor``, and ``windowed_donor``, the donor whose layers see no more than the hybrid's windows.
        reads: what linear branches read and the donor's output of the same heads, layer by layer; none
            unless an objective asks for them.
        hidden: hidden states of the model that trains and the donor's [B, T - 1, d], those after each layer,
            of the last one after the final norm; none unless an objective asks for them.
    """

    logits: Float[Tensor, "B P V"]
    targets: Int[Tensor, "B P"]
    references: Mapping[str, Tensor]
    reads: Sequence[Reads] = ()
    hidden: Sequence[tuple[Tensor, Tensor]] = ()

    @cached_property
    def log_probabilities(self) -> Tensor:
        """Of the model that trains [B, T - 1, V], in float32 or wider."""
        return log_probabilities(self.logits)

    @cached_property
    def divergence(self) -> Tensor:
        """KL(donor || model), in nats per token [B, T - 1]."""
        return divergence(self.references[DONOR], self.log_probabilities)

    @cached_property
    def astray(self) -> Tensor:
        """KL(donor || windowed donor), how far windows alone lead astray, in nats per token [B, T - 1]."""
        return divergence(self.references[DONOR], self.references[WINDOWED_DONOR]).detach()


@dataclass(frozen=True)
class FinetuneObjective:
    """An objective of stage 2.

    Attributes:
        per_token: from predictions to a loss per token [B, T - 1].
        needs: the references it looks at; each costs a forward pass.
        reads: whether it looks at `Predictions.reads`; costs the linear branch of a layer a second time.
        keys: whether it looks at the keys in those, too; costs memory for their features.
        hidden: whether it looks at `Predictions.hidden`; costs the donor's pass, and memory for both.
    """

    per_token: Callable[[Predictions], Tensor]
    needs: Sequence[str] = ()
    reads: bool = False
    keys: bool = False
    hidden: bool = False


FINETUNE_OBJECTIVES: Registry[FinetuneObjective] = Registry("fine-tuning objective")


def finetune_objective(
    name: str, *, needs: Sequence[str] = (), reads: bool = False, keys: bool = False, hidden: bool = False
) -> Callable[..., Any]:
    """Decorator that registers a function of `Predictions` as an objective."""

    def register(function: Callable[[Predictions], Tensor]) -> Callable[[Predictions], Tensor]:
        FINETUNE_OBJECTIVES.register(name)(FinetuneObjective(function, needs, reads, keys, hidden))
        return function

    return register


@finetune_objective(NEXT_TOKEN)
def next_token(predictions: Predictions) -> Tensor:
    """Cross entropy with the next token, in nats."""
    logits = predictions.logits.to(accumulation_dtype(predictions.logits.dtype))
    targets = predictions.targets
    return functional.cross_entropy(logits.mT, targets, ignore_index=IGNORED_LABEL, reduction="none")


@finetune_objective("distillation", needs=(DONOR,))
def distillation(predictions: Predictions) -> Tensor:
    """KL from the donor's predictions to the hybrid's, in nats (Hinton et al. 2015, at temperature 1)."""
    return predictions.divergence


@finetune_objective("far-distillation", needs=(DONOR, WINDOWED_DONOR))
def far_distillation(predictions: Predictions) -> Tensor:
    """The same, each token weighted by how far the windows alone lead the donor astray there, in nats.

    The weight is KL(donor || windowed donor), a constant: where a window is enough it is 0, and where the
    answer lies beyond all windows it is several nats. So the few tokens count that a linear branch is for.
    """
    return predictions.astray * predictions.divergence


@finetune_objective("far-reads", needs=(DONOR, WINDOWED_DONOR), reads=True)
def far_reads(predictions: Predictions) -> Tensor:
    """Squared error from the donor's attention output to linear attention alone, up to a factor per head.

    In units of that output's mean square, each token weighted by the square of what windows lose there, over
    the mean of its row. Lookups lose several nats and text a few tenths, but there is a hundred times as much
    text: weights that are not squared leave nearly all of the sum to it (docs/research/02). Predictions alone
    let a state read wrongly wherever others know the answer; this asks each one by itself.
    """
    squares = predictions.astray.square() * (predictions.targets != IGNORED_LABEL)
    weights = squares / squares.mean(1, keepdim=True).clamp_min(LEAST_LOST)
    return weights * torch.stack([reads.error(weights) for reads in predictions.reads]).mean(0)


@finetune_objective("keys-apart", needs=(DONOR,), reads=True, keys=True)
def keys_apart(predictions: Predictions) -> Tensor:
    """Squared cosines of each written key's features with those of the other keys that are written.

    A delta rule read at one key's features gets every other key's value by their cosine, so what a state
    tells apart is bounded by how far apart maps put the keys; predictions and reads leave that at what
    random directions have (docs/research/02). The same for all tokens of a row: `Keys.crowding`, the mean
    over layers, but for those whose states have one feature, which tell nothing apart.
    """
    written = [reads.keys for reads in predictions.reads if reads.keys is not None]
    rows = [keys.crowding().to(predictions.logits.device) for keys in written if keys.phi_k.shape[-1] > 1]
    apart = torch.stack(rows).mean(0) if rows else predictions.logits.new_zeros(len(predictions.logits))
    return apart[:, None].expand(predictions.targets.shape)


@finetune_objective("hidden-states", needs=(DONOR,), hidden=True)
def hidden_states(predictions: Predictions) -> Tensor:
    """Squared error from the donor's hidden states after each layer to the hybrid's, mean over layers.

    Each token in units of its own mean square there: later layers are larger by far, and so are a few tokens
    of many models. The last states are those after the final norm. (arXiv 1909.10351 aligns all layers too.)
    """
    errors = list[Tensor]()
    for own, donor in predictions.hidden:
        dtype = accumulation_dtype(own.dtype)
        own, donor = own.to(dtype), donor.to(own.device, dtype)
        scale = donor.square().mean(-1).clamp_min(torch.finfo(dtype).tiny)
        errors.append(((own - donor).square().mean(-1) / scale).to(predictions.logits.device))
    return torch.stack(errors).mean(0)


@torch.no_grad()
def astray(model: PreTrainedModel, arguments: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
    """KL(donor || windowed donor) of the token after each, in nats; 0 at a sequence's last token.

    Args:
        model: converted, with a window in every converted layer.
        arguments: of the model, without labels.
    """
    outputs = [_output(model, name, arguments).logits[:, :-1] for name in (DONOR, WINDOWED_DONOR)]
    pieces = zip(*(logits.split(AT_ONCE, dim=1) for logits in outputs), strict=True)
    found = torch.cat([divergence(*map(log_probabilities, piece)) for piece in pieces], dim=1)
    segments = arguments.get("segment_ids")
    if segments is not None:
        found = found.masked_fill(segments[:, 1:] != segments[:, :-1], 0)
    return functional.pad(found, (0, 1))


def is_plain(objectives: Mapping[str, float]) -> bool:
    """Whether they are the next token alone, which models compute themselves, perhaps with a fused kernel."""
    return dict(objectives) == {NEXT_TOKEN: 1.0}


def finetune_loss(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    objectives: Mapping[str, float],
    *,
    count: Any = None,
) -> Tensor:
    """Weighted sum of objectives over the tokens of a micro batch, a scalar in nats.

    Args:
        model: the hybrid, in the mode it trains in; called without labels.
        inputs: of the model, with ``labels`` [B, T].
        objectives: names of `FINETUNE_OBJECTIVES` and their weights.
        count: what to divide the sum over tokens by; the batch's trained tokens where None.

    Raises:
        UnknownNameError: no such objective.
        ConversionError: one that compares with the windowed donor, and the model is not converted.
    """
    chosen = {name: FINETUNE_OBJECTIVES[name] for name in objectives}
    arguments = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    predictions = _predictions(model, arguments, inputs["labels"][:, 1:], list(chosen.values()))
    trained = predictions.targets != IGNORED_LABEL
    losses = [weight * chosen[name].per_token(predictions) for name, weight in objectives.items()]
    total = torch.stack(losses).sum(0).masked_fill(~trained, 0.0).sum()
    return total / (trained.sum() if count is None else count)


def _predictions(
    model: PreTrainedModel,
    arguments: Mapping[str, Tensor],
    targets: Tensor,
    objectives: Sequence[FinetuneObjective],
) -> Predictions:
    """What some objectives ask for."""
    reading = any(objective.reads for objective in objectives)
    hidden = any(objective.hidden for objective in objectives)
    asked = {need for objective in objectives for need in objective.needs}
    needed = sorted(asked | {DONOR} if hidden else asked)
    # before the model's own pass, whose activations would lie beside theirs
    with donor_outputs(model) if reading else nullcontext({}) as wanted:
        found = {name: _reference(model, name, arguments, hidden=hidden) for name in needed}
    more = {"output_hidden_states": True} if hidden else {}
    with linear_inputs(model) if reading else nullcontext({}) as seen:
        output: Any = model(**arguments, use_cache=False, **more)
    keys = any(objective.keys for objective in objectives)
    reads = reads_of(model, seen, wanted, keys=keys) if reading else []
    pairs = zip(_after_layers(output), found[DONOR][1], strict=True) if hidden else ()
    references = {name: log_probs for name, (log_probs, _) in found.items()}
    return Predictions(
        output.logits[:, :-1], targets.to(output.logits.device), references, reads, list(pairs)
    )


def _after_layers(output: Any) -> list[Tensor]:
    """Hidden states [B, T - 1, d] after each layer, of a model's output: the first are embeddings."""
    return [states[:, :-1] for states in output.hidden_states[1:]]


@torch.no_grad()
def _reference(
    model: PreTrainedModel, name: str, arguments: Mapping[str, Tensor], *, hidden: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """(log-probabilities [B, T - 1, V], hidden states after each layer if those are the donor's)."""
    hidden = hidden and name == DONOR
    output = _output(model, name, arguments, **({"output_hidden_states": True} if hidden else {}))
    return log_probabilities(output.logits[:, :-1]), _after_layers(output) if hidden else []


def _output(model: PreTrainedModel, name: str, arguments: Mapping[str, Tensor], **more: bool) -> Any:
    """Of a reference's pass."""
    if name == DONOR:
        state = branches(model, "softmax") if mixers_of(model) else nullcontext()
    elif name == WINDOWED_DONOR:
        state = branches(model, "window", reading="renormalised")
    else:
        raise ConversionError(f"expected {DONOR} or {WINDOWED_DONOR} as what an objective needs, got {name}.")
    # peft's adapters off for both: they are what trains
    with adapters_disabled(model), state:
        return model(**arguments, use_cache=False, **more)
