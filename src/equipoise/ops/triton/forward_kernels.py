"""The forward pass in two kernels: running sums at every chunk's start, then all outputs at once.

`fold_kernel` walks the chunks of one head and writes S and z as they stand before each; `attend_kernel` then
takes every block of queries for itself: window, linear attention and their mix in one program.
"""

from typing import no_type_check

import triton
import triton.language as tl

from equipoise.ops.triton.common_kernels import (
    calibrated_factors,
    linear_rows,
    load_rows,
    real_tokens,
    safe,
    segment_before,
    store_rows,
    tokens_of_segment,
    window_rows,
)
from equipoise.ops.triton.map_kernels import hedgehog_half, mapped_linear_rows


@triton.jit
@no_type_check
def fold_kernel(
    phi_k, map_k, v, valid, segments, first_segment, initial, initial_z, states, states_z, final, final_z,
    k_b, k_h, k_t, v_b, v_h, v_t, total, past, lag, phi_shift, chunks, M, per_value,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    MAPPED: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """S and z before each chunk [B * M, chunks, F, E] and [B * M, chunks, F], and after the last token.

    One program per (batch row, memory), block of F and block of E. MAPPED, phi_k points at keys, whose
    features are computed here by the Hedgehog map of weight map_k [M, D, C], one half by each program.
    """
    head = tl.program_id(0).to(tl.int64)
    b, m = head // M, head % M
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < F
    phi_k += b * k_b
    if MAPPED:
        f = tl.program_id(1) * C + tl.arange(0, BLOCK_F)
        inside = tl.arange(0, BLOCK_F) < C
        phi_k += (m // per_value) * k_h
        map_k += m * D * C
    else:
        phi_k += m * k_h
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    v += b * v_b + (m // per_value) * v_h
    valid += b * total
    segments += b * total
    owns_z = inside & (tl.program_id(2) == 0)
    sums = tl.zeros([BLOCK_F, BLOCK_E], SUM)
    totals = tl.zeros([BLOCK_F], SUM)
    if HAS_INITIAL:
        sums += load_rows(initial + head * F * E, f, E, e, inside, E)
        totals += tl.load(initial_z + head * F + f, mask=inside, other=0.0)
    segment = segment_before(segments, first_segment + b, 0, HAS_SEGMENTS)
    for chunk in range(0, chunks):
        place = head * chunks + chunk
        store_rows(states + place * F * E, f, E, e, inside, sums, E)
        tl.store(states_z + place * F + f, totals, mask=owns_z)
        start = tl.maximum(past + chunk * CHUNK - lag, 0)
        stop = tl.maximum(tl.minimum(past + (chunk + 1) * CHUNK, total) - lag, 0)
        own = segment
        if HAS_SEGMENTS:
            own = tl.load(segments + stop - 1, mask=stop > start, other=segment)
            kept = own == segment
            sums = tl.where(kept, sums, 0.0)
            totals = tl.where(kept, totals, 0.0)
            segment = own
        for block in range(start, stop, BLOCK_K):
            columns = block + tl.arange(0, BLOCK_K)
            present = real_tokens(valid, columns, stop, HAS_VALID)
            present = present & tokens_of_segment(segments, columns, stop, own, HAS_SEGMENTS)
            if MAPPED:
                features = hedgehog_half(
                    phi_k, map_k, columns, k_t, present, tl.program_id(1), D, C, BLOCK_K, BLOCK_F, STEP,
                    OPERAND, SUM,
                )  # fmt: skip
            else:
                features = load_rows(phi_k, columns - phi_shift, k_t, f, present, F)
            values = load_rows(v, columns, v_t, e, present, E)
            sums += dot_transposed(features.to(OPERAND), values.to(OPERAND))
            totals += tl.sum(features.to(SUM), 0)
    if HAS_FINAL:
        store_rows(final + head * F * E, f, E, e, inside, sums, E)
        tl.store(final_z + head * F + f, totals, mask=owns_z)


@triton.jit
@no_type_check
def dot_transposed(left, right):
    """left^T right."""
    return tl.dot(tl.trans(left), right, input_precision="ieee")


@triton.jit
@no_type_check
def attend_kernel(
    q, k, v, phi_q, phi_k, map_q, map_k, weight_window, weight_linear, valid, segments, first_segment,
    states, states_z, out, totals, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t, fk_b,
    fk_h, fk_t, ww_b, ww_h, ww_t, wl_b, wl_h, wl_t, total, past, window, lag, phi_shift, chunks, scale,
    softcap, H, N, M,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, STEP: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, MAPPED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_LINEAR: tl.constexpr, SHARED: tl.constexpr, CALIBRATED: tl.constexpr, LAGGING: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TOTALS: tl.constexpr,
    OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The mixed output [B, H, T, E], contiguous; HAS_TOTALS, the logarithm of its denominator [B, H, T] too.

    One program per block of queries and (batch row, head).

    MAPPED, features are computed here, by the Hedgehog maps map_q [H, D, C] of q and map_k [M, D, C] of k.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    n, m = h * N // H, h * M // H
    query_rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows = past + query_rows
    first = past + tl.program_id(0) * BLOCK_Q
    valid += b * total
    segments += b * total
    v += b * v_b + n * v_h
    present = real_tokens(valid, rows, total, HAS_VALID)
    e = tl.arange(0, BLOCK_E)
    mixed = tl.zeros([BLOCK_Q, BLOCK_E], SUM)
    divisor = tl.full([BLOCK_Q], 1.0, SUM)
    reference = tl.zeros([BLOCK_Q], SUM)
    if HAS_WINDOW:
        d = tl.arange(0, BLOCK_D)
        queries = load_rows(q + b * q_b + h * q_h, query_rows, q_t, d, present, D)
        top, _, mass, summed = window_rows(
            queries, k + b * k_b + n * k_h, v, valid, segments, rows, present, first, total, window, k_t,
            v_t, scale, softcap, D, E, BLOCK_D, BLOCK_E, BLOCK_Q, BLOCK_K, HAS_VALID, HAS_SEGMENTS, HAS_CAP,
            SUM,
        )  # fmt: skip
        weight = tl.load(weight_window + b * ww_b + h * ww_h + query_rows * ww_t, mask=present, other=0.0)
        if SHARED:
            mixed += summed * weight[:, None]
            divisor = mass * weight
        elif CALIBRATED:
            mixed += summed
        else:
            mixed += summed * (weight / tl.where(mass == 0, 1.0, mass))[:, None]
            divisor, reference = tl.where(mass == 0, 1.0, mass), top
    if HAS_LINEAR:
        chunk = tl.program_id(0) * BLOCK_Q // CHUNK
        folded = tl.maximum(past + chunk * CHUNK - lag, 0)
        segment = segment_before(segments, first_segment + b, folded, HAS_SEGMENTS)
        far = present & tokens_of_segment(segments, rows, total, segment, HAS_SEGMENTS)
        place = (b * M + m) * chunks + chunk
        if MAPPED:
            numerator, denominator = mapped_linear_rows(
                q + b * q_b + h * q_h, k + b * k_b + n * k_h, map_q + h * D * C, map_k + m * D * C, v,
                states + place * F * E, states_z + place * F, valid, segments, rows, query_rows, present, far,
                first, folded, total, window, q_t, k_t, v_t, D, E, C, BLOCK_E, BLOCK_F, STEP, BLOCK_Q,
                BLOCK_K, LAGGING, HAS_VALID, HAS_SEGMENTS, OPERAND, SUM,
            )  # fmt: skip
        else:
            numerator, denominator = linear_rows(
                phi_q + b * fq_b + h * fq_h, phi_k + b * fk_b + m * fk_h, v, states + place * F * E,
                states_z + place * F, valid, segments, rows, query_rows, present, far, first, folded, total,
                window, lag, phi_shift, fq_t, fk_t, v_t, E, F, BLOCK_E, BLOCK_F, BLOCK_Q, BLOCK_K, LAGGING,
                HAS_VALID, HAS_SEGMENTS, OPERAND, SUM,
            )  # fmt: skip
        if SHARED:
            mixed = (mixed + numerator) / safe(divisor + denominator)[:, None]
        elif CALIBRATED:
            near, far, sum_z, reference = calibrated_factors(top, weight, denominator)
            divisor = near * mass + far * sum_z
            mixed = (mixed * near[:, None] + numerator * far[:, None]) / divisor[:, None]
        else:
            weight = tl.load(weight_linear + b * wl_b + h * wl_h + query_rows * wl_t, mask=present, other=0.0)
            mixed += numerator * (weight / safe(denominator))[:, None]
    mixed = tl.where(present[:, None], mixed, 0.0)
    length = total - past
    store_rows(out + head * length * E, query_rows, E, e, query_rows < length, mixed, E)
    if HAS_TOTALS:
        total_rows = tl.where(present, reference + tl.log(divisor), 0.0)
        tl.store(totals + head * length + query_rows, total_rows, mask=query_rows < length)
