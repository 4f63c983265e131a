"""The Triton step of decoding against the general path: outputs and states, one launch a step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from equipoise.ops import AttentionState, hybrid_attention
from equipoise.ops.dispatch import backend
from kernel_checks import TOLERANCES
from support import PositiveMap, attention_inputs, normal, padding_mask

pytest.importorskip("triton")
from equipoise.ops.triton import decode
from equipoise.ops.triton.decode import SLOTS


@pytest.fixture
def place(device_and_dtype: tuple[str, torch.dtype]) -> tuple[str, torch.dtype]:
    """(device, type of the inputs); each test names its own path."""
    return device_and_dtype


def decoded(
    name: str, place: tuple[str, torch.dtype], sizes: dict[str, Any], *, maps: int, as_maps: bool,
    padding: str = "none", reuse: bool = False, prompt: int = 12, steps: int = 3, features: int = 7,
    **options: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """Outputs of single tokens after a prompt that the general path reads, and the last state."""
    device, dtype = place
    length = prompt + steps
    q, k, v = (x.to(device, dtype) for x in attention_inputs(length, seed=3, **sizes))
    heads, size = q.shape[1], q.shape[3]
    phi: tuple[Any, Any] = tuple(
        PositiveMap(count, size=size, features=features, seed=seed).to(device).requires_grad_(False)
        for count, seed in ((heads, 1), (maps, 2))
    )
    gate = normal(q.shape[0], heads, length, seed=4).sigmoid().to(device)
    mask = padding_mask(padding, prompt, batch=q.shape[0])
    outs, state = [], None
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, length))]:
        parts = [x[:, :, start:stop] for x in (q, k, v)]
        given = phi if as_maps else (phi[0](parts[0]), phi[1](parts[1]))
        with backend(name if start else "walk"), torch.no_grad():
            out, state = hybrid_attention(
                *parts, *given, gate=gate[..., start:stop], initial_state=state, output_final_state=True,
                key_mask=None if mask is None or start else mask.to(device), reuse_state=reuse and start > 0,
                **options,
            )  # fmt: skip
        outs.append(out)
    assert state is not None
    assert (state.pending is not None) is (name == "triton" and reuse)
    return [torch.cat(outs, 2), *state.settled().tensors()]


def check(place: tuple[str, torch.dtype], sizes: dict[str, Any], **options: Any) -> None:
    ours = decoded("triton", place, sizes, **options)
    general = decoded("walk", place, sizes, **{**options, "reuse": False})
    tolerance = TOLERANCES[place[1]]
    assert len(ours) == len(general)
    for one, other in zip(ours, general, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("as_maps", [False, True])
@pytest.mark.parametrize(
    ("mixing", "overlap"), [*itertools.product(("convex", "shared"), (True, False)), ("calibrated", True)]
)
def test_steps(
    mixing: str, overlap: bool, as_maps: bool, padding: str, place: tuple[str, torch.dtype]
) -> None:
    maps = 1 if mixing == "convex" else 2
    check(
        place, {"batch": 1, "heads": 2, "kv": 1},
        maps=maps, as_maps=as_maps, padding=padding, overlap=overlap, mixing=mixing, window=6,
        reuse=as_maps,
    )  # fmt: skip


@pytest.mark.parametrize("mixing", ["convex", "calibrated"])
def test_steps_with_sinks(mixing: str, place: tuple[str, torch.dtype]) -> None:
    """One leaves the window while tokens are decoded, the other one before."""
    check(
        place, {"batch": 1, "heads": 2, "kv": 1}, maps=1, as_maps=True, mixing=mixing, window=6, prompt=6,
        sinks=2,
    )  # fmt: skip


@pytest.mark.parametrize("overlap", [True, False])
def test_blocks(overlap: bool, place: tuple[str, torch.dtype]) -> None:
    """More features, values and tokens than a block holds; a window that is not full at first."""
    check(
        place, {"batch": 1, "heads": 2, "kv": 1, "value": 40}, maps=1, as_maps=False, features=37, window=71,
        prompt=69, overlap=overlap, softcap=2.0,
    )  # fmt: skip


@pytest.mark.parametrize("overlap", [True, False])
def test_tokens_wait_beside_the_sums_until_their_slots_are_full(
    overlap: bool, place: tuple[str, torch.dtype]
) -> None:
    """S is written once in `SLOTS` steps; more features and values than a block holds."""
    check(
        place, {"batch": 1, "heads": 2, "kv": 1, "value": 34}, maps=2, as_maps=False, features=34, window=3,
        prompt=5, steps=SLOTS + 2, overlap=overlap, reuse=True,
    )  # fmt: skip


@pytest.mark.parametrize(("then", "joined"), [("walk", 0), ("stream", 0), ("triton", 0), ("triton", 1)])
def test_waiting_tokens_go_along_to_other_paths_and_rows(
    then: str, joined: int, place: tuple[str, torch.dtype]
) -> None:
    """After a few steps in slots: rows picked, as beam search does, and joined by others that have none
    waiting; then several tokens at once."""
    if then == "stream" and place[0] != "cpu":
        pytest.skip("stream runs on CPU")
    device, dtype = place
    q, k, v = (x.to(device, dtype) for x in attention_inputs(12, batch=2, heads=2, kv=1, seed=3))
    phi = [PositiveMap(2, seed=seed).to(device)(x).detach() for seed, x in ((1, q), (2, k))]
    tensors = q, k, v, *phi
    rows = torch.tensor([1, 1, 0], device=device)

    def run(steps: str, rest: str) -> list[torch.Tensor]:
        outs, state = [], None
        for start, stop, name in ((0, 6, "walk"), (6, 7, steps), (7, 8, steps), (8, 9, steps), (9, 12, rest)):
            chosen = slice(None) if start < 9 else torch.cat([rows, rows.new_tensor([0, 1] * joined)])
            parts = [x[chosen, :, start:stop] for x in tensors]
            if start == 9:
                assert state is not None
                assert (state.pending is not None) is (steps == "triton")
                others = state.settled()
                assert others.pending is None
                picked = state.map(lambda x: x.index_select(0, rows))
                state = AttentionState.concatenate([picked, others]) if joined else picked
            with backend(name), torch.no_grad():
                out, state = hybrid_attention(
                    *parts, window=4, initial_state=state, output_final_state=True, reuse_state=0 < start < 9
                )
            outs.append(out)
        assert state is not None
        assert state.pending is None
        return [*outs, *state.tensors()]

    tolerance = TOLERANCES[dtype]
    for one, other in zip(run("triton", then), run("walk", "walk"), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_one_launch_a_step_and_sums_in_place(
    place: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[Any] = []
    kernel = decode.step_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(decode, "step_kernel", Counted())
    device, dtype = place
    q, k, v = (x.to(device, dtype) for x in attention_inputs(9))
    phi = [PositiveMap(4, seed=seed).to(device)(x).detach() for seed, x in ((1, q), (2, k))]
    _, state = hybrid_attention(*(x[:, :, :8] for x in (q, k, v, *phi)), window=4, output_final_state=True)
    assert state is not None
    assert state.linear_state is not None
    before = state.linear_state.clone()
    for reuse in (False, True):
        with backend("triton"), torch.no_grad():
            _, after = hybrid_attention(
                *(x[:, :, 8:] for x in (q, k, v, *phi)), window=4, initial_state=state,
                output_final_state=True, reuse_state=reuse,
            )  # fmt: skip
        assert after is not None
        assert (after.linear_state is state.linear_state) is reuse
        assert torch.equal(state.linear_state, before)  # in place, the token waits beside it
        assert after.linear_state is not None
        assert torch.equal(after.linear_state, before) is reuse
        assert after.pending is None or after.pending.tolist() == [1] * len(q)
    assert len(launches) == 2


@pytest.mark.gpu
def test_a_step_can_be_recorded_in_a_graph() -> None:
    """Replaying a recorded step gives what running it gives: it looks at no value on the host."""
    if not torch.cuda.is_available():
        pytest.skip("runs with CUDA only")
    q, k, v = (x.to("cuda", torch.float32) for x in attention_inputs(9))
    phi = [PositiveMap(4, seed=seed).to("cuda")(x).detach() for seed, x in ((1, q), (2, k))]
    gate = torch.full((2, 4, 1), 0.3, device="cuda")
    with torch.no_grad(), backend("triton"):
        _, state = hybrid_attention(
            *(x[:, :, :8] for x in (q, k, v, *phi)), window=4, output_final_state=True
        )
        token = [x[:, :, 8:].contiguous() for x in (q, k, v, *phi)]

        def step() -> torch.Tensor:
            return hybrid_attention(
                *token, window=4, gate=gate, initial_state=state, output_final_state=True
            )[0]

        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        graph.replay()
    torch.testing.assert_close(out, expected)
