"""The Hedgehog map inside the kernels, so that no tensor of features [T, F] is ever written.

For a token x of a head with weight W [D, C]: features [softmax(x W), softmax(-x W)], kept above 1e-12, F = 2C
(`equipoise.layers.feature_maps.Hedgehog`). The two halves are computed together from one product, and stay
two blocks [n, BLOCK_C]; S and z hold the first half in rows 0..C, the second in rows C..2C.
"""

from typing import no_type_check

import triton
import triton.language as tl

from equipoise.ops.triton.common_kernels import dot, load_rows, real_tokens, seen_pairs


@triton.jit
@no_type_check
def project(
    tokens, weight, rows, stride, present, D: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """x W of a block of tokens [BLOCK_N, BLOCK_C]; ``weight`` points at the head's [D, C]."""
    c = tl.arange(0, BLOCK_C)
    projected = tl.zeros([BLOCK_N, BLOCK_C], SUM)
    for start in range(0, D, STEP):
        d = start + tl.arange(0, STEP)
        block = load_rows(tokens, rows, stride, d, present, D).to(OPERAND)
        projected += dot(block, load_rows(weight, d, C, c, d < D, C))
    return projected


@triton.jit
@no_type_check
def signed_softmax(projected, sign, present, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """softmax(sign x W) over C, 0 in rows that are not present."""
    inside = present[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]
    scores = tl.where(inside, projected * sign, -1e30)
    weights = tl.where(inside, tl.exp(scores - tl.max(scores, 1)[:, None]), 0.0)
    return weights / tl.where(present, tl.sum(weights, 1), 1.0)[:, None]


@triton.jit
@no_type_check
def floored(weights, present, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Features from softmax weights: kept above the floor, 0 in rows that are not present."""
    inside = present[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]
    return tl.where(inside & (weights < 1e-12), 1e-12, weights)  # not maximum, which would swallow a NaN


@triton.jit
@no_type_check
def hedgehog(
    tokens, weight, rows, stride, present, D: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Both halves of the features of a block of tokens, as operands of products."""
    projected = project(tokens, weight, rows, stride, present, D, C, BLOCK_N, BLOCK_C, STEP, OPERAND, SUM)
    positive = floored(signed_softmax(projected, 1.0, present, C, BLOCK_C), present, C, BLOCK_C)
    negative = floored(signed_softmax(projected, -1.0, present, C, BLOCK_C), present, C, BLOCK_C)
    return positive.to(OPERAND), negative.to(OPERAND)


@triton.jit
@no_type_check
def hedgehog_half(
    tokens, weight, rows, stride, present, half, D: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One half of the features, for programs that own half of S; the second where ``half`` is 1."""
    projected = project(tokens, weight, rows, stride, present, D, C, BLOCK_N, BLOCK_C, STEP, OPERAND, SUM)
    weights = signed_softmax(projected, 1.0 - 2.0 * half, present, C, BLOCK_C)
    return floored(weights, present, C, BLOCK_C).to(OPERAND)


@triton.jit
@no_type_check
def softmax_slopes(weights, slopes):
    """Gradient of what a softmax was taken of, from that of its features; none passes the floor."""
    slopes = tl.where(weights < 1e-12, 0.0, slopes)
    return weights * (slopes - tl.sum(weights * slopes, 1)[:, None])


@triton.jit
@no_type_check
def mapped_linear_rows(
    q, k, map_q, map_k, v, state, normalizer, valid, segments, rows, query_rows, rows_present, far_present,
    first, folded, stop, window, q_t, k_t, v_t,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    STEP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LAGGING: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """`equipoise.ops.triton.common_kernels.linear_rows` with the map inside: (numerator, denominator)."""
    e = tl.arange(0, BLOCK_E)
    c = tl.arange(0, BLOCK_C)
    positive, negative = hedgehog(
        q, map_q, query_rows, q_t, rows_present, D, C, BLOCK_Q, BLOCK_C, STEP, OPERAND, SUM
    )
    far = tl.where(far_present[:, None], positive, 0.0).to(OPERAND)
    numerator = dot(far, load_rows(state, c, E, e, c < C, E).to(OPERAND))
    totals = tl.load(normalizer + c, mask=c < C, other=0.0)
    denominator = tl.sum(far.to(SUM) * totals[None, :], 1)
    far = tl.where(far_present[:, None], negative, 0.0).to(OPERAND)
    numerator += dot(far, load_rows(state + C * E, c, E, e, c < C, E).to(OPERAND))
    totals = tl.load(normalizer + C + c, mask=c < C, other=0.0)
    denominator += tl.sum(far.to(SUM) * totals[None, :], 1)
    end = tl.minimum(first + BLOCK_Q, stop)
    if LAGGING:
        end = end - window
    for start in range(folded, end, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        present = real_tokens(valid, columns, stop, HAS_VALID)
        positive_k, negative_k = hedgehog(
            k, map_k, columns, k_t, present, D, C, BLOCK_K, BLOCK_C, STEP, OPERAND, SUM
        )
        weights = dot(positive, tl.trans(positive_k)) + dot(negative, tl.trans(negative_k))
        seen = seen_pairs(segments, rows, rows_present, columns, present, stop, HAS_SEGMENTS)
        if LAGGING:
            seen = seen & (rows[:, None] - columns[None, :] >= window)
        weights = tl.where(seen, weights, 0.0)
        values = load_rows(v, columns, v_t, e, present, E).to(OPERAND)
        numerator += dot(weights.to(OPERAND), values)
        denominator += tl.sum(weights, 1)
    return numerator, denominator


@triton.jit
@no_type_check
def mapped_query_slopes(
    q, k, map_q, map_k, v, state, normalizer, valid, segments, rows, present, far, pulled, drift, first,
    folded, total, window, q_t, k_t, v_t,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    STEP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LAGGING: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_SEGMENTS: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Gradients of q W for a block of queries [BLOCK_Q, BLOCK_C].

    ``pulled`` and ``drift`` are the gradients of the rows' numerators and denominators.
    """
    e = tl.arange(0, BLOCK_E)
    c = tl.arange(0, BLOCK_C)
    sums = load_rows(state, c, E, e, c < C, E).to(OPERAND)
    totals = tl.load(normalizer + c, mask=c < C, other=0.0)
    found_p = dot(pulled.to(OPERAND), tl.trans(sums)) + drift[:, None] * totals[None, :]
    sums = load_rows(state + C * E, c, E, e, c < C, E).to(OPERAND)
    totals = tl.load(normalizer + C + c, mask=c < C, other=0.0)
    found_n = dot(pulled.to(OPERAND), tl.trans(sums)) + drift[:, None] * totals[None, :]
    found_p = tl.where(far[:, None], found_p, 0.0)
    found_n = tl.where(far[:, None], found_n, 0.0)
    end = tl.minimum(first + BLOCK_Q, total)
    if LAGGING:
        end = end - window
    for start in range(folded, end, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        there = real_tokens(valid, columns, total, HAS_VALID)
        seen = seen_pairs(segments, rows, present, columns, there, total, HAS_SEGMENTS)
        if LAGGING:
            seen = seen & (rows[:, None] - columns[None, :] >= window)
        values = load_rows(v, columns, v_t, e, there, E)
        slopes = dot(pulled.to(OPERAND), tl.trans(values.to(OPERAND))) + drift[:, None]
        slopes = tl.where(seen, slopes, 0.0).to(OPERAND)
        positive, negative = hedgehog(
            k, map_k, columns, k_t, there, D, C, BLOCK_K, BLOCK_C, STEP, OPERAND, SUM
        )
        found_p += dot(slopes, positive)
        found_n += dot(slopes, negative)
    projected = project(q, map_q, rows, q_t, present, D, C, BLOCK_Q, BLOCK_C, STEP, OPERAND, SUM)
    found_p = softmax_slopes(signed_softmax(projected, 1.0, present, C, BLOCK_C), found_p)
    return found_p - softmax_slopes(signed_softmax(projected, -1.0, present, C, BLOCK_C), found_n)
