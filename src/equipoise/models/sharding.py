"""FSDP2 for donors larger than one device: frozen weights in shards, what trains whole on every rank.

Each decoder layer is sharded on its own, and gathered while it runs; mixers stay out of it, as do the
adapters that a stage adds later. A donor never trains, so nothing is ever reduced over shards: gradients of
what trains are averaged by `equipoise.train.parallel` (docs/adr/0017).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from equipoise.distributed import broadcast, from_leader, meet, ranks
from equipoise.layers.interface import mixers_of
from equipoise.models.layout import decoder_layers

_DECODE = "_equipoise_decode"


def empty_donor(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a configuration whose weights are memory that nobody has touched yet: addresses, no pages.

    What `shard` cuts out of it is all that becomes real.
    """
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def shard(model: PreTrainedModel) -> None:
    """Shard a model over all ranks in place, with the leader's weights; call it on all of them.

    Only the leader's weights are read, whatever their dtype: the others' may come from `empty_donor`. They
    are handed out tensor by tensor.
    """
    owner: Any = model
    whole: dict[str, Tensor] = {name: p.detach() for name, p in _tensors(owner).items()}
    dtypes = from_leader({name: tensor.dtype for name, tensor in whole.items()})
    for name, tensor in _tensors(owner).items():
        tensor.requires_grad_(False)
        if tensor.dtype != dtypes[name]:  # the files', which a configuration may not know
            tensor.data = torch.empty(tensor.shape, dtype=dtypes[name], device=tensor.device)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if kind == "cuda" else kind)
    meet()  # the leader may have been reading for long; from here on ranks wait for one another only so much
    mesh = init_device_mesh(kind, (ranks().count,))
    kept = {parameter for mixer in mixers_of(model) for parameter in mixer.parameters()}
    for mixer in mixers_of(model):
        mixer.to(device)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept, reshard_after_forward=True)
    for name, tensor in _tensors(owner).items():
        _hand_out(tensor, whole[name], device)
        del whole[name]
    setattr(owner, _DECODE, MethodType(_decode, owner))
    register_fsdp_forward_method(model, _DECODE)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _hand_out(tensor: Tensor, whole: Tensor, device: torch.device) -> None:
    """Overwrite a tensor with the leader's ``whole`` one, or with this rank's shard of it."""
    is_leader = ranks().is_leader
    source = whole.to(device) if is_leader else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, DTensor):
        piece = distribute_tensor(source, tensor.device_mesh, tensor.placements)
        tensor.to_local().copy_(piece.to_local())
    else:
        broadcast([source])
        tensor.copy_(source)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model went through `shard`."""
    return isinstance(model, FSDPModule)


def _decode(model: Any, **inputs: Any) -> Any:
    return model.get_decoder()(**inputs)


def run_decoder(model: nn.Module, **inputs: Any) -> Any:
    """The decoder alone, without the head; also of a sharded model, which only its own forward gathers."""
    decode = getattr(model, _DECODE, None)
    return _decode(model, **inputs) if decode is None else decode(**inputs)


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """A sharded model's state on the leader's CPU, and none of it elsewhere; call it on all ranks.

    None for a model that is not sharded, whose own state will do.
    """
    if not is_sharded(model):
        return None
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks().is_leader:
            weights[name] = full.cpu()
    return weights


@contextmanager
def own_class(model: nn.Module) -> Generator[None]:
    """The model under its own class for the time of the block: FSDP2's has a name that must not be saved."""
    before = type(model)
    if is_sharded(model):
        model.__class__ = before.__mro__[2]  # (FSDP…, FSDPModule, the model's own)
    try:
        yield
    finally:
        model.__class__ = before
