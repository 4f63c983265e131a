"""Taking mixers out of a hybrid that ships with transformers, and putting them back.

Shapes: B batch, T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from equipoise.audit.native_types import HOLDINGS, ROLES, NativeType, Role, native_type, supported, text_type
from equipoise.models.families import ConversionError

Replace = Callable[["Place", Tensor], Tensor]


class Place(NamedTuple):
    """Where a mixer is: index of the decoder layer, and its role there."""

    layer: int
    role: Role


@dataclass(frozen=True)
class Mixer:
    """A mixer of a model.

    Attributes:
        place: layer and role.
        path: of the module in the model.
        module: which several layers may share (Zamba).
    """

    place: Place
    path: str
    module: nn.Module = field(repr=False, compare=False)


def find_mixers(model: nn.Module) -> tuple[NativeType, list[Mixer]]:
    """The model's entry in the table, and its mixers by layer and role.

    Raises:
        ConversionError: a type that is not in the table; layers that hold other mixers than the table says
            (another version of transformers may name its classes differently); or mixers of one role only.
    """
    untyped: Any = model
    kind = native_type(untyped.config)
    if kind is None:
        raise ConversionError(
            f"expected a hybrid that ships with transformers ({supported()}), got {type(model).__name__}."
        )
    names = {id(module): name for name, module in model.named_modules()}
    mixers: list[Mixer] = []
    for index, layer in enumerate(decoder_layers(model)):
        mixers += _mixers_of_layer(kind, index, layer, names)
    missing: list[Role] = [role for role in ROLES if not any(mixer.place.role == role for mixer in mixers)]
    if missing:
        raise ConversionError(
            f"expected mixers of both kinds, got a {text_type(untyped.config)} without any "
            f"{kind.of(missing[0]).name}: there is nothing to compare."
        )
    return kind, mixers


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of the model's decoder, in order."""
    untyped: Any = model
    return list(untyped.get_decoder().layers)


def _mixers_of_layer(kind: NativeType, index: int, layer: nn.Module, names: Mapping[int, str]) -> list[Mixer]:
    roles: dict[str, Role] = {kind.of(role).name: role for role in ROLES}
    found = [
        Mixer(Place(index, roles[type(module).__name__]), names[id(module)], module)
        for module in layer.modules()
        if type(module).__name__ in roles
    ]
    counts = tuple(sum(mixer.place.role == role for mixer in found) for role in ROLES)
    if counts not in HOLDINGS[kind.arrangement]:
        raise ConversionError(
            f"layer {index} ({type(layer).__name__}) holds {counts[0]} {kind.attention.name} and {counts[1]} "
            f"{kind.linear.name}, which no layer of this type ({kind.arrangement}) should. The table is "
            "that of transformers 5.23: install it, or correct NATIVE_TYPES in equipoise.audit.native_types."
        )
    return sorted(found, key=lambda mixer: mixer.place)


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Evaluation mode for the time of the block; every module's plain attributes are as before afterwards.

    Attributes matter beside the training flag: RecurrentGemma keeps its recurrent state in the module.
    """
    before = [(module, _attributes(module)) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, attributes in before:
            for name in _attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


@contextmanager
def intercepted(
    model: nn.Module, kind: NativeType, mixers: Sequence[Mixer], replace: Replace
) -> Generator[None]:
    """Pass the output [B, T, C] of every mixer given through `replace`, for the time of the block.

    A module that several layers share is told apart by the layer that runs at the moment. All hooks are
    removed afterwards, whatever happens in the block.

    Raises:
        ConversionError: in the forward pass, if a mixer returns something else than the table says.
    """
    running = [-1]
    by_module: dict[nn.Module, dict[int, Place]] = {}
    for mixer in mixers:
        by_module.setdefault(mixer.module, {})[mixer.place.layer] = mixer.place
    handles: list[RemovableHandle] = []
    try:
        for index, layer in enumerate(decoder_layers(model)):
            handles.append(layer.register_forward_pre_hook(_noting(running, index)))
        for module, places in by_module.items():
            handles.append(module.register_forward_hook(_replacing(kind, places, running, replace)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noting(running: list[int], index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any) -> None:
        running[0] = index

    return hook


def _replacing(
    kind: NativeType, places: Mapping[int, Place], running: list[int], replace: Replace
) -> Callable[..., Any]:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
        place = places.get(running[0])
        if place is None:
            return None  # a shared module, in a layer that is not asked about
        returns = kind.of(place.role).returns
        if isinstance(output, tuple) != (returns == "tuple"):
            raise ConversionError(
                f"expected {type(module).__name__} to return a {returns}, got {type(output).__name__}; "
                "correct its entry in equipoise.audit.native_types."
            )
        if isinstance(output, tuple):
            return (replace(place, output[0]), *output[1:])
        return replace(place, output)

    return hook


@contextmanager
def ablated(
    model: nn.Module,
    places: Collection[Place],
    means: Mapping[Place, Float[Tensor, "C"]] | None = None,
) -> Generator[None]:
    """The model without the mixers at `places`, for the time of the block.

    Args:
        model: of a type in the table.
        places: of the mixers to take out.
        means: what to put in place of their outputs, the same at every token; None for zeros.

    Raises:
        ConversionError: as `find_mixers`.
        ValueError: a place without a mixer.
    """
    kind, mixers = find_mixers(model)
    chosen = [mixer for mixer in mixers if mixer.place in places]
    if len(chosen) < len(set(places)):
        absent = sorted(set(places) - {mixer.place for mixer in chosen})
        raise ValueError(f"expected places of mixers, got {absent}, where there is none; see find_mixers")

    def replace(place: Place, output: Tensor) -> Tensor:
        if means is None:
            return torch.zeros_like(output)
        return means[place].to(output).expand_as(output)

    with intercepted(model, kind, chosen, replace):
        yield


@dataclass
class MeanOutputs:
    """Running means of mixers' outputs over tokens; float64."""

    sums: dict[Place, Tensor] = field(default_factory=dict[Place, Tensor])
    tokens: dict[Place, int] = field(default_factory=dict[Place, int])

    def observe(self, place: Place, output: Float[Tensor, "B T C"]) -> Tensor:
        """Add an output, and give it back as it is."""
        total = output.detach().double().sum((0, 1))
        self.sums[place] = self.sums[place] + total if place in self.sums else total
        self.tokens[place] = self.tokens.get(place, 0) + output.shape[0] * output.shape[1]
        return output

    def means(self) -> dict[Place, Tensor]:
        """[C] for every place seen."""
        return {place: total / self.tokens[place] for place, total in self.sums.items()}
