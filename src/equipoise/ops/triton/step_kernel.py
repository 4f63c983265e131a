"""One step of decoding in one launch: the window, S and z updated, the mix, and the window moved on.

S is updated where it lies, or written elsewhere; everything else is written to new memory, since several
programs read it. Where the caller gives its state away (BATCHED), tokens wait in slots beside S, and S is
written once they are full: reading it is what a step costs, and writing it back would double that. The
slot of a step's own token is written by one program and read by none. Sizes are compiled in and nothing
depends on what tensors hold, so the launch can be recorded in a CUDA graph.
"""

from typing import no_type_check

import triton
import triton.language as tl

from equipoise.ops.triton.common_kernels import (
    calibrated_factors,
    dot,
    load_rows,
    safe,
    scores_of,
    store_rows,
)


@triton.jit
@no_type_check
def step_kernel(
    q, k, v, phi_q, phi_k, gate, keys, values, valid, features, sums, totals, folded, pending,
    pending_features, pending_values, out, new_keys, new_values, new_valid, new_features, new_sums,
    new_totals, new_folded, new_pending, gate_b, gate_h, scale, softcap, H, N, M,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, HEADS: tl.constexpr,
    SLOTS: tl.constexpr, BATCHED: tl.constexpr, SHARED: tl.constexpr, CALIBRATED: tl.constexpr,
    LAGGING: tl.constexpr, FROM_STATE: tl.constexpr, HAS_CAP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One program per (batch row, memory) and block of E; all tensors contiguous.

    HEADS is the number of query heads of a memory, padded for products. Disjoint, the key that is folded is
    the first of the window: its features come from the state where FROM_STATE, else as phi_k.
    """
    memory = tl.program_id(0).to(tl.int64)
    b, m = memory // M, memory % M
    n = m * N // M
    first_e = tl.program_id(1) == 0
    owns_window = m % (M // N) == 0
    d, f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    member = tl.arange(0, HEADS)
    heads = b * H + m * (H // M) + member
    real = member < H // M
    k += (b * N + n) * D
    v += (b * N + n) * E
    keys += (b * N + n) * R * D
    values += (b * N + n) * R * E
    new_keys += (b * N + n) * R * D
    new_values += (b * N + n) * R * E
    queries = load_rows(q, heads, D, d, real, D)
    top = tl.full([HEADS], -1e30, SUM)
    mass = tl.zeros([HEADS], SUM)
    near = tl.zeros([HEADS, BLOCK_E], SUM)
    for start in range(0, R + 1, BLOCK_R):  # the last slot is the new token
        slots = start + tl.arange(0, BLOCK_R)
        old, new = slots < R, slots == R
        seen = new | (tl.load(valid + b * R + slots, mask=old, other=0) != 0)
        block_k = load_rows(keys, slots, D, d, old, D) + load_rows(k, slots * 0, D, d, new, D)
        block_v = load_rows(values, slots, E, e, old, E) + load_rows(v, slots * 0, E, e, new, E)
        moved = (slots >= 1) & (slots <= R) & owns_window
        store_rows(new_keys, slots - 1, D, d, moved & first_e, block_k, D)
        store_rows(new_values, slots - 1, E, e, moved, block_v, E)
        tl.store(new_valid + b * R + slots - 1, seen.to(tl.int8), mask=moved & first_e & (m == 0))
        scores, _ = scores_of(queries, block_k, scale, softcap, HAS_CAP)
        scores = tl.where(seen[None, :], scores.to(SUM), -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.where(seen[None, :], tl.exp(scores - new_top[:, None]), 0.0)
        mass = mass * shrink + tl.sum(weights, 1)
        near = near * shrink[:, None] + dot(weights.to(block_v.dtype), block_v)
        top = new_top
    column, counts = tl.load(v + e, mask=e < E, other=0.0).to(SUM), 1
    if LAGGING:
        counts = (tl.load(valid + b * R) != 0).to(tl.int32)
        column = tl.load(values + e, mask=e < E, other=0.0).to(SUM) * counts
    far = tl.zeros([HEADS, BLOCK_E], SUM)
    far_mass = tl.zeros([HEADS], SUM)
    own = tl.zeros([HEADS], SUM)
    slot = tl.arange(0, SLOTS)
    waiting, full = 0, True
    if BATCHED:
        waiting = tl.load(pending + b)
        full = waiting == SLOTS - 1
        pending_features += memory * SLOTS * F
        pending_values += (b * N + n) * SLOTS * E
        held_values = load_rows(pending_values, slot, E, e, slot < waiting, E).to(SUM)
        held_weights = tl.zeros([HEADS, SLOTS], SUM)
        mine = (slot == waiting) & (full == 0)
        kept = slot * 0.0 + 1.0
        store_rows(pending_values, slot, E, e, mine & owns_window, kept[:, None] * column[None, :], E)
    for start in range(0, F, BLOCK_F):
        part = start + f
        inside = part < F
        if FROM_STATE:
            row = tl.load(features + memory * R * F + part, mask=inside, other=0.0).to(SUM)
        else:
            row = tl.load(phi_k + memory * F + part, mask=inside, other=0.0).to(SUM)
        if LAGGING:
            row = row * counts
        sum_rows = load_rows(sums + memory * F * E, part, E, e, inside, E)
        total = tl.load(totals + memory * F + part, mask=inside, other=0.0)
        asked = load_rows(phi_q, heads, F, part, real, F).to(SUM)
        far += dot(asked, sum_rows)
        far_mass += tl.sum(asked * total[None, :], 1)
        own += tl.sum(asked * row[None, :], 1)
        after = sum_rows + row[:, None] * column[None, :]
        if BATCHED:
            held = load_rows(pending_features, slot, F, part, slot < waiting, F).to(SUM)
            held_weights += dot(asked, tl.trans(held))
            after += dot(tl.trans(held), held_values)
            store_rows(pending_features, slot, F, part, mine & first_e, kept[:, None] * row[None, :], F)
        store_rows(new_sums + memory * F * E, part, E, e, inside & full, after, E)
        tl.store(new_totals + memory * F + part, total + row, mask=inside & first_e)
        if FROM_STATE:
            move_features(features, new_features, phi_k, memory, part, first_e, F, R, BLOCK_R)
    if BATCHED:
        far += dot(held_weights, held_values)
        tl.store(new_pending + b, tl.where(full, 0, waiting + 1), mask=first_e & (m == 0))
    if LAGGING == 0:  # linear attention sees the new token too
        far += own[:, None] * column[None, :]
        far_mass += own
    weight = tl.load(gate + b * gate_b + (m * (H // M) + member) * gate_h, mask=real, other=0.0).to(SUM)
    if SHARED:
        mixed = (near * weight[:, None] + far) / safe(mass * weight + far_mass)[:, None]
    elif CALIBRATED:
        near_scale, far_scale, far_mass, _ = calibrated_factors(top, weight, far_mass)
        mixed = near * near_scale[:, None] + far * far_scale[:, None]
        mixed = mixed / (near_scale * mass + far_scale * far_mass)[:, None]
    else:
        if LAGGING:  # until the window is full, linear attention has no key to see
            weight = tl.where(tl.load(folded + b) > 0, weight, 1.0)
        mixed = near * (weight / mass)[:, None] + far * ((1.0 - weight) / safe(far_mass))[:, None]
    store_rows(out, heads, E, e, real, mixed, E)
    tl.store(new_folded + b, tl.load(folded + b) + counts, mask=first_e & (m == 0))


@triton.jit
@no_type_check
def move_features(
    features, new_features, phi_k, memory, part, first_e, F: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Move the features of the window on by one token."""
    for start in range(0, R + 1, BLOCK_R):
        slots = start + tl.arange(0, BLOCK_R)
        block = load_rows(features + memory * R * F, slots, F, part, slots < R, F)
        block += load_rows(phi_k + memory * F, slots * 0, F, part, slots == R, F)
        moved = (slots >= 1) & (slots <= R) & first_e
        store_rows(new_features + memory * R * F, slots - 1, F, part, moved, block, F)
