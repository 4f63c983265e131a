"""The fast CPU paths against the general one: outputs, gradients and states, over all they take."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import Branches, dispatch, hybrid_attention, native_step, walk, window_attention
from equipoise.ops.dispatch import BackendError, backend
from equipoise.registry import UnknownNameError
from support import PositiveMap, attention_inputs, normal, padding_mask, segments_of

CELLS = normal(2, 4, seed=5) < 0
ROWS = torch.tensor([True, False])
STATES = [
    Branches(),
    Branches(True, False),
    Branches(False, True),
    Branches(False, False),
    Branches(True, False, "renormalised"),
    Branches(False, True, "renormalised"),
    Branches(ROWS, True),
    Branches(~ROWS, ROWS, "renormalised"),
    Branches(CELLS, True, "renormalised"),
]
GRID = list(
    itertools.product(
        ("convex", "shared", "calibrated"), (True, False), ("none", "left", "holes"), (False, True),
        (True, False), (True, False), (1, 37, 150), (1, 5, 20), (None, 3.0), (0, 3),
    )
)  # fmt: skip
NAMES = [
    "mixing", "overlap", "padding", "packed", "tensors", "per_kv_head", "length", "window", "softcap",
    "sinks",
]  # fmt: skip


def sample(count: int, seed: int) -> list[Any]:
    """A seeded choice of settings, with a branch state and a form of gate each."""
    rng = random.Random(seed)
    gates = ("number", "per head", "per token")
    return [
        {
            **dict(zip(NAMES, values, strict=True)),
            "branches": rng.choice(STATES),
            "gate": rng.choice(gates),
            "sink": rng.choice((True, False)),
        }
        for values in rng.sample(GRID, count)
    ]


class Setting:
    """One combination, made concrete."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.length = case, case["length"]
        self.inputs = attention_inputs(self.length, seed=1)
        self.maps = PositiveMap(4, seed=1), PositiveMap(2 if case["per_kv_head"] else 4, seed=2)
        self.mask = padding_mask(case["padding"], self.length)
        self.segments = segments_of(self.length) if case["packed"] else None
        gates = {
            "number": 0.3,
            "per head": normal(4, 1, seed=3).sigmoid(),
            "per token": normal(2, 4, self.length).sigmoid(),
        }
        self.gate: Any = gates[case["gate"]]
        if case["mixing"] == "calibrated":  # whose gate is a score
            self.gate = 8 * self.gate - 4
        self.sink_logits = normal(4, seed=8) if case["sink"] else None
        chosen = ("mixing", "overlap", "window", "softcap", "branches", "sinks")
        self.options = {name: case[name] for name in chosen}

    def call(
        self, part: slice, q: Tensor, k: Tensor, v: Tensor, gate: Any, **more: Any
    ) -> tuple[Tensor, Any]:
        phi_q, phi_k = self.maps
        maps = (phi_q(q), phi_k(k)) if self.case["tensors"] else self.maps
        return hybrid_attention(
            q[:, :, part], k[:, :, part], v[:, :, part],
            *(phi[:, :, part] if isinstance(phi, Tensor) else phi for phi in maps),
            gate=gate[..., part] if isinstance(gate, Tensor) and gate.shape[-1] > 1 else gate,
            key_mask=None if self.mask is None else self.mask[:, part],
            segment_ids=None if self.segments is None else self.segments[:, part],
            sink_logits=self.sink_logits, chunk_size=16, **self.options, **more,
        )  # fmt: skip

    def split(self, name: str, cuts: Sequence[int] = ()) -> list[Tensor]:
        """Outputs and final state of the sequence cut into uneven parts, single tokens among them."""
        cuts = cuts or sorted(
            {0, *(min(cut, self.length) for cut in (self.length // 3, self.length // 3 + 1, 30)), self.length}
        )
        outs, state = [], None
        with backend(name), torch.no_grad():
            for start, stop in itertools.pairwise(cuts):
                out, state = self.call(
                    slice(start, stop), *self.inputs, self.gate, initial_state=state, output_final_state=True
                )
                outs.append(out)
        return [torch.cat(outs, 2), *(tensor.double() for tensor in state.tensors())]

    def gradients(self, name: str) -> list[Tensor]:
        """Output and gradients of everything that has one."""
        q, k, v = (x.clone().requires_grad_() for x in self.inputs)
        gate = self.gate.clone().requires_grad_() if isinstance(self.gate, Tensor) else self.gate
        if self.sink_logits is not None:
            self.sink_logits = self.sink_logits.detach().requires_grad_()
        for phi in self.maps:
            phi.weight.grad = None
        with backend(name):
            out, _ = self.call(slice(None), q, k, v, gate)
        (out * normal(*out.shape, seed=9)).sum().backward()
        found = [x.grad for x in (q, k, v, *(phi.weight for phi in self.maps))]
        if isinstance(gate, Tensor):
            found.append(gate.grad)
        if self.sink_logits is not None:
            found.append(self.sink_logits.grad)
        return [out.detach(), *(torch.zeros(()) if grad is None else grad for grad in found)]


def assert_equal(ours: list[Tensor], general: list[Tensor]) -> None:
    assert len(ours) == len(general)
    for one, other in zip(ours, general, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def check(case: dict[str, Any]) -> None:
    setting = Setting(case)
    for way in (setting.split, setting.gradients):
        try:
            ours = way("stream")
        except BackendError:  # left to the general path; `test_what_stream_leaves_to_walk` lists why
            continue
        assert_equal(ours, way("walk"))


@pytest.mark.parametrize("case", sample(40, seed=0))
def test_stream_equals_walk(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(240, seed=1))
def test_stream_equals_walk_in_more_settings(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("mixing", ["convex", "calibrated"])
def test_sinks_in_every_state(mixing: str, padding: str, packed: bool) -> None:
    """Parts shorter than the window first, so that sinks lie in the state, in its window, and before both."""
    case = {
        "mixing": mixing, "padding": padding, "packed": packed, "sinks": 3, "window": 9, "length": 60,
        "overlap": True, "tensors": True, "per_kv_head": True, "softcap": None, "branches": Branches(),
        "gate": "per token", "sink": False,
    }  # fmt: skip
    setting = Setting(case)
    for cuts in ([0, 2, 4, 30, 60], [0, 8, 11, 12, 50, 60]):
        assert_equal(setting.split("stream", cuts), setting.split("walk", cuts))
    assert_equal(setting.gradients("stream"), setting.gradients("walk"))


def test_calibrated_mixing_where_features_vanish() -> None:
    """Queries that read nothing of the state, and keys that write nothing."""
    q, k, v = attention_inputs(40, seed=6)
    phi = [normal(2, heads, 40, 7, seed=seed).abs() for heads, seed in ((4, 1), (2, 2))]
    phi[0][:, :, ::3] = 0
    phi[1][:, :, :5] = 0
    found: list[list[Tensor]] = []
    for name in ("stream", "walk"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *phi)]
        with backend(name):
            out, _ = hybrid_attention(*leaves[:5], window=6, mixing="calibrated", gate=-1.0)
        found.append([out, *torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), leaves)])
    for one, other in zip(*found, strict=True):  # through divisions by 1e-12, one of which is undone
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def decode(
    name: str, dtype: torch.dtype, reuse: bool, options: dict[str, Any], maps: Any, padding: str
) -> Any:
    """Thirty tokens: three at once, then one by one."""
    q, k, v = (x.to(dtype) for x in attention_inputs(30, seed=3))
    mask = padding_mask(padding, 30)
    outs, state = [], None
    with backend(name), torch.no_grad():
        for start, stop in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
            part = mask[:, start:stop] if mask is not None else None
            out, state = hybrid_attention(
                *(x[:, :, start:stop] for x in (q, k, v)),
                *(phi[:, :, start:stop] if isinstance(phi, Tensor) else phi for phi in maps(q, k)),
                key_mask=None if part is None or bool(part.all()) else part,
                initial_state=state, output_final_state=True, reuse_state=reuse, gate=0.3, **options,
            )  # fmt: skip
            outs.append(out)
    assert state is not None
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("window", [2, 5, 25])
@pytest.mark.parametrize("per_kv_head", [True, False])
@pytest.mark.parametrize("tensors", [True, False])
@pytest.mark.parametrize(
    ("mixing", "overlap", "sinks"),
    [
        *itertools.product(("convex", "shared"), (True, False), (0,)),
        ("calibrated", True, 0), ("calibrated", True, 3), ("convex", True, 3),
    ],
)  # fmt: skip
def test_decoding_step(
    mixing: str, overlap: bool, sinks: int, tensors: bool, per_kv_head: bool, window: int, padding: str
) -> None:
    phi_q, phi_k = PositiveMap(4, seed=1), PositiveMap(2 if per_kv_head else 4, seed=2)

    def maps(q: Tensor, k: Tensor) -> tuple[Any, Any]:
        return (phi_q(q), phi_k(k)) if tensors else (phi_q, phi_k)

    options: dict[str, Any] = {"mixing": mixing, "overlap": overlap, "window": window, "sinks": sinks}
    options["sink_logits"] = normal(4, seed=8) if window == 5 else None
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        general, expected = decode("walk", dtype, False, options, maps, padding)
        for reuse in (False, True):  # float32 with reuse is the compiled step, where it was built
            out, state = decode("stream", dtype, reuse, options, maps, padding)
            torch.testing.assert_close(out, general, rtol=tolerance, atol=tolerance)
            for one, other in zip(state.tensors(), expected.tensors(), strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_windows_alone(sinks: int, padding: str, packed: bool) -> None:
    """Outputs, gradients, and twenty steps of decoding, for which a state is given away or not."""
    q, k, v = (x.requires_grad_() for x in attention_inputs(60, seed=4))
    mask, segments = padding_mask(padding, 60), segments_of(60) if packed else None
    options: dict[str, Any] = {"window": 7, "sinks": sinks, "sink_logits": normal(4, seed=8), "softcap": 3.0}

    def whole(name: str) -> list[Tensor]:
        with backend(name):
            out, _ = window_attention(q, k, v, key_mask=mask, segment_ids=segments, **options)
        return [out, *torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), (q, k, v))]

    def decoded(name: str, dtype: torch.dtype, *, reuse: bool = False) -> list[Tensor]:
        outs, state = [], None
        with backend(name), torch.no_grad():
            for start, stop in [(0, 40), *((i, i + 1) for i in range(40, 60))]:
                out, state = window_attention(
                    *(x[:, :, start:stop].to(dtype) for x in (q, k, v)), initial_state=state,
                    key_mask=None if mask is None or start else mask[:, :40], output_final_state=True,
                    reuse_state=reuse, **options,
                )  # fmt: skip
                outs.append(out)
        assert state is not None
        return [torch.cat(outs, 2).double(), *(tensor.double() for tensor in state.tensors())]

    assert_equal(whole("stream"), whole("walk"))
    if packed:
        return
    assert_equal(decoded("stream", torch.float64), decoded("walk", torch.float64))
    expected = decoded("walk", torch.float32)
    for reuse in (False, True):  # the second is the compiled step, where it was built
        for one, other in zip(decoded("stream", torch.float32, reuse=reuse), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(native_step.NATIVE is None, reason="the C extension was not built: no compiler")
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("mixing", "sinks"), [("convex", 0), ("shared", 0), ("calibrated", 0), ("calibrated", 3), ("convex", 3)]
)
def test_compiled_step_in_bfloat16(
    mixing: str, sinks: int, softcap: float | None, sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []
    run = native_step.run
    monkeypatch.setattr(native_step, "run", lambda call: (used.append(True), run(call))[1])
    phi_q, phi_k = PositiveMap(4, seed=1), PositiveMap(4, seed=2)
    options: dict[str, Any] = {
        "mixing": mixing,
        "overlap": True,
        "window": 5,
        "softcap": softcap,
        "sinks": sinks,
    }
    options["sink_logits"] = normal(4, seed=8, dtype=torch.bfloat16) if sink else None
    out, _ = decode("stream", torch.bfloat16, True, options, lambda q, k: (phi_q, phi_k), "none")
    general, _ = decode("walk", torch.bfloat16, False, options, lambda q, k: (phi_q, phi_k), "none")
    assert len(used) == 10
    torch.testing.assert_close(out, general, rtol=1e-2, atol=1e-2)  # both round to bfloat16 at the end


def test_a_state_is_only_changed_when_it_is_given_away() -> None:
    q, k, v = (x.float() for x in attention_inputs(12))
    phi = PositiveMap(4, seed=1), PositiveMap(4, seed=2)
    with torch.no_grad():
        _, state = hybrid_attention(
            *(x[:, :, :11] for x in (q, k, v)), *phi, window=4, output_final_state=True
        )
        assert state is not None
        before = [tensor.clone() for tensor in state.tensors()]
        for reuse, changed in ((False, False), (True, True)):
            hybrid_attention(
                *(x[:, :, 11:] for x in (q, k, v)), *phi, window=4, initial_state=state,
                output_final_state=True, reuse_state=reuse,
            )  # fmt: skip
            same = all(map(torch.equal, before, state.tensors()))
            assert same is not changed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "terraced"}, "terraced"),
        ({"window": 0, "sinks": 2}, "sinks"),
        ({"sinks": 2, "overlap": False}, "sinks"),
        ({"sinks": 2, "mixing": "shared"}, "sinks"),
        ({"mixing": "shared", "branches": Branches(False, True)}, "switched off"),
        ({"overlap": False, "branches": Branches(False, True, "renormalised")}, "renormalised"),
        ({"mixing": "calibrated", "overlap": False}, "mixing 'calibrated' of disjoint attention"),
        ({"mixing": "competing"}, "mixing 'competing'"),
    ],
)
def test_what_stream_leaves_to_walk(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    phi = PositiveMap(4, seed=1), PositiveMap(4, seed=2)

    given: dict[str, Any] = {"window": 4, **options}

    def call() -> Tensor:
        return hybrid_attention(*attention_inputs(9), *phi, **given)[0]

    with caplog.at_level(logging.INFO, logger="equipoise.ops"):
        out, again = call(), call()
    assert torch.equal(out, again)
    assert [reason in message for message in caplog.messages] == [True]  # said once
    with backend("stream"), pytest.raises(BackendError, match=reason):
        call()


def test_the_backend_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(
        dispatch.stream_forward, "run", lambda *a: (taken.append("stream"), (a[0].q, None))[1]
    )
    monkeypatch.setattr(walk.Walk, "run", lambda self, last: (taken.append("walk"), (self.call.q, None))[1])
    q, k, v = attention_inputs(5, value=6)

    def call() -> None:
        with torch.no_grad():
            hybrid_attention(q, k, v, PositiveMap(4), PositiveMap(4), window=2)

    call()
    with backend("walk"):
        call()
    monkeypatch.setenv("EQUIPOISE_BACKEND", "walk")
    call()
    with backend("auto"):
        call()
    assert taken == ["stream", "walk", "walk", "stream"]
    monkeypatch.setenv("EQUIPOISE_BACKEND", "steam")
    with pytest.raises(UnknownNameError, match="stream"):
        call()
    with pytest.raises(UnknownNameError), backend("wlak"):
        pass
