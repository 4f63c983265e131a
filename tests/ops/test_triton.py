"""The Triton kernels against the definitions: outputs, gradients and states, in every configuration.

On CPU they run in Triton's interpreter, in float64 and so to the last digits; with CUDA the same checks run
on the device (`-m gpu`), in float32 and bfloat16.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import AttentionState, Branches, dispatch, hybrid_attention
from equipoise.ops.dispatch import BackendError, backend
from equipoise.ops.reference import hybrid_attention_reference
from kernel_checks import (
    RULES,
    assert_agree,
    assert_same_end,
    by_sizes,
    found,
    lengths_and_mixings,
)
from support import PositiveMap, attention_inputs, normal, padding_mask, segments_of

pytest.importorskip("triton")
from equipoise.ops.triton.configs import CONFIGS, WIDE, Config, config_for, using

SMALL = CONFIGS[-1]


class Setting:
    """One combination of settings and its inputs: one row of two query heads on one key head."""

    def __init__(
        self, length: int, *, maps: int = 2, padding: str = "none", packed: bool = False, batch: int = 1,
        features: int = 7, per_token: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        inputs = attention_inputs(length, batch=batch, heads=2, kv=1, seed=1)
        phi = PositiveMap(2, features=features, seed=1), PositiveMap(maps, features=features, seed=2)
        with torch.no_grad():
            self.tensors = [*inputs, phi[0](inputs[0]), phi[1](inputs[1])]
        self.gate = normal(batch, 2, length if per_token else 1, seed=3).sigmoid()
        mask = padding_mask(padding, length, batch=batch)
        segments = segments_of(length, batch=batch, share=0.03) if packed else None
        self.options = {"window": 21, **options}
        self.masks = {"key_mask": mask, "segment_ids": segments}
        self.grad = normal(batch, 2, length, 5, seed=9)

    def ours(self, place: tuple[str, torch.dtype]) -> list[Tensor]:
        """Output and gradients by the kernels, in float64 on the CPU."""
        device, dtype = place
        tensors = [x.to(device, dtype, copy=True).requires_grad_() for x in self.tensors]
        wide = torch.promote_types(dtype, torch.float32)
        gate = self.gate.to(device, wide, copy=True).requires_grad_()
        masks = {name: None if x is None else x.to(device) for name, x in self.masks.items()}
        out, _ = hybrid_attention(*tensors, gate=gate, **self.options, **masks)
        (out * self.grad.to(device, dtype)).sum().backward()
        return found(out, [*tensors, gate])

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by the definitions, in float64 but from inputs rounded as ours are."""
        tensors = [x.to(dtype, copy=True).double().requires_grad_() for x in self.tensors]
        gate = self.gate.clone().requires_grad_()
        out = hybrid_attention_reference(*tensors, gate=gate, **self.options, **self.masks)
        (out * self.grad.to(dtype).double()).sum().backward()
        return found(out, [*tensors, gate])


def check(setting: Setting, config: Config, place: tuple[str, torch.dtype]) -> None:
    with using(config):
        ours = setting.ours(place)
    names = ("output", "q", "k", "v", "phi_q", "phi_k", "gate")
    assert_agree(names, ours, setting.expected(place[1]), place[1])


SINKS: tuple[dict[str, Any], ...] = (
    {"mixing": "convex", "sinks": 2, "packed": True},
    {"mixing": "calibrated", "sinks": 3, "padding": "left", "softcap": 3.0},
)


@pytest.mark.parametrize("options", [*RULES, *SINKS])
def test_outputs_and_gradients(options: dict[str, Any], place: tuple[str, torch.dtype]) -> None:
    check(Setting(70, **options), SMALL, place)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "options"), lengths_and_mixings())
def test_lengths_and_mixings(length: int, options: dict[str, Any], place: tuple[str, torch.dtype]) -> None:
    check(Setting(length, **options), SMALL, place)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=by_sizes)
