"""Which calls the kernels take, and which of the kernels a call needs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from equipoise.ops import step, with_sinks
from equipoise.ops.stream import unsupported as unsupported_by_stream
from equipoise.ops.triton import backward, decode, forward, transfer
from equipoise.ops.triton.interpreting import interpreting, mend
from equipoise.ops.types import AttentionState, Call, Donor

LARGEST = 256
"""Largest head_dim that a program holds at once."""

if interpreting():
    mend()


def unsupported(call: Call) -> str | None:
    """Why the kernels cannot take a call; None if they can. Their limits are those of `equipoise.ops.stream`,
    and a device."""
    reason = _misplaced(call.q)
    if reason is not None:
        return reason
    if max(call.q.shape[3], call.v.shape[3]) > LARGEST:
        return f"head_dim above {LARGEST}"
    if call.sink_logits is not None:
        return "learned sink logits"
    return unsupported_by_stream(call)


def unsupported_transfer(phi_q: Tensor, donor: Donor) -> str | None:
    """Why the kernels cannot take a transfer loss; None if they can."""
    reason = _misplaced(donor.q) or _misplaced(phi_q)
    if reason is None and donor.q.shape[3] > LARGEST:
        return f"head_dim above {LARGEST}"
    if reason is None and donor.sink_logits is not None:
        return "learned sink logits"
    return reason


def _misplaced(tensor: Tensor) -> str | None:
    """What is wrong with the device of an input, or with its type there."""
    device, dtype = tensor.device.type, tensor.dtype
    if interpreting():
        if device != "cpu":
            return "on an accelerator while TRITON_INTERPRET is set"
    elif device != "cuda":
        return f"on {device!r}: kernels need CUDA, or TRITON_INTERPRET=1 in the environment from the start"
    elif dtype == torch.float64:
        return "float64 on an accelerator"
    return None


def run(call: Call, output_final_state: bool, *, gradient: bool) -> tuple[Tensor, AttentionState | None]:
    """Run a supported call; with gradients there is no state on either end."""
    if step.supports(call):
        plain = call.phi_k is None or call.sinks > 0  # what the kernel of one step leaves out
        out, state = step.run(call) if plain else decode.run(call)
        return out, state if output_final_state else None
    if call.state is not None:
        call = replace(call, state=call.state.settled())
    if call.sinks:
        return with_sinks.run(call, forward, backward, output_final_state)
    if gradient:
        return backward.run(call), None
    return forward.run(call, output_final_state)


def run_transfer(phi_q: Tensor, phi_k: Tensor, donor: Donor) -> Tensor:
    """Run a supported transfer loss."""
    return transfer.run(phi_q, phi_k, donor)
