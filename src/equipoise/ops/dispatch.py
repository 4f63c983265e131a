"""Which implementation runs a call: the one place that decides, and says so where it is not the fast one.

`walk` is plain PyTorch and takes every call. `stream` is the fast path on CPU, `triton` the one on CUDA. The
choice can be overridden by the environment variable EQUIPOISE_BACKEND, or by `backend` for a block of code.
The transfer loss has two: `triton`, and blocks of plain PyTorch under every other name.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equipoise.ops import (
    native_step,
    step,
    stream,
    stream_backward,
    stream_forward,
    transfer_blocks,
    with_sinks,
)
from equipoise.ops.types import AttentionState, Call, Donor, needs_gradient
from equipoise.ops.walk import Walk
from equipoise.registry import unknown_name

BACKENDS = ("auto", "walk", "stream", "triton")
VARIABLE = "EQUIPOISE_BACKEND"
NOT_INSTALLED = 'without Triton; install it with pip install "equipoise[gpu]"'

_chosen: ContextVar[str | None] = ContextVar("equipoise_backend", default=None)
_said: set[str] = set()
_logger = logging.getLogger("equipoise.ops")


class BackendError(RuntimeError):
    """A backend was asked for that cannot run this call."""


@contextmanager
def backend(name: str) -> Generator[None]:
    """Run the operators on one backend for the time of the block: a name of `BACKENDS`.

    Raises:
        UnknownNameError: no such backend.
    """
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def wanted() -> str:
    """The backend asked for, `auto` where none is.

    Raises:
        UnknownNameError: the environment names one that does not exist.
    """
    name = _chosen.get() or os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        raise unknown_name(f"backend (in {VARIABLE})", name, BACKENDS)
    return name


def run(call: Call, output_final_state: bool) -> tuple[Tensor, AttentionState | None]:
    """Run a checked call.

    Raises:
        BackendError: the backend asked for cannot run it.
    """
    if torch.compiler.is_compiling():
        return _run_traced(call, output_final_state)
    name = wanted()
    if name == "triton" or (name == "auto" and call.q.device.type == "cuda"):
        return _run_triton(call, output_final_state, insist=name == "triton")
    call = _settled(call)
    if name == "walk":
        return Walk(call).run(output_final_state)
    reason = _why_not_stream(call, output_final_state)
    if reason is None:
        return _run_stream(call, output_final_state)
    if name == "stream":
        raise BackendError(f"the stream backend cannot run {reason}; use EQUIPOISE_BACKEND=auto.")
    return _fall_back(call, output_final_state, reason)


def _run_stream(call: Call, output_final_state: bool) -> tuple[Tensor, AttentionState | None]:
    if step.supports(call) and not needs_gradient(call):
        out, state = (native_step if native_step.supports(call) else step).run(call)
        return out, state if output_final_state else None
    if call.sinks:
        return with_sinks.run(call, stream_forward, stream_backward, output_final_state)
    if needs_gradient(call):
        return stream_backward.run(call), None
    return stream_forward.run(call, output_final_state)


def run_transfer(phi_q: Tensor, phi_k: Tensor, donor: Donor) -> Tensor:
    """The transfer cross-entropy of every row [B, H, T].

    Raises:
        BackendError: the backend asked for cannot run it.
    """
    name = wanted()
    if name == "triton" or (name == "auto" and donor.q.device.type == "cuda"):
        return _transfer_triton(phi_q, phi_k, donor, insist=name == "triton")
    return transfer_blocks.run(phi_q, phi_k, donor)


def may_use_kernels() -> bool:
    """Whether the backend asked for leaves the delta rule to kernels that can run a call. They are never
    insisted on: a call of some heads by the rule and others not asks for `triton` for the others."""
    return not torch.compiler.is_compiling() and wanted() in ("auto", "triton")


def _transfer_triton(phi_q: Tensor, phi_k: Tensor, donor: Donor, *, insist: bool) -> Tensor:
    kernels = _kernels()
    reason = NOT_INSTALLED if kernels is None else kernels.unsupported_transfer(phi_q, donor)
    if kernels is not None and reason is None:
        return kernels.run_transfer(phi_q, phi_k, donor)
    if insist:
        raise _refusal(str(reason))
    say(str(reason))
    return transfer_blocks.run(phi_q, phi_k, donor)


def _run_traced(call: Call, output_final_state: bool) -> tuple[Tensor, AttentionState | None]:
    """What torch.compile records: plain PyTorch that looks at no value, whatever backend was asked for."""
    if stream.unsupported(call) is None and step.supports(call):
        out, state = step.run(call)
        return out, state if output_final_state else None
    return Walk(call).run(output_final_state)


def _fall_back(call: Call, output_final_state: bool, reason: str) -> tuple[Tensor, AttentionState | None]:
    say(reason)
    return Walk(_settled(call)).run(output_final_state)


def _settled(call: Call) -> Call:
    """The call for backends that know of no tokens waiting beside S, which a step by Triton may leave."""
    if call.state is None or call.state.pending is None:
        return call
    return replace(call, state=call.state.settled())


def say(reason: str) -> None:
    """Log once why the fast path is not taken."""
    if reason not in _said:
        _said.add(reason)
        _logger.info("the slower general path runs: %s", reason)


def _refusal(reason: str) -> BackendError:
    return BackendError(f"the triton backend cannot run {reason}; use EQUIPOISE_BACKEND=auto.")


def _run_triton(
    call: Call, output_final_state: bool, *, insist: bool
) -> tuple[Tensor, AttentionState | None]:
    kernels = _kernels()
    gradient = needs_gradient(call)
    if kernels is None:
        reason = NOT_INSTALLED
    elif gradient and (call.state is not None or output_final_state):
        reason = "gradients through a state"
    else:
        reason = kernels.unsupported(call)
    if kernels is not None and reason is None:
        return kernels.run(call, output_final_state, gradient=gradient)
    if insist:
        raise _refusal(str(reason))
    return _fall_back(call, output_final_state, str(reason))


def _kernels() -> Any:
    """The package of kernels, which imports Triton; None where that is not installed."""
    try:
        return importlib.import_module("equipoise.ops.triton")
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "triton":
            raise
        return None


def _why_not_stream(call: Call, output_final_state: bool) -> str | None:
    if call.q.device.type != "cpu" and wanted() == "auto":
        return "on an accelerator"
    if needs_gradient(call) and (call.state is not None or output_final_state):
        return "gradients through a state"
    return stream.unsupported(call)