@pytest.mark.parametrize("mixing", ["convex", "shared", "calibrated"])
def test_every_configuration(mixing: str, config: Config, place: tuple[str, torch.dtype]) -> None:
    """More than a chunk; more features than a block holds; padding and segments; a state that lags."""
    setting = Setting(
        config.chunk + 2 * config.queries + 5, mixing=mixing, overlap=mixing == "calibrated", packed=True,
        padding="left",
        features=config.features + 5, window=37,
    )  # fmt: skip
    check(setting, config, place)


@pytest.mark.parametrize(
    "branches",
    [
        Branches(True, False),
        Branches(False, True, "renormalised"),
        Branches(torch.tensor([[True, False]]), torch.tensor([True])),
    ],
)
def test_branches(branches: Branches, place: tuple[str, torch.dtype]) -> None:
    check(Setting(20, branches=branches, window=5, per_token=False), SMALL, place)


def test_linear_attention_alone(place: tuple[str, torch.dtype]) -> None:
    check(Setting(20, window=None), SMALL, place)


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_window_alone(sinks: int, place: tuple[str, torch.dtype]) -> None:
    """Outputs and gradients; then a state, and steps of decoding from it."""
    device, dtype = place
    given = [x.to(device, dtype) for x in Setting(20).tensors[:3]]
    q, k, v = (x.clone().requires_grad_() for x in given)
    with using(SMALL), backend("triton"):
        out, _ = hybrid_attention(q, k, v, None, None, window=5, sinks=sinks)
    weights = normal(*out.shape, seed=9)
    (out * weights.to(device, dtype)).sum().backward()
    wide = [x.double().cpu().requires_grad_() for x in given]
    expected = hybrid_attention_reference(wide[0], wide[1], wide[2], None, None, window=5, sinks=sinks)
    (expected * weights.to(dtype).double()).sum().backward()
    assert_agree(("output", "q", "k", "v"), found(out, [q, k, v]), found(expected, wide), dtype)

    def decoded(name: str) -> tuple[Tensor, AttentionState]:
        outs, state = [], None
        with backend(name), torch.no_grad(), using(SMALL):
            for start, stop in ((0, 17), (17, 18), (18, 19), (19, 20)):
                q, k, v = (x[:, :, start:stop] for x in given)
                out, state = hybrid_attention(
                    q, k, v, None, None, window=5, sinks=sinks, initial_state=state, output_final_state=True
                )
                outs.append(out)
        assert state is not None
        return torch.cat(outs, 2), state

    assert_same_end(decoded("triton"), decoded("walk"), dtype)


def run_parts(
    setting: Setting, cuts: list[int], device: str, dtype: torch.dtype, *, maps: Any = None
) -> tuple[Tensor, AttentionState]:
    """The sequence in parts, each resumed from the last one's state."""
    tensors = [x.to(device, dtype) for x in setting.tensors]
    outs, state = [], None
    with torch.no_grad():
        for start, stop in itertools.pairwise(cuts):
            part = [x[:, :, start:stop] for x in tensors]
            masks = {n: None if x is None else x[:, start:stop].to(device) for n, x in setting.masks.items()}
            gate = setting.gate[..., start:stop].to(device, torch.promote_types(dtype, torch.float32))
            out, state = hybrid_attention(
                *part[:3], *(maps or part[3:]), gate=gate, initial_state=state, output_final_state=True,
                **masks, **setting.options,
            )  # fmt: skip
            outs.append(out)
    assert state is not None
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("as_maps", [False, True])
@pytest.mark.parametrize("overlap", [True, False])
def test_states(overlap: bool, as_maps: bool, place: tuple[str, torch.dtype]) -> None:
    """Split and resumed, shorter than the window at first; the state is what the general path leaves."""
    device, dtype = place
    maps = None
    if as_maps:
        maps = tuple(PositiveMap(2, seed=s).to(device).requires_grad_(False) for s in (1, 2))
    setting = Setting(41, overlap=overlap, window=10, packed=True, padding="holes")
    with using(SMALL):
        ours = run_parts(setting, [0, 4, 40, 41], device, dtype, maps=maps)
    with backend("walk"):
        assert_same_end(ours, run_parts(setting, [0, 41], device, dtype, maps=maps), dtype)


