"""Gradients of values and of k W where the Hedgehog map is inside: `linear_keys_kernel` has no map."""

from typing import no_type_check

import triton
import triton.language as tl

from equipoise.ops.triton.common_kernels import dot, load_rows, real_tokens, store_rows, tokens_of_segment
from equipoise.ops.triton.key_kernels import near_pairs, pulled_rows
from equipoise.ops.triton.map_kernels import floored, hedgehog, project, signed_softmax, softmax_slopes


@triton.jit
@no_type_check
def mapped_keys_kernel(
    q, k, map_q, map_k, v, valid, segments, grad, far_pulls, far_drifts, grads, grads_z, grad_projected,
    grad_v, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, total, window, lag, chunks, H, N, M,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    STEP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, LAGGING: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Linear attention's part of v, added to the window's, and k W's [B, M, T, C]; a program per block of
    keys and key head."""
    key_head = tl.program_id(1).to(tl.int64)
    b, n = key_head // N, key_head % N
    first = tl.program_id(0) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    valid += b * total
    segments += b * total
    e = tl.arange(0, BLOCK_E)
    c = tl.arange(0, BLOCK_C)
    exists = columns < total
    there = real_tokens(valid, columns, total, HAS_VALID)
    values = load_rows(v + b * v_b + n * v_h, columns, v_t, e, there, E).to(OPERAND)
    keys = k + b * k_b + n * k_h
    found_v = tl.zeros([BLOCK_K, BLOCK_E], SUM)
    # a key is looked at one by one by the queries up to the end of the chunk that folds it
    last = tl.minimum(first + BLOCK_K, total) - 1
    from_chunk, to_chunk = (first + lag) // CHUNK, tl.minimum((last + lag) // CHUNK + 1, chunks)
    start, stop = first, tl.minimum(to_chunk * CHUNK, total)
    if LAGGING:
        start = first + window
    for memory in range(0, M // N):
        m = n * (M // N) + memory
        projected = project(
            keys, map_k + m * D * C, columns, k_t, there, D, C, BLOCK_K, BLOCK_C, STEP, OPERAND, SUM
        )
        soft_p = signed_softmax(projected, 1.0, there, C, BLOCK_C)
        soft_n = signed_softmax(projected, -1.0, there, C, BLOCK_C)
        positive = floored(soft_p, there, C, BLOCK_C).to(OPERAND)
        negative = floored(soft_n, there, C, BLOCK_C).to(OPERAND)
        found_p = tl.zeros([BLOCK_K, BLOCK_C], SUM)
        found_n = tl.zeros([BLOCK_K, BLOCK_C], SUM)
        for chunk in range(from_chunk, to_chunk):
            end = tl.maximum(tl.minimum((chunk + 1) * CHUNK, total) - lag, 0)
            own = 0
            if HAS_SEGMENTS:
                own = tl.load(segments + end - 1, mask=end > 0, other=-1)
            mine = there & (columns < end) & ((columns + lag) // CHUNK == chunk)
            mine = mine & tokens_of_segment(segments, columns, total, own, HAS_SEGMENTS)
            place = ((b * M + m) * chunks + chunk) * 2 * C
            sums = load_rows(grads + place * E, c, E, e, c < C, E).to(OPERAND)
            totals = tl.load(grads_z + place + c, mask=c < C, other=0.0)
            found_p += tl.where(mine[:, None], dot(values, tl.trans(sums)) + totals[None, :], 0.0)
            found_v += dot(tl.where(mine[:, None], positive, 0.0).to(OPERAND), sums)
            sums = load_rows(grads + (place + C) * E, c, E, e, c < C, E).to(OPERAND)
            totals = tl.load(grads_z + place + C + c, mask=c < C, other=0.0)
            found_n += tl.where(mine[:, None], dot(values, tl.trans(sums)) + totals[None, :], 0.0)
            found_v += dot(tl.where(mine[:, None], negative, 0.0).to(OPERAND), sums)
        for member in range(0, H // M):
            h = m * (H // M) + member
            head = b * H + h
            for block in range(start, stop, BLOCK_Q):
                rows = block + tl.arange(0, BLOCK_Q)
                present = real_tokens(valid, rows, total, HAS_VALID)
                asked_p, asked_n = hedgehog(
                    q + b * q_b + h * q_h, map_q + h * D * C, rows, q_t, present, D, C, BLOCK_Q, BLOCK_C,
                    STEP, OPERAND, SUM,
                )  # fmt: skip
                seen = near_pairs(
                    segments, rows, present, columns, there, total, window, lag, CHUNK, LAGGING, HAS_SEGMENTS
                )
                pulled, drift = pulled_rows(
                    grad, far_pulls, far_drifts, head, total, rows, present, e, E, SUM
                )
                pulled = pulled.to(OPERAND)
                weights = dot(asked_p, tl.trans(positive)) + dot(asked_n, tl.trans(negative))
                found_v += dot(tl.trans(tl.where(seen, weights, 0.0).to(OPERAND)), pulled)
                slopes = dot(pulled, tl.trans(values)) + drift[:, None]
                slopes = tl.trans(tl.where(seen, slopes, 0.0).to(OPERAND))
                found_p += dot(slopes, asked_p)
                found_n += dot(slopes, asked_n)
        found_p = softmax_slopes(soft_p, found_p) - softmax_slopes(soft_n, found_n)
        store_rows(grad_projected + (b * M + m) * total * C, columns, C, c, exists, found_p, C)
    target = grad_v + key_head * total * E
    if HAS_WINDOW:
        found_v += load_rows(target, columns, E, e, exists, E)
    store_rows(target, columns, E, e, exists, found_v, E)
