"""Every refusal of `hybrid_attention`, by its message."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from equipoise.ops import MIXING_RULES, Branches, hybrid_attention, segment_ids_from_cu_seqlens
from equipoise.ops.checks import check_arguments
from equipoise.ops.types import Call
from equipoise.registry import UnknownNameError
from support import PositiveMap, attention_inputs

Q, K, V = attention_inputs(10)
PHI_Q, PHI_K = PositiveMap(4).requires_grad_(False), PositiveMap(4, seed=1).requires_grad_(False)
CALL = Call(
    q=Q, k=K, v=V, phi_q=PHI_Q, phi_k=PHI_K, window=4, layout="sliding", mixing="convex", gate=0.5,
    lagging=False, scale=1.0, softcap=None, key_mask=None, segment_ids=None, branches=Branches(), sinks=0,
    state=None, chunk_size=64,
)  # fmt: skip


def test_the_call_itself_is_fine() -> None:
    check_arguments(CALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, r"4 dimensions \[B, heads, T, D\], got 3, 4, 4"),
        ({"k": K[:, :, :9]}, "of one B and T"),
        ({"v": V[:, :1]}, "of one B and T"),
        ({"k": K[..., :3]}, "of one B and T"),
        ({"q": Q[:, :3]}, "multiple of the key/value heads, got 3 and 2"),
        ({"q": Q[:, :, :0], "k": K[:, :, :0], "v": V[:, :, :0]}, "at least one token"),
        ({"sinks": -1}, "sinks >= 0, got -1"),
        ({"window": None, "phi_q": None, "phi_k": None}, "a window, feature maps or both"),
        ({"window": None, "sinks": 2}, "expected sinks=0, got 2"),
        ({"window": None, "sink_logits": torch.zeros(4)}, "sink_logits join the window's softmax"),
        ({"sink_logits": torch.zeros(2)}, r"one number a query head, \[4\], got \[2\]"),
        ({"window": -1}, "at least 1 token .*got -1"),
        ({"window": 0}, "at least 1 token .*got 0"),
        ({"window": 0, "sinks": 1, "layout": "terraced"}, "a terraced layout needs"),
        ({"phi_q": None}, "both given or both None"),
        ({"phi_k": None}, "both given or both None"),
        ({"phi_q": PHI_Q(Q)[:, :2]}, "phi_q with 4 heads, got 2"),
        ({"phi_k": PHI_K(K)[:, :3]}, "phi_k with 2 or 4 heads, got 3"),
        ({"phi_k": PHI_K(K)[:, :, 1:]}, r"expected phi_k \[B, heads, T, F\]"),
        ({"phi_q": PHI_Q(Q), "phi_k": PHI_K(K)[..., 1:]}, "one feature dimension F, got 7 and 6"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, r"key_mask \[B, T\] = \[2, 10\], got \[2, 9\]"),
        ({"key_mask": torch.ones(2, 10)}, "key_mask of bools .* got torch.float32"),
        ({"segment_ids": torch.zeros(1, 10, dtype=torch.long)}, r"segment_ids \[B, T\] = \[2, 10\]"),
        ({"branches": Branches(torch.ones(3, dtype=torch.bool))}, r"Branches.window of shape \[B\] = \[2\]"),
        ({"branches": Branches(True, torch.ones(4, 2, dtype=torch.bool))}, "Branches.linear of shape"),
        ({"gate": torch.ones(3, 1)}, r"broadcast to \[B, H, T\] = \[2, 4, 10\], got \[3, 1\]"),
        ({"chunk_size": 0}, "chunk_size >= 1, got 0"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(replace(CALL, **changes))


@pytest.mark.parametrize(
    ("made", "resumed", "message"),
    [
        ({}, {"window": 5}, "same window and layout, holding 4 tokens, got one of 3"),
        # sliding over 4 tokens and terraces of 2 remember equally many
        ({}, {"window": 2, "layout": "terraced"}, "same window and layout"),
        ({}, {"sinks": 2}, "with 2 sinks, got one of 0"),
        ({}, {"segment_ids": torch.zeros(2, 10, dtype=torch.long)}, "in every part of a split sequence"),
        ({}, {"phi_q": None, "phi_k": None}, "with the same branches"),
        ({"overlap": False}, {"lagging": True, "phi_q": PHI_Q(Q), "phi_k": PHI_K(K)}, "phi_k as a tensor"),
        ({"overlap": False, "tensors": True}, {}, "same overlap, got one of a disjoint call"),
        ({}, {"q": Q[:1], "k": K[:1], "v": V[:1]}, "batch size 1, got 2"),
        ({}, {"k": K[:, :1], "v": V[:, :1]}, "heads and size of k, 1 and 6, got 2 and 6"),
        ({}, {"v": V[..., :2]}, "heads and size of v, 2 and 2, got 2 and 5"),
    ],
)  # fmt: skip
def test_refused_on_resuming(made: dict[str, Any], resumed: dict[str, Any], message: str) -> None:
    made = dict(made)
    phi = (PHI_Q(Q), PHI_K(K)) if made.pop("tensors", False) else (PHI_Q, PHI_K)
    _, state = hybrid_attention(Q, K, V, *phi, window=4, output_final_state=True, **made)
    with pytest.raises(ValueError, match=message):
        check_arguments(replace(CALL, state=state, **resumed))


def test_the_operator_checks() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        hybrid_attention(Q, K, V, None, None, window=-2)


def test_unknown_mixing_rule_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown mixing rule 'convx'. Did you mean 'convex'\?"):
        hybrid_attention(Q, K, V, PHI_Q, PHI_K, window=4, mixing="convx")
    assert {"convex", "shared"} <= set(MIXING_RULES)


@pytest.mark.parametrize("flag", [torch.ones(2), torch.ones(1, 1, 1, dtype=torch.bool)])
def test_branch_flags_are_bools_by_row_or_head(flag: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"Branches.linear: expected a bool or a bool tensor \[B\] or \[B, H\]"
    ):
        Branches(True, flag)


PLAIN = """
import torch
from equipoise.ops import Branches, window_attention
x = torch.ones(1, 1, 4, 2)
rolling = dict(window=2, layout="rolling")
for call in (lambda: Branches(reading="strict"), lambda: window_attention(x, x, x, **rolling)):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_wrong_words_are_refused_where_annotations_are_not_checked() -> None:
    # under pytest the annotations refuse them first
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "expected reading 'literal' or 'renormalised', got 'strict'.",
        "expected layout 'sliding' or 'terraced', got 'rolling'.",
    ]


def test_segments_from_bounds() -> None:
    bounds = torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32)
    assert segment_ids_from_cu_seqlens(bounds, 6).tolist() == [[0, 0, 0, 2, 3, 3]]
    for wrong in ([0], [1, 6], [0, 5], [0, 4, 2, 6]):
        with pytest.raises(ValueError, match="rise from 0 to the row's length, 6"):
            segment_ids_from_cu_seqlens(torch.tensor(wrong), 6)
