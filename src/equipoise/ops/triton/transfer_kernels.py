"""The transfer cross-entropy: one kernel for the losses, one for either side's gradients.

For a row i with scores a_ij of the donor and products s_ij = phi(q_i) . phi(k_j):
    forward   lse_i = log sum_j exp a_ij;  total_i = sum_j s_ij;
              loss_i = log total_i - sum_j exp(a_ij - lse_i) log s_ij, in one sweep over the keys
    backward  d s_ij = g_i (1 / total_i - exp(a_ij - lse_i) / s_ij), 0 where s_ij is below FLOOR
Nothing T x T is ever in memory, and no gradient is added up by atomics.
"""

from typing import no_type_check

import triton
import triton.language as tl

from equipoise.ops.triton.common_kernels import (
    dot,
    feature_products,
    load_rows,
    real_tokens,
    scores_of,
    seen_pairs,
    store_rows,
)


@triton.jit
@no_type_check
def transfer_kernel(
    q, k, phi_q, phi_k, valid, segments, logsumexps, totals, losses,
    q_b, q_h, q_t, k_b, k_h, k_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, length, window, scale, softcap, H, N, M,
    D: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_CAP: tl.constexpr,
    FLOOR: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Three numbers of every row [B, H, T], contiguous; a program per block of rows and (batch row, head)."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    n, m = h * N // H, h * M // H
    first = tl.program_id(0) * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    valid += b * length
    segments += b * length
    k += b * k_b + n * k_h
    phi_q += b * fq_b + h * fq_h
    phi_k += b * fk_b + m * fk_h
    present = real_tokens(valid, rows, length, HAS_VALID)
    queries = load_rows(q + b * q_b + h * q_h, rows, q_t, tl.arange(0, BLOCK_D), present, D)
    top = tl.full([BLOCK_Q], -1e30, SUM)
    mass = tl.zeros([BLOCK_Q], SUM)
    cross = tl.zeros([BLOCK_Q], SUM)
    total = tl.zeros([BLOCK_Q], SUM)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + BLOCK_Q, length), BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        scores, products, seen = pair_tile(
            queries, k, phi_q, phi_k, valid, segments, rows, present, columns, k_t, fq_t, fk_t, length,
            window, scale, softcap, D, F, BLOCK_D, BLOCK_F, BLOCK_Q, BLOCK_K, HAS_VALID, HAS_SEGMENTS,
            HAS_CAP, OPERAND, SUM,
        )  # fmt: skip
        products = tl.where(products < FLOOR, FLOOR, products)  # not maximum, which would swallow a NaN
        total += tl.sum(tl.where(seen, products, 0.0), 1)
        scores = tl.where(seen, scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.where(seen, tl.exp(scores - new_top[:, None]), 0.0)
        mass = mass * shrink + tl.sum(weights, 1)
        cross = cross * shrink + tl.sum(weights * tl.log(tl.where(seen, products, 1.0)), 1)
        top = new_top
    weighed = tl.where(mass == 0, 1.0, mass)
    loss = tl.log(tl.where(total == 0, 1.0, total)) - cross / weighed
    numbers = head * length + rows
    exists = rows < length
    tl.store(logsumexps + numbers, top + tl.log(weighed), mask=exists)
    tl.store(totals + numbers, total, mask=exists)
    tl.store(losses + numbers, tl.where(total == 0, 0.0, loss), mask=exists)


@triton.jit
@no_type_check
def pair_tile(
    queries, k, phi_q, phi_k, valid, segments, rows, present, columns, k_t, fq_t, fk_t, length, window, scale,
    softcap, D: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_CAP: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """(scores of the donor, products of features, which pairs count) of a block [BLOCK_Q, BLOCK_K]."""
    there = real_tokens(valid, columns, length, HAS_VALID)
    keys = load_rows(k, columns, k_t, tl.arange(0, BLOCK_D), there, D)
    scores, _ = scores_of(queries, keys, scale, softcap, HAS_CAP)
    products = feature_products(
        phi_q, phi_k, rows, present, fq_t, columns, there, fk_t, F, BLOCK_F, BLOCK_Q, BLOCK_K, OPERAND, SUM
    )
    seen = seen_pairs(segments, rows, present, columns, there, length, HAS_SEGMENTS)
    seen = seen & (rows[:, None] - columns[None, :] < window)
    return scores.to(SUM), products, seen


@triton.jit
@no_type_check
def pair_slopes(scores, products, seen, logsumexps, totals, grads, numbers, present, FLOOR: tl.constexpr):
    """Gradients of the products of a block of pairs."""
    grad = tl.load(grads + numbers, mask=present, other=0.0)
    total = tl.load(totals + numbers, mask=present, other=0.0)
    logsumexp = tl.load(logsumexps + numbers, mask=present, other=0.0)
    # masked before the exponential: pairs that are not seen may hold any score
    weights = tl.exp(tl.where(seen, scores - logsumexp[:, None], -1e30))
    below = products < FLOOR
    slopes = (grad / tl.where(total == 0, 1.0, total))[:, None]
    slopes = slopes - grad[:, None] * weights / tl.where(below, 1.0, products)
    return tl.where(seen & (below == 0), slopes, 0.0)


@triton.jit
@no_type_check
def transfer_queries_kernel(
    q, k, phi_q, phi_k, valid, segments, logsumexps, totals, grads, grad_phi_q,
    q_b, q_h, q_t, k_b, k_h, k_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, length, window, scale, softcap, H, N, M,
    D: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_CAP: tl.constexpr, FLOOR: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Gradient of phi(q) [B, H, T, F]; a program per block of rows, (batch row, head) and WIDTH features."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    n, m = h * N // H, h * M // H
    first = tl.program_id(0) * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    part = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    valid += b * length
    segments += b * length
    k += b * k_b + n * k_h
    phi_q += b * fq_b + h * fq_h
    phi_k += b * fk_b + m * fk_h
    present = real_tokens(valid, rows, length, HAS_VALID)
    queries = load_rows(q + b * q_b + h * q_h, rows, q_t, tl.arange(0, BLOCK_D), present, D)
    found = tl.zeros([BLOCK_Q, WIDTH], SUM)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + BLOCK_Q, length), BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        scores, products, seen = pair_tile(
            queries, k, phi_q, phi_k, valid, segments, rows, present, columns, k_t, fq_t, fk_t, length,
            window, scale, softcap, D, F, BLOCK_D, BLOCK_F, BLOCK_Q, BLOCK_K, HAS_VALID, HAS_SEGMENTS,
            HAS_CAP, OPERAND, SUM,
        )  # fmt: skip
        slopes = pair_slopes(
            scores, products, seen, logsumexps, totals, grads, head * length + rows, present, FLOOR
        )
        there = real_tokens(valid, columns, length, HAS_VALID)
        features = load_rows(phi_k, columns, fk_t, part, there, F)
        found += dot(slopes.to(OPERAND), features.to(OPERAND))
    store_rows(grad_phi_q + head * length * F, rows, F, part, rows < length, found, F)


@triton.jit
@no_type_check
def transfer_keys_kernel(
    q, k, phi_q, phi_k, valid, segments, logsumexps, totals, grads, grad_phi_k,
    q_b, q_h, q_t, k_b, k_h, k_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, length, window, scale, softcap, H, N, M,
    D: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_CAP: tl.constexpr, FLOOR: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Gradient of phi(k) [B, M, T, F], summed over a memory's query heads; a program per block of keys."""
    memory = tl.program_id(1).to(tl.int64)
    b, m = memory // M, memory % M
    n = m * N // M
    first = tl.program_id(0) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    part = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    valid += b * length
    segments += b * length
    k += b * k_b + n * k_h
    phi_k += b * fk_b + m * fk_h
    found = tl.zeros([BLOCK_K, WIDTH], SUM)
    for member in range(0, H // M):
        h = m * (H // M) + member
        head = b * H + h
        row_features = phi_q + b * fq_b + h * fq_h
        for block in range(first, tl.minimum(first + BLOCK_K - 1 + window, length), BLOCK_Q):
            rows = block + tl.arange(0, BLOCK_Q)
            present = real_tokens(valid, rows, length, HAS_VALID)
            queries = load_rows(q + b * q_b + h * q_h, rows, q_t, tl.arange(0, BLOCK_D), present, D)
            scores, products, seen = pair_tile(
                queries, k, row_features, phi_k, valid, segments, rows, present, columns, k_t, fq_t, fk_t,
                length, window, scale, softcap, D, F, BLOCK_D, BLOCK_F, BLOCK_Q, BLOCK_K, HAS_VALID,
                HAS_SEGMENTS, HAS_CAP, OPERAND, SUM,
            )  # fmt: skip
            slopes = pair_slopes(
                scores, products, seen, logsumexps, totals, grads, head * length + rows, present, FLOOR
            )
            features = load_rows(row_features, rows, fq_t, part, present, F)
            found += dot(tl.trans(slopes.to(OPERAND)), features.to(OPERAND))
    store_rows(grad_phi_k + memory * length * F, columns, F, part, columns < length, found, F)
