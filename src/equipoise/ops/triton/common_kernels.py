"""Device functions that several kernels share: loads that leave padding out, masks, and the rows of a branch.

Names and shapes follow the legend in `equipoise.ops.types`; X is history and new tokens on one axis, and a
block of a dimension is padded to a power of two. Kernels are kept from the type checker of the tests by
`no_type_check`: Triton reads their source, and a wrapper has another one.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def dot(left, right):
    """Matrix product summed in float32 (float64 for float64); never rounded to TF32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
@no_type_check
def load_rows(base, rows, stride, columns, present, SIZE: tl.constexpr):
    """Rows [n, columns] of a matrix with `SIZE` columns; 0 where not present, whatever memory holds."""
    place = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(place, mask=present[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
@no_type_check
def store_rows(base, rows, stride, columns, present, values, SIZE: tl.constexpr):
    """The reverse of `load_rows`."""
    place = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=present[:, None] & (columns < SIZE)[None, :])


@triton.jit
@no_type_check
def real_tokens(valid, tokens, stop, HAS_VALID: tl.constexpr):
    """Which tokens exist and are no padding; ``valid`` points at the batch row."""
    present = tokens < stop
    if HAS_VALID:
        present = present & (tl.load(valid + tokens, mask=present, other=0) != 0)
    return present


@triton.jit
@no_type_check
def segment_before(segments, first_segment, token, HAS_SEGMENTS: tl.constexpr):
    """Segment of the sums of all keys before a token: that of the last of them."""
    segment = 0
    if HAS_SEGMENTS:
        earlier = tl.load(first_segment)
        segment = tl.load(segments + token - 1, mask=token > 0, other=earlier)
    return segment


@triton.jit
@no_type_check
def tokens_of_segment(segments, tokens, stop, segment, HAS_SEGMENTS: tl.constexpr):
    """Which tokens belong to a segment."""
    same = tokens < stop
    if HAS_SEGMENTS:
        same = same & (tl.load(segments + tokens, mask=same, other=-2) == segment)
    return same


@triton.jit
@no_type_check
def seen_pairs(segments, rows, rows_present, columns, columns_present, stop, HAS_SEGMENTS: tl.constexpr):
    """Pairs of a query and a key that may see each other at all: not later, real, of one segment."""
    seen = rows_present[:, None] & columns_present[None, :] & (columns[None, :] <= rows[:, None])
    if HAS_SEGMENTS:
        ours = tl.load(segments + rows, mask=rows < stop, other=-2)
        theirs = tl.load(segments + columns, mask=columns < stop, other=-3)
        seen = seen & (ours[:, None] == theirs[None, :])
    return seen


@triton.jit
@no_type_check
def scores_of(queries, keys, scale, softcap, HAS_CAP: tl.constexpr):
    """(scores, d score / d product without the scale) of a block; tanh(x) = 2 sigmoid(2 x) - 1."""
    products = dot(queries, tl.trans(keys)) * scale
    slope = products * 0.0 + 1.0
    if HAS_CAP:
        bent = 2.0 * tl.sigmoid(2.0 * (products / softcap)) - 1.0
        slope = 1.0 - bent * bent
        products = softcap * bent
    return products, slope


@triton.jit
@no_type_check
def safe(denominator):
    """The denominator with its magnitude kept above EPSILON, as in `equipoise.ops.mix.divide`."""
    floor = tl.where(denominator < 0, -1e-12, 1e-12).to(denominator.dtype)
    return tl.where(tl.abs(denominator) < 1e-12, floor, denominator)


@triton.jit
@no_type_check
def calibrated_factors(top, score, denominator):
    """(exp(m - r), exp(l - r), z kept above EPSILON, r): see `equipoise.ops.stream_forward.scale_factors`."""
    total = tl.maximum(denominator, 1e-12)
    reference = tl.maximum(top, score + tl.log(total))
    return tl.exp(top - reference), tl.exp(score - reference), total, reference


@triton.jit
@no_type_check
def window_rows(
    queries, k, v, valid, segments, rows, rows_present, first, stop, window, k_t, v_t, scale, softcap,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_CAP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The window of a block of queries: (largest score, its key, sum of exponentials, the same times v).

    ``first`` is the first row, ``stop`` the end of the tokens; k, v, valid and segments point at the batch
    row and head.
    """
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    top = tl.full([BLOCK_Q], -1e30, SUM)
    best = tl.full([BLOCK_Q], -1, tl.int32)
    mass = tl.zeros([BLOCK_Q], SUM)
    summed = tl.zeros([BLOCK_Q, BLOCK_E], SUM)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + BLOCK_Q, stop), BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        present = real_tokens(valid, columns, stop, HAS_VALID)
        keys = load_rows(k, columns, k_t, d, present, D)
        values = load_rows(v, columns, v_t, e, present, E)
        scores, _ = scores_of(queries, keys, scale, softcap, HAS_CAP)
        seen = seen_pairs(segments, rows, rows_present, columns, present, stop, HAS_SEGMENTS)
        seen = seen & (rows[:, None] - columns[None, :] < window)
        scores = tl.where(seen, scores.to(SUM), -1e30)
        largest = tl.max(scores, 1)
        best = tl.where(largest > top, start + tl.argmax(scores, 1), best)
        new_top = tl.maximum(top, largest)
        shrink = tl.exp(top - new_top)
        weights = tl.where(seen, tl.exp(scores - new_top[:, None]), 0.0)
        mass = mass * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + dot(weights.to(v.dtype.element_ty), values)
        top = new_top
    return top, best, mass, summed


@triton.jit
@no_type_check
def feature_products(
    phi_q, phi_k, rows, rows_present, q_stride, columns, columns_present, k_stride,
    F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """phi(q) . phi(k) of a block [BLOCK_Q, BLOCK_K]."""
    weights = tl.zeros([BLOCK_Q, BLOCK_K], SUM)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        queries = load_rows(phi_q, rows, q_stride, f, rows_present, F).to(OPERAND)
        keys = load_rows(phi_k, columns, k_stride, f, columns_present, F).to(OPERAND)
        weights += dot(queries, tl.trans(keys))
    return weights


@triton.jit
@no_type_check
def linear_rows(
    phi_q, phi_k, v, state, normalizer, valid, segments, rows, query_rows, rows_present, far_present,
    first, folded, stop, window, lag, phi_shift, q_t, k_t, v_t,
    E: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LAGGING: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Linear attention of a block of queries: (numerator, denominator).

    Keys before ``folded`` count through ``state`` [F, E] and ``normalizer`` [F]; the others one by one.
    """
    e = tl.arange(0, BLOCK_E)
    numerator = tl.zeros([BLOCK_Q, BLOCK_E], SUM)
    denominator = tl.zeros([BLOCK_Q], SUM)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        features = load_rows(phi_q, query_rows, q_t, f, far_present, F)
        sums = load_rows(state, f, E, e, f < F, E)
        totals = tl.load(normalizer + f, mask=f < F, other=0.0)
        numerator += dot(features.to(OPERAND), sums.to(OPERAND))
        denominator += tl.sum(features.to(SUM) * totals[None, :], 1)
    end = tl.minimum(first + BLOCK_Q, stop)
    if LAGGING:
        end = end - window
    for start in range(folded, end, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        present = real_tokens(valid, columns, stop, HAS_VALID)
        weights = feature_products(
            phi_q, phi_k, query_rows, rows_present, q_t, columns - phi_shift, present, k_t,
            F, BLOCK_F, BLOCK_Q, BLOCK_K, OPERAND, SUM,
        )  # fmt: skip
        seen = seen_pairs(segments, rows, rows_present, columns, present, stop, HAS_SEGMENTS)
        if LAGGING:
            seen = seen & (rows[:, None] - columns[None, :] >= window)
        weights = tl.where(seen, weights, 0.0)
        values = load_rows(v, columns, v_t, e, present, E).to(OPERAND)
        numerator += dot(weights.to(OPERAND), values)
        denominator += tl.sum(weights, 1)
    return numerator, denominator
