"""Gradients with respect to queries, their features and the branches' weights; and those of S and z.

Everything but the inputs is computed again. `rows_kernel` also leaves a few numbers per query, from which
`equipoise.ops.triton.key_kernels` finds the gradients of keys and values. For a query i with output gradient
g_i, dropping the index:
    window   weights p_j = exp(score_j - shift);  d p_j = pull g.v_j + drift;
             d score_j = p_j d p_j - [j is the largest] excess
    linear   weights s_j = phi(q).phi(k_j);       d s_j = far_pull g.v_j + far_drift
"""

from typing import no_type_check

import triton
import triton.language as tl

from equipoise.ops.triton.common_kernels import (
    calibrated_factors,
    dot,
    linear_rows,
    load_rows,
    real_tokens,
    safe,
    scores_of,
    seen_pairs,
    segment_before,
    store_rows,
    tokens_of_segment,
    window_rows,
)
from equipoise.ops.triton.map_kernels import hedgehog_half, mapped_linear_rows, mapped_query_slopes


@triton.jit
@no_type_check
def rows_kernel(
    q, k, v, phi_q, phi_k, map_q, map_k, weight_window, weight_linear, valid, segments, first_segment,
    states, states_z, grad, grad_totals, grad_q, grad_phi_q, grad_window, grad_linear, shifts, pulls, drifts,
    excesses, largest, far_pulls, far_drifts, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t,
    fk_b, fk_h, fk_t, ww_b, ww_h, ww_t, wl_b, wl_h, wl_t, total, window, lag, chunks, scale, softcap, H, N, M,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, STEP: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, MAPPED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_LINEAR: tl.constexpr, SHARED: tl.constexpr, CALIBRATED: tl.constexpr, LAGGING: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TOTALS: tl.constexpr,
    OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One program per block of queries and (batch row, head); gradients and numbers are contiguous.

    HAS_TOTALS, there are gradients of the logarithms that `attend_kernel` leaves then.

    MAPPED, grad_phi_q is the gradient of q W [B, H, T, C].
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    n, m = h * N // H, h * M // H
    first = tl.program_id(0) * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    valid += b * total
    segments += b * total
    q += b * q_b + h * q_h
    k += b * k_b + n * k_h
    v += b * v_b + n * v_h
    phi_q += b * fq_b + h * fq_h
    phi_k += b * fk_b + m * fk_h
    exists = rows < total
    present = real_tokens(valid, rows, total, HAS_VALID)
    numbers = head * total + rows
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    out_grad = load_rows(grad + head * total * E, rows, E, e, present, E)
    wide_grad = out_grad.to(SUM)
    chunk = first // CHUNK
    folded = tl.maximum(chunk * CHUNK - lag, 0)
    place = (b * M + m) * chunks + chunk
    far = present
    if HAS_WINDOW:
        queries = load_rows(q, rows, q_t, d, present, D)
        top, best, mass, summed = window_rows(
            queries, k, v, valid, segments, rows, present, first, total, window, k_t, v_t, scale, softcap,
            D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, HAS_VALID, HAS_SEGMENTS, HAS_CAP, SUM,
        )  # fmt: skip
        along = tl.sum(wide_grad * summed, 1)
        weight = tl.load(weight_window + b * ww_b + h * ww_h + rows * ww_t, mask=present, other=0.0)
    if HAS_LINEAR:
        segment = segment_before(segments, first_segment + b, folded, HAS_SEGMENTS)
        far = present & tokens_of_segment(segments, rows, total, segment, HAS_SEGMENTS)
        if MAPPED:
            numerator, denominator = mapped_linear_rows(
                q, k, map_q + h * D * C, map_k + m * D * C, v, states + place * F * E, states_z + place * F,
                valid, segments, rows, rows, present, far, first, folded, total, window, q_t, k_t, v_t, D, E,
                C, BLOCK_E, BLOCK_F, STEP, BLOCK_Q, BLOCK_K, LAGGING, HAS_VALID, HAS_SEGMENTS, OPERAND, SUM,
            )  # fmt: skip
        else:
            numerator, denominator = linear_rows(
                phi_q, phi_k, v, states + place * F * E, states_z + place * F, valid, segments, rows, rows,
                present, far, first, folded, total, window, lag, 0, fq_t, fk_t, v_t, E, F, BLOCK_E, BLOCK_F,
                BLOCK_Q, BLOCK_K, LAGGING, HAS_VALID, HAS_SEGMENTS, OPERAND, SUM,
            )  # fmt: skip
        far_along = tl.sum(wide_grad * numerator, 1)
    if SHARED:
        undivided = weight * mass + denominator
        divisor = safe(undivided)
        far_pull = tl.where(present, 1.0 / divisor, 0.0)
        far_drift = -(weight * along + far_along) / (divisor * divisor)
        far_drift = tl.where(tl.abs(undivided) < 1e-12, 0.0, far_drift)
        pull, drift, shift = weight * far_pull, weight * far_drift, top
        excess = pull * along + drift * mass
        tl.store(grad_window + numbers, along / divisor + far_drift * mass, mask=exists)
    elif CALIBRATED:
        near_scale, far_scale, sum_z, shift = calibrated_factors(top, weight, denominator)
        divisor = near_scale * mass + far_scale * sum_z
        pull = tl.where(present, 1.0 / divisor, 0.0)
        drift = -(near_scale * along + far_scale * far_along) * pull / divisor
        if HAS_TOTALS:
            drift += tl.load(grad_totals + numbers, mask=present, other=0.0) * pull
        excess = mass * 0.0
        far_pull = far_scale * pull
        far_drift = tl.where(denominator < 1e-12, 0.0, far_scale * drift)
        slope = far_scale * (far_along * pull + drift * sum_z)
        tl.store(grad_window + numbers, slope, mask=exists)
    else:
        if HAS_WINDOW:
            weighed = tl.where(mass == 0, 1.0, mass)
            pull, shift = weight, top + tl.log(weighed)
            drift = -weight * along / weighed
            if HAS_TOTALS:
                drift += tl.load(grad_totals + numbers, mask=present, other=0.0)
            excess = mass * 0.0
            tl.store(grad_window + numbers, along / weighed, mask=exists)
        if HAS_LINEAR:
            weight = tl.load(weight_linear + b * wl_b + h * wl_h + rows * wl_t, mask=present, other=0.0)
            divisor = safe(denominator)
            far_pull = weight / divisor
            far_drift = -far_pull * far_along / divisor
            far_drift = tl.where(tl.abs(denominator) < 1e-12, 0.0, far_drift)
            tl.store(grad_linear + numbers, far_along / divisor, mask=exists)
    if HAS_WINDOW:
        tl.store(shifts + numbers, shift, mask=exists)
        tl.store(pulls + numbers, pull, mask=exists)
        tl.store(drifts + numbers, drift, mask=exists)
        tl.store(excesses + numbers, excess, mask=exists)
        tl.store(largest + numbers, best, mask=exists)
        found = tl.zeros([BLOCK_Q, BLOCK_D], SUM)
        for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + BLOCK_Q, total), BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            there = real_tokens(valid, columns, total, HAS_VALID)
            keys = load_rows(k, columns, k_t, d, there, D)
            values = load_rows(v, columns, v_t, e, there, E)
            seen = seen_pairs(segments, rows, present, columns, there, total, HAS_SEGMENTS)
            seen = seen & (rows[:, None] - columns[None, :] < window)
            _, slopes = window_slopes(
                queries, keys, values, out_grad, seen, columns, shift, pull, drift, excess, best, scale,
                softcap, HAS_CAP, SUM,
            )  # fmt: skip
            found += dot(slopes.to(keys.dtype), keys)
        store_rows(grad_q + head * total * D, rows, D, d, exists, found * scale, D)
    if HAS_LINEAR:
        tl.store(far_pulls + numbers, far_pull, mask=exists)
        tl.store(far_drifts + numbers, far_drift, mask=exists)
        pulled = wide_grad * far_pull[:, None]
        if MAPPED:
            found_c = mapped_query_slopes(
                q, k, map_q + h * D * C, map_k + m * D * C, v, states + place * F * E, states_z + place * F,
                valid, segments, rows, present, far, pulled, far_drift, first, folded, total, window, q_t,
                k_t, v_t, D, E, C, BLOCK_E, BLOCK_F, STEP, BLOCK_Q, BLOCK_K, LAGGING, HAS_VALID, HAS_SEGMENTS,
                OPERAND, SUM,
            )  # fmt: skip
            c = tl.arange(0, BLOCK_F)
            store_rows(grad_phi_q + head * total * C, rows, C, c, exists, found_c, C)
        else:
            query_feature_slopes(
                phi_k, v, states + place * F * E, states_z + place * F, valid, segments, grad_phi_q, head,
                rows, exists, present, far, pulled, far_drift, first, folded, total, window, fk_t, v_t, E, F,
                BLOCK_E, BLOCK_F, BLOCK_Q, BLOCK_K, LAGGING, HAS_VALID, HAS_SEGMENTS, OPERAND,
            )  # fmt: skip