def test_padding_may_hold_anything(place: tuple[str, torch.dtype]) -> None:
    setting = Setting(20, padding="left", window=5)
    mask = setting.masks["key_mask"]
    assert mask is not None
    for tensor in setting.tensors:
        tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    check(setting, SMALL, place)


def test_strided_inputs(place: tuple[str, torch.dtype]) -> None:
    """[B, T, H, D] transposed, as transformers passes them."""
    setting = Setting(20, window=5)
    setting.tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in setting.tensors]
    check(setting, SMALL, place)


def test_half_precision() -> None:
    """Products of bfloat16 numbers, sums of float32."""
    if torch.cuda.is_available():
        pytest.skip("covered on the device")
    setting = Setting(40, window=9)
    with backend("triton"):
        check(setting, SMALL, ("cpu", torch.bfloat16))


# ---- dispatch


def on_the_device() -> tuple[list[Tensor], list[PositiveMap]]:
    """q, k, v and feature maps where the kernels run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [x.to(device, torch.float32) for x in attention_inputs(9)]
    return inputs, [PositiveMap(4, seed=seed).to(device) for seed in (1, 2)]


def test_what_the_kernels_leave_to_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, phi = on_the_device()
    refused = [
        ({"sinks": 1, "overlap": False}, r"triton backend cannot run sinks.*auto"),
        ({"layout": "terraced"}, "terraced"),
        ({"sink_logits": torch.zeros(4, device=inputs[0].device)}, "learned sink logits"),
        ({"output_final_state": True}, "gradients through a state"),
    ]
    with backend("triton"):
        for options, reason in refused:
            with pytest.raises(BackendError, match=reason):
                hybrid_attention(*inputs, *phi, window=4, **options)
        monkeypatch.setattr(dispatch, "_kernels", lambda: None)
        with pytest.raises(BackendError, match=r"equipoise\[gpu\]"):
            hybrid_attention(*inputs, *phi, window=4)


def test_falling_back_on_a_device_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` on CUDA, whose calls end here: see `dispatch.run`."""
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr(dispatch, "run", lambda call, last: dispatch._run_triton(call, last, insist=False))
    inputs, phi = on_the_device()
    with caplog.at_level("INFO", logger="equipoise.ops"):
        out, again = (hybrid_attention(*inputs, *phi, window=4, sinks=1, overlap=False)[0] for _ in range(2))
    assert torch.equal(out, again)
    assert caplog.messages == ["the slower general path runs: sinks"]


def test_without_interpreter_or_device_the_backend_is_refused() -> None:
    code = (
        "import torch; from equipoise.ops import hybrid_attention; from equipoise.ops.dispatch import *\n"
        "x = torch.zeros(1, 1, 3, 16)\n"
        "try: hybrid_attention(x, x, x, x, x, window=2)\n"
        "except BackendError as error: print(error)"
    )
    environment = {
        "EQUIPOISE_BACKEND": "triton",
        "PATH": "",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert "kernels need CUDA, or TRITON_INTERPRET=1" in done.stdout, done.stderr


def test_configurations_are_checked() -> None:
    with pytest.raises(ValueError, match="multiple of queries"):
        Config(chunk=48, queries=32, keys=16, features=16, values=16, warps=4)
    assert config_for(torch.float32) is SMALL
    assert {config_for(dtype) for dtype in (torch.bfloat16, torch.float16)} == {WIDE}
    assert not WIDE.maps  # an illegal memory access on an H200


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    """Without a device: the interpreter takes more than the compiler does."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), "16", "32"], capture_output=True, text=True, timeout=600,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with_maps = sum(config.maps for config in CONFIGS)
    assert len(done.stdout.splitlines()) == len(CONFIGS) * 14 + with_maps * 8
