"""One part of a decoder at a time: its embedding, one layer, its head; the donor's own forward pass does it.

What a layer is called with (masks, rotary tables by type of layer) is made by the decoder's forward, so that
is what runs, with all other layers passing on what they get.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from equipoise.layers.mixer import HybridMixer, LayerInputs
from equipoise.models.layer_loading import LayerLoader
from equipoise.models.layout import attention_modules

TOKENS_AT_ONCE = 256
"""Tokens whose logits are held at once."""


class _Done(Exception):  # noqa: N818 (no error: the rest of the forward pass is not wanted)
    """Carries what was wanted out of a forward pass."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class _AttentionSeen(Exception):  # noqa: N818 (no error either)
    """Leaves a layer after its attention."""


class LayerRunner:
    """Runs parts of a converted skeleton whose weights are loaded for it.

    Args:
        model: converted; its layers' ``forward`` is replaced until `close`.
        loader: of the model's weights.
    """

    def __init__(self, model: PreTrainedModel, loader: LayerLoader) -> None:
        self.model: Any = model
        self.loader = loader
        self.decoder: Any = model.get_decoder()
        attention = {id(module) for module in attention_modules(model)}
        self.layers: list[Any] = [
            module for module in self.decoder.modules()
            if any(id(child) in attention for child in module.children())
        ]  # fmt: skip
        names = {id(module): name for name, module in model.named_modules()}
        self.layer_names: list[str] = [names[id(layer)] for layer in self.layers]
        self.decoder_name: str = names[id(self.decoder)]
        self._embedding: Any = model.get_input_embeddings()
        self.embedding_name: str = f"{names[id(self._embedding)]}.weight"
        self._enter: Callable[[int, Tensor], Tensor] = lambda _, hidden: hidden
        self._active: int | None = None
        for index, layer in enumerate(self.layers):
            layer.forward = self._standing_in(index, layer.forward)

    def close(self) -> None:
        """Give the layers their own ``forward`` back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    def _standing_in(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            hidden_states = self._enter(index, hidden_states)
            if index != self._active:
                return hidden_states
            output = own(hidden_states, *args, **kwargs)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected layer {index} to return hidden states, got {type(output).__name__}"
                )
            raise _Done(output)

        return forward

    @contextmanager
    def layer_loaded(self, index: int) -> Generator[nn.Module]:
        """A layer with the donor's weights in it, mixer apart.

        Raises:
            CheckpointError: names the layer.
        """
        with self._shared_loaded(), self.loader.loaded([self.layer_names[index]], f"layer {index}"):
            yield self.layers[index]

    @contextmanager
    def _shared_loaded(self) -> Generator[None]:
        """What the decoder has besides layers and embedding (norms, learned positions)."""
        own = [
            name for name, _ in self.decoder.named_parameters()
            if f"{self.decoder_name}.{name}" != self.embedding_name
            and not any(f"{self.decoder_name}.{name}".startswith(f"{layer}.") for layer in self.layer_names)
        ]  # fmt: skip
        with self.loader.loaded([f"{self.decoder_name}.{name}" for name in own], "the decoder's norms"):
            yield

    @torch.no_grad()
    def run_layer(
        self, index: int, hidden: Float[Tensor, "B T D"], **arguments: Any
    ) -> Float[Tensor, "B T D"]:
        """A layer's output; ``arguments`` are the decoder's (position_ids, segment_ids…)."""
        return self._run(index, hidden, arguments)

    def run_attention(
        self, index: int, mixer: HybridMixer, hidden: Float[Tensor, "B T D"], **arguments: Any
    ) -> None:
        """A layer up to its attention: the mixer's observer is called, and the rest left out."""
        observer = mixer.observer
        assert observer is not None

        def last(seen_by: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
            observer(seen_by, inputs, output)
            raise _AttentionSeen

        mixer.observer = last
        try:
            self._run(index, hidden, arguments)
        except _AttentionSeen:
            pass
        finally:
            mixer.observer = observer

    def _run(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        arguments = {"use_cache": False, **arguments}
        # the decoder may scale what it embeds, or add positions; these are hidden states already
        self._enter = lambda entered, other: hidden if entered == index else other
        self._active = index
        try:
            self.decoder(inputs_embeds=hidden, **arguments)
        except _Done as done:
            return done.output
        finally:
            self._active = None
        raise AssertionError(f"layer {index} was not reached")

    @contextmanager
    def embedding_loaded(self, tokens: Int[Tensor, "..."]) -> Generator[Callable[..., Tensor]]:
        """A function from token ids [B, T], all among ``tokens``, to what the first layer gets [B, T, D]."""
        known = tokens.unique()
        whole = self._embedding.weight
        compact = nn.Parameter(
            self.loader.embedding_rows(self.embedding_name, known.cpu()), requires_grad=False
        )

        def leave(_: int, entered: Tensor) -> Tensor:
            raise _Done(entered)

        @torch.no_grad()
        def embed(input_ids: Tensor, **arguments: Any) -> Tensor:
            self._enter = leave
            ids = torch.searchsorted(known, input_ids.cpu()).to(self.loader.device)
            try:
                self.decoder(input_ids=ids, use_cache=False, **arguments)
            except _Done as done:
                return done.output
            raise AssertionError("no layer was reached")

        try:
            self._embedding.weight = compact
            with self._shared_loaded():
                yield embed
        finally:
            self._embedding.weight = whole

    @contextmanager
    def head_loaded(self) -> Generator[Callable[[Tensor, Tensor], tuple[float, int]]]:
        """A function from the last layer's output [B, T, D] and labels [B, T] to (sum of losses, labels
        counted); losses are the next token's, in nats."""
        own = [
            name for name, _ in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(f"{self.decoder_name}.")
        ]  # fmt: skip

        @torch.no_grad()
        def loss(hidden: Tensor, labels: Tensor) -> tuple[float, int]:
            total, count = 0.0, 0
            for row, wanted in zip(hidden, labels, strict=True):
                positions = (wanted[1:] != -100).nonzero().squeeze(1)
                for chosen in positions.split(TOKENS_AT_ONCE):
                    logits = self._logits(row[None, chosen])[0].float()
                    total += nn.functional.cross_entropy(
                        logits, wanted[chosen + 1].to(logits.device), reduction="sum"
                    ).item()
                    count += len(chosen)
            return total, count

        with self._shared_loaded(), self.loader.loaded(own, "the output head"):
            yield loss

    def _logits(self, hidden: Tensor) -> Tensor:
        """The head on tokens apart from one another: the layers, which would mix them, pass them on."""
        last = len(self.layers) - 1
        self._enter = lambda entered, other: hidden if entered == last else other
        return self.model(inputs_embeds=hidden, use_cache=False).logits