@triton.jit
@no_type_check
def query_feature_slopes(
    phi_k, v, state, normalizer, valid, segments, grad_phi_q, head, rows, exists, present, far, pulled,
    far_drift, first, folded, total, window, fk_t, v_t, E: tl.constexpr, F: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LAGGING: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Gradients of phi(q) for a block of queries, stored; ``pulled`` and ``far_drift`` are those of the rows'
    numerators and denominators."""
    e = tl.arange(0, BLOCK_E)
    end = tl.minimum(first + BLOCK_Q, total)
    if LAGGING:
        end = end - window
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        sums = load_rows(state, f, E, e, f < F, E)
        totals = tl.load(normalizer + f, mask=f < F, other=0.0)
        found_f = dot(pulled.to(OPERAND), tl.trans(sums.to(OPERAND)))
        found_f += far_drift[:, None] * totals[None, :]
        found_f = tl.where(far[:, None], found_f, 0.0)
        for start in range(folded, end, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            there = real_tokens(valid, columns, total, HAS_VALID)
            seen = seen_pairs(segments, rows, present, columns, there, total, HAS_SEGMENTS)
            if LAGGING:
                seen = seen & (rows[:, None] - columns[None, :] >= window)
            values = load_rows(v, columns, v_t, e, there, E)
            slopes = dot(pulled.to(OPERAND), tl.trans(values.to(OPERAND))) + far_drift[:, None]
            features = load_rows(phi_k, columns, fk_t, f, there, F)
            found_f += dot(tl.where(seen, slopes, 0.0).to(OPERAND), features.to(OPERAND))
        store_rows(grad_phi_q + head * total * F, rows, F, f, exists, found_f, F)


@triton.jit
@no_type_check
def window_slopes(
    queries, keys, values, out_grad, seen, columns, shift, pull, drift, excess, best, scale, softcap,
    HAS_CAP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """(window weights, gradients of scaled products) of a block of pairs."""
    scores, bend = scores_of(queries, keys, scale, softcap, HAS_CAP)
    # masked before the exponential: pairs that are not seen may hold any score
    weights = tl.exp(tl.where(seen, scores.to(SUM) - shift[:, None], -1e30))
    slopes = dot(out_grad, tl.trans(values)).to(SUM) * pull[:, None] + drift[:, None]
    slopes = weights * slopes - tl.where(best[:, None] == columns[None, :], excess[:, None], 0.0)
    return weights, tl.where(seen, slopes * bend, 0.0)


@triton.jit
@no_type_check
def unfold_kernel(
    phi_q, map_q, grad, valid, segments, first_segment, far_pulls, far_drifts, grads, grads_z,
    fq_b, fq_h, fq_t, total, lag, chunks, H, M, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, STEP: tl.constexpr, BLOCK_Q: tl.constexpr,
    CHUNK: tl.constexpr, MAPPED: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Gradients of S and z after each chunk [B * M, chunks, F, E] and [B * M, chunks, F], last chunk first.

    One program per (batch row, memory), block of F and block of E. MAPPED, phi_q points at queries, whose
    features are computed here by the Hedgehog maps of weight map_q [H, D, C], one half by each program.
    """
    memory = tl.program_id(0).to(tl.int64)
    b, m = memory // M, memory % M
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < F
    if MAPPED:
        f = tl.program_id(1) * C + tl.arange(0, BLOCK_F)
        inside = tl.arange(0, BLOCK_F) < C
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    valid += b * total
    segments += b * total
    owns_z = inside & (tl.program_id(2) == 0)
    sums = tl.zeros([BLOCK_F, BLOCK_E], SUM)
    totals = tl.zeros([BLOCK_F], SUM)
    for step in range(0, chunks):
        chunk = chunks - 1 - step
        place = memory * chunks + chunk
        store_rows(grads + place * F * E, f, E, e, inside, sums, E)
        tl.store(grads_z + place * F + f, totals, mask=owns_z)
        start = tl.maximum(chunk * CHUNK - lag, 0)
        segment = segment_before(segments, first_segment + b, start, HAS_SEGMENTS)
        if HAS_SEGMENTS:
            stop = tl.maximum(tl.minimum((chunk + 1) * CHUNK, total) - lag, 0)
            own = tl.load(segments + stop - 1, mask=stop > start, other=segment)
            sums = tl.where(own == segment, sums, 0.0)
            totals = tl.where(own == segment, totals, 0.0)
        for member in range(0, H // M):
            h = m * (H // M) + member
            head = b * H + h
            for block in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, total), BLOCK_Q):
                rows = block + tl.arange(0, BLOCK_Q)
                present = real_tokens(valid, rows, total, HAS_VALID)
                present = present & tokens_of_segment(segments, rows, total, segment, HAS_SEGMENTS)
                if MAPPED:
                    features = hedgehog_half(
                        phi_q + b * fq_b + h * fq_h, map_q + h * D * C, rows, fq_t, present,
                        tl.program_id(1), D, C, BLOCK_Q, BLOCK_F, STEP, OPERAND, SUM,
                    )  # fmt: skip
                else:
                    features = load_rows(phi_q + b * fq_b + h * fq_h, rows, fq_t, f, present, F)
                out_grad = load_rows(grad + head * total * E, rows, E, e, present, E)
                pull = tl.load(far_pulls + head * total + rows, mask=present, other=0.0)
                drift = tl.load(far_drifts + head * total + rows, mask=present, other=0.0)
                pulled = (out_grad.to(SUM) * pull[:, None]).to(OPERAND)
                sums += dot(tl.trans(features.to(OPERAND)), pulled)
                totals += tl.sum(features.to(SUM) * drift[:, None], 0)
