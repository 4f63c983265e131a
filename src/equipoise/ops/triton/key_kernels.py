"""Gradients of keys, values and the features of keys; see `equipoise.ops.triton.backward_kernels`."""

from typing import no_type_check

import triton
import triton.language as tl

from equipoise.ops.triton.backward_kernels import window_slopes
from equipoise.ops.triton.common_kernels import (
    dot,
    feature_products,
    load_rows,
    real_tokens,
    seen_pairs,
    store_rows,
    tokens_of_segment,
)


@triton.jit
@no_type_check
def window_keys_kernel(
    q, k, v, valid, segments, grad, shifts, pulls, drifts, excesses, largest, grad_k, grad_v,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, total, window, scale, softcap, H, N,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_CAP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The window's part, summed over the query heads of a key head; a program per block of keys and head."""
    key_head = tl.program_id(1).to(tl.int64)
    b, n = key_head // N, key_head % N
    first = tl.program_id(0) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    valid += b * total
    segments += b * total
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    there = real_tokens(valid, columns, total, HAS_VALID)
    keys = load_rows(k + b * k_b + n * k_h, columns, k_t, d, there, D)
    values = load_rows(v + b * v_b + n * v_h, columns, v_t, e, there, E)
    found_k = tl.zeros([BLOCK_K, BLOCK_D], SUM)
    found_v = tl.zeros([BLOCK_K, BLOCK_E], SUM)
    stop = tl.minimum(first + BLOCK_K - 1 + window, total)
    for member in range(0, H // N):
        h = n * (H // N) + member
        head = b * H + h
        for block in range(first, stop, BLOCK_Q):
            rows = block + tl.arange(0, BLOCK_Q)
            present = real_tokens(valid, rows, total, HAS_VALID)
            queries = load_rows(q + b * q_b + h * q_h, rows, q_t, d, present, D)
            out_grad = load_rows(grad + head * total * E, rows, E, e, present, E)
            numbers = head * total + rows
            shift = tl.load(shifts + numbers, mask=present, other=0.0)
            pull = tl.load(pulls + numbers, mask=present, other=0.0)
            drift = tl.load(drifts + numbers, mask=present, other=0.0)
            excess = tl.load(excesses + numbers, mask=present, other=0.0)
            best = tl.load(largest + numbers, mask=present, other=-1)
            seen = seen_pairs(segments, rows, present, columns, there, total, HAS_SEGMENTS)
            seen = seen & (rows[:, None] - columns[None, :] < window)
            weights, slopes = window_slopes(
                queries, keys, values, out_grad, seen, columns, shift, pull, drift, excess, best, scale,
                softcap, HAS_CAP, SUM,
            )  # fmt: skip
            found_v += dot(tl.trans((weights * pull[:, None]).to(out_grad.dtype)), out_grad)
            found_k += dot(tl.trans(slopes.to(queries.dtype)), queries)
    exists = columns < total
    store_rows(grad_k + key_head * total * D, columns, D, d, exists, found_k * scale, D)
    store_rows(grad_v + key_head * total * E, columns, E, e, exists, found_v, E)


@triton.jit
@no_type_check
def linear_keys_kernel(
    phi_q, phi_k, v, valid, segments, grad, far_pulls, far_drifts, grads, grads_z, grad_phi_k, grad_v,
    fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, v_b, v_h, v_t, total, window, lag, chunks, H, N, M,
    E: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    LAGGING: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr, OPERAND: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Linear attention's part, added to the window's; one program per block of keys and key head."""
    key_head = tl.program_id(1).to(tl.int64)
    b, n = key_head // N, key_head % N
    first = tl.program_id(0) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    valid += b * total
    segments += b * total
    e = tl.arange(0, BLOCK_E)
    exists = columns < total
    there = real_tokens(valid, columns, total, HAS_VALID)
    values = load_rows(v + b * v_b + n * v_h, columns, v_t, e, there, E).to(OPERAND)
    found_v = tl.zeros([BLOCK_K, BLOCK_E], SUM)
    # a key is looked at one by one by the queries up to the end of the chunk that folds it
    last = tl.minimum(first + BLOCK_K, total) - 1
    from_chunk, to_chunk = (first + lag) // CHUNK, tl.minimum((last + lag) // CHUNK + 1, chunks)
    start, stop = first, tl.minimum(to_chunk * CHUNK, total)
    if LAGGING:
        start = first + window
    for memory in range(0, M // N):
        m = n * (M // N) + memory
        features_k = phi_k + b * fk_b + m * fk_h
        for member in range(0, H // M):
            h = m * (H // M) + member
            head = b * H + h
            for block in range(start, stop, BLOCK_Q):
                rows = block + tl.arange(0, BLOCK_Q)
                present = real_tokens(valid, rows, total, HAS_VALID)
                weights = feature_products(
                    phi_q + b * fq_b + h * fq_h, features_k, rows, present, fq_t, columns, there, fk_t,
                    F, BLOCK_F, BLOCK_Q, BLOCK_K, OPERAND, SUM,
                )  # fmt: skip
                seen = near_pairs(
                    segments, rows, present, columns, there, total, window, lag, CHUNK, LAGGING, HAS_SEGMENTS
                )
                pulled, _ = pulled_rows(grad, far_pulls, far_drifts, head, total, rows, present, e, E, SUM)
                found_v += dot(tl.trans(tl.where(seen, weights, 0.0).to(OPERAND)), pulled.to(OPERAND))
        for f0 in range(0, F, BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            features = load_rows(features_k, columns, fk_t, f, there, F).to(OPERAND)
            found_f = tl.zeros([BLOCK_K, BLOCK_F], SUM)
            for chunk in range(from_chunk, to_chunk):
                end = tl.maximum(tl.minimum((chunk + 1) * CHUNK, total) - lag, 0)
                own = 0
                if HAS_SEGMENTS:
                    own = tl.load(segments + end - 1, mask=end > 0, other=-1)
                mine = there & (columns < end) & ((columns + lag) // CHUNK == chunk)
                mine = mine & tokens_of_segment(segments, columns, total, own, HAS_SEGMENTS)
                place = (b * M + m) * chunks + chunk
                sums = load_rows(grads + place * F * E, f, E, e, f < F, E).to(OPERAND)
                totals = tl.load(grads_z + place * F + f, mask=f < F, other=0.0)
                found_f += tl.where(mine[:, None], dot(values, tl.trans(sums)) + totals[None, :], 0.0)
                found_v += dot(tl.where(mine[:, None], features, 0.0).to(OPERAND), sums)
            for member in range(0, H // M):
                h = m * (H // M) + member
                head = b * H + h
                for block in range(start, stop, BLOCK_Q):
                    rows = block + tl.arange(0, BLOCK_Q)
                    present = real_tokens(valid, rows, total, HAS_VALID)
                    seen = near_pairs(
                        segments, rows, present, columns, there, total, window, lag, CHUNK, LAGGING,
                        HAS_SEGMENTS,
                    )  # fmt: skip
                    pulled, drift = pulled_rows(
                        grad, far_pulls, far_drifts, head, total, rows, present, e, E, SUM
                    )
                    slopes = dot(pulled.to(OPERAND), tl.trans(values)) + drift[:, None]
                    queries = load_rows(phi_q + b * fq_b + h * fq_h, rows, fq_t, f, present, F)
                    found_f += dot(tl.trans(tl.where(seen, slopes, 0.0).to(OPERAND)), queries.to(OPERAND))
            store_rows(grad_phi_k + (b * M + m) * total * F, columns, F, f, exists, found_f, F)
    target = grad_v + key_head * total * E
    if HAS_WINDOW:
        found_v += load_rows(target, columns, E, e, exists, E)
    store_rows(target, columns, E, e, exists, found_v, E)


@triton.jit
@no_type_check
def near_pairs(
    segments, rows, rows_present, columns, columns_present, total, window, lag, CHUNK: tl.constexpr,
    LAGGING: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Pairs whose key linear attention sees before it is folded."""
    seen = seen_pairs(segments, rows, rows_present, columns, columns_present, total, HAS_SEGMENTS)
    if LAGGING:
        seen = seen & (rows[:, None] - columns[None, :] >= window)
    return seen & (columns[None, :] >= (rows // CHUNK * CHUNK - lag)[:, None])


@triton.jit
@no_type_check
def pulled_rows(
    grad, far_pulls, far_drifts, head, total, rows, present, e, E: tl.constexpr, SUM: tl.constexpr
):
    """(gradients of the numerators, of the denominators) of linear attention for a block of queries."""
    out_grad = load_rows(grad + head * total * E, rows, E, e, present, E).to(SUM)
    pull = tl.load(far_pulls + head * total + rows, mask=present, other=0.0)
    drift = tl.load(far_drifts + head * total + rows, mask=present, other=0.0)
    return out_grad * pull[:, None], drift
