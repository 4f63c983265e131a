"""The attention-transfer cross-entropy, at memory linear in the length.

For a donor's softmax weights p_ij and linear attention's a_ij = s_ij / sum_j s_ij, s_ij = phi(q_i) .
phi(k_j):

    loss_i = - sum_j p_ij log a_ij = log(sum_j s_ij) - sum_j p_ij log s_ij        since sum_j p_ij = 1.

Forward keeps three numbers a row (log-sum-exp of the scores, sum of s, sum of p log s) from one sweep over
blocks; backward recomputes the blocks: d loss_i / d s_ij = 1 / sum_j s_ij - p_ij / s_ij. Products s below
`FLOOR` count as the floor and get no gradient.
Source: the Hedgehog objective (arXiv 2402.04347, equation 4). Shapes: legend in `equipoise.ops.types`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.ops import dispatch
from equipoise.ops.transfer_blocks import FLOOR
from equipoise.ops.types import Donor

__all__ = ["FLOOR", "transfer_cross_entropy"]


def transfer_cross_entropy(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B N T D"],
    phi_q: Float[Tensor, "B H T F"],
    phi_k: Float[Tensor, "B M T F"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    key_mask: Bool[Tensor, "B T"] | None = None,
    segment_ids: Int[Tensor, "B T"] | None = None,
    sink_logits: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H T"]:
    """Cross-entropy of each row from the donor's softmax weights to linear attention's; differentiable in phi
    only.

    Args:
        q, k: the donor's queries and keys; constants here, no gradient flows into them.
        phi_q, phi_k: their features; M is N or H.
        scale, softcap, window: of the donor's attention in this layer (window None for full attention).
        key_mask: True for real tokens; rows of padding, or without a key, have loss 0.
        segment_ids: packed sequences.
        sink_logits: the donor's scores of attending to nothing: its weights p_ij then sum to less than one,
            and a row counts for as much as they do.

    Raises:
        BackendError: the backend asked for cannot run it.
    """
    donor = Donor(
        q=q.detach(), k=k.detach(), scale=scale, softcap=softcap, window=window, key_mask=key_mask,
        segment_ids=segment_ids, sink_logits=None if sink_logits is None else sink_logits.detach(),
    )  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        return dispatch.run_transfer(phi_q, phi_k, donor)
