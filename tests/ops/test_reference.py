"""The definitions agree with each other: quadratic, recurrent, and PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch

from equipoise.ops import hybrid_attention
from equipoise.ops.reference import (
    hybrid_attention_recurrent,
    hybrid_attention_reference,
    linear_attention_recurrent,
    visible_keys,
    window_attention_recurrent,
)
from support import PositiveMap, attention_inputs, normal


def test_linear_quadratic_equals_recurrent_and_resumes() -> None:
    q, k, v = attention_inputs(33, kv=4)
    phi_q, phi_k = PositiveMap(4)(q), PositiveMap(4, seed=1)(k)
    quadratic = hybrid_attention_reference(q, k, v, phi_q, phi_k, window=None)
    whole, state = linear_attention_recurrent(phi_q, phi_k, v)
    torch.testing.assert_close(whole, quadratic, rtol=0, atol=1e-12)
    first, between = linear_attention_recurrent(*(t[:, :, :10] for t in (phi_q, phi_k, v)))
    rest, resumed = linear_attention_recurrent(*(t[:, :, 10:] for t in (phi_q, phi_k, v)), state=between)
    torch.testing.assert_close(torch.cat([first, rest], 2), whole, rtol=0, atol=1e-12)
    for one, other in zip(state, resumed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (5, 3), (40, 0), (1, 1)])
def test_window_quadratic_equals_recurrent(window: int, sinks: int) -> None:
    q, k, v = attention_inputs(33, kv=4)
    quadratic = hybrid_attention_reference(q, k, v, None, None, window=window, sinks=sinks)
    recurrent = window_attention_recurrent(q, k, v, window=window, sinks=sinks)
    torch.testing.assert_close(quadratic, recurrent, rtol=0, atol=1e-12)


def test_convex_by_hand() -> None:
    q, k, v = attention_inputs(12, kv=4)
    phi_q, phi_k = PositiveMap(4)(q), PositiveMap(4, seed=1)(k)
    out = hybrid_attention_reference(q, k, v, phi_q, phi_k, window=4, gate=0.3)
    window = window_attention_recurrent(q, k, v, window=4)
    linear, _ = linear_attention_recurrent(phi_q, phi_k, v)
    torch.testing.assert_close(out, 0.3 * window + 0.7 * linear, rtol=0, atol=1e-12)


def test_shared_by_hand() -> None:
    """One row of the formula of arXiv 2410.10254, summed term by term."""
    q, k, v = attention_inputs(9, batch=1, heads=1, kv=1)
    phi_q, phi_k = PositiveMap(1)(q), PositiveMap(1, seed=1)(k)
    gamma, window, i = 0.4, 3, 8
    out = hybrid_attention_reference(
        q, k, v, phi_q, phi_k, window=window, gate=gamma, mixing="shared", overlap=False
    )
    scores = [float(q[0, 0, i] @ k[0, 0, j]) * q.shape[-1] ** -0.5 for j in range(i + 1)]
    near, far = range(i - window + 1, i + 1), range(i - window + 1)
    top = max(scores[j] for j in near)
    weights = {j: gamma * torch.tensor(scores[j] - top).double().exp() for j in near}
    weights |= {j: phi_q[0, 0, i] @ phi_k[0, 0, j] for j in far}
    expected = sum(w * v[0, 0, j] for j, w in weights.items()) / sum(weights.values())
    torch.testing.assert_close(out[0, 0, i], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("mixing", ["convex", "shared"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_hybrid_recurrent_equals_quadratic_and_chunked(
    length: int, mixing: str, overlap: bool, sinks: int, window: int
) -> None:
    q, k, v = attention_inputs(length, kv=4)
    inputs = q, k, v, PositiveMap(4)(q), PositiveMap(4, seed=1)(k)
    gate = normal(4, length, seed=9).sigmoid()
    settings = {"window": window, "mixing": mixing, "overlap": overlap, "sinks": sinks}
    with torch.no_grad():
        recurrent = hybrid_attention_recurrent(*inputs, gate=gate, **settings)
        quadratic = hybrid_attention_reference(*inputs, gate=gate, **settings)
        whole, _ = hybrid_attention(*inputs, gate=gate, chunk_size=4, **settings)
        state, steps = None, []
        for t in range(length):
            step, state = hybrid_attention(
                *(x[:, :, t : t + 1] for x in inputs), gate=gate[:, t : t + 1], initial_state=state,
                output_final_state=True, **settings,
            )  # fmt: skip
            steps.append(step)
    torch.testing.assert_close(recurrent, quadratic, rtol=0, atol=1e-12)
    torch.testing.assert_close(recurrent, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(recurrent, torch.cat(steps, 2), rtol=0, atol=1e-12)


def test_hybrid_recurrent_runs_in_float64() -> None:
    q, k, v = (t.float() for t in attention_inputs(7, kv=4))
    assert hybrid_attention_recurrent(q, k, v, q.exp(), k.exp(), window=3).dtype == torch.float64


def test_terraces_sinks_padding_and_segments_drawn() -> None:
    """Rows are queries, columns keys: # in the window, - visible to linear attention only."""
    causal, near = visible_keys(
        8, window=2, layout="terraced", sinks=1, valid=[False] + [True] * 7, segments=[0] * 6 + [1] * 2
    )
    drawn = [
        "".join(".-#"[int(c) + int(n)] for c, n in zip(*rows, strict=True))
        for rows in zip(causal, near, strict=True)
    ]
    assert drawn == [
        "........",
        ".#......",
        ".##.....",
        ".###....",
        ".####...",
        ".#-###..",  # block 0 is tokens 1 and 2; token 1 stays as a sink
        "......#.",
        "......##",
    ]  # fmt: skip


def test_normal_depends_on_the_seed_only() -> None:
    torch.manual_seed(1)
    one = normal(3)
    torch.manual_seed(2)
    assert torch.equal(one, normal(3))
