"""Kernels of speculative loads: a learned head evaluated for a few rows, and the one expert that it puts into a window.

Small matrices times vectors, in float32; see ``predict/network.py`` for what they mean. Constants are powers of two.
"""

import triton
import triton.language as tl

from .kernels import _HALF_LIFE, _NEVER, _NO_EXPERT, _keys


@triton.jit
def _rows_of(given, ring):
    """How many rows are loaded for ahead: those that were given for the step under way."""
    return tl.where(tl.load(given + 1) == tl.load(ring), tl.load(given), 0).to(tl.int32)


@triton.jit(do_not_specialize=["top_k", "width"], do_not_specialize_on_alignment=["ids", "weights"])
def observe(given, ids, weights, top_k, added, before, after, width, ring, S: tl.constexpr):
    """``after`` = ``before`` and what a layer's choices add, one program per row.

    Args:
        given: int64 ``[2]``: rows, and the step in which they run; in any other there are none.
        ids, weights: ``[rows, top_k]``, ids negative where there is none. Weights of any scale count as shares of 1.
        added: ``[experts, 2 * width]``: what an expert's presence adds, then what its weight, times ``top_k``, adds.
        before, after: ``[rows, width]``.
    """
    row = tl.program_id(0)
    if row >= _rows_of(given, ring):
        return
    i = tl.arange(0, S)
    state = tl.load(before + row * width + i, mask=i < width, other=0.0)
    total = tl.full((), 0.0, tl.float32)
    for k in range(0, top_k):
        total += tl.load(weights + row * top_k + k).to(tl.float32)
    scale = top_k / tl.maximum(total, 1e-9)
    for k in range(0, top_k):
        expert = tl.load(ids + row * top_k + k).to(tl.int32)
        weight = tl.load(weights + row * top_k + k).to(tl.float32) * scale
        of = added + tl.maximum(expert, 0) * 2 * width + i
        is_here = (i < width) & (tl.zeros_like(i) + expert >= 0)
        state += tl.load(of, mask=is_here, other=0.0) + weight * tl.load(of + width, mask=is_here, other=0.0)
    tl.store(after + row * width + i, state, mask=i < width)


@triton.jit(do_not_specialize=["experts", "width", "hidden"])
def evaluate(
    given,
    state,
    known,
    inner,
    outer,
    bias,
    scores,
    experts,
    width,
    hidden,
    ring,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``relu(state @ inner.T + known) @ outer.T + bias``, one program per row: logits of an expert's use.

    Args:
        given: as in ``observe``.
        state: ``[rows, width]``.
        known: ``[rows, hidden]``: what was known before the step.
        inner: ``[hidden, width]``.
        outer: ``[experts, hidden]``.
        bias: ``[experts]``.
        scores: ``[rows, experts]``.
    """
    row = tl.program_id(0)
    if row >= _rows_of(given, ring):
        return
    lane = tl.arange(0, P)
    i = tl.arange(0, BLOCK)
    score = tl.load(bias + lane, mask=lane < experts, other=0.0)
    for unit in range(0, hidden, BLOCK):
        h = unit + i
        value = tl.load(known + row * hidden + h, mask=h < hidden, other=0.0)
        for first in range(0, width, BLOCK):
            s = first + i
            x = tl.load(state + row * width + s, mask=s < width, other=0.0)
            is_weight = (h[:, None] < hidden) & (s[None, :] < width)
            value += tl.sum(
                tl.load(inner + h[:, None] * width + s[None, :], mask=is_weight, other=0.0) * x[None, :], axis=1
            )
        value = tl.maximum(value, 0.0)
        is_weight = (lane[:, None] < experts) & (h[None, :] < hidden)
        weight = tl.load(outer + lane[:, None] * hidden + h[None, :], mask=is_weight, other=0.0)
        score += tl.sum(weight * value[None, :], axis=1)
    tl.store(scores + row * experts + lane, score, mask=lane < experts)


@triton.jit(do_not_specialize=["most_rows", "threshold", "width", "base", "experts", "slots"])
def select_speculative(
    given, scores, most_rows, threshold, tables, width, base, experts, slots, misses, ring, P: tl.constexpr
):
    """``WindowTables.speculate`` by the best row of scores; ``kernels`` has the other arguments.

    Args:
        given: as in ``observe``; without rows nothing is loaded speculatively.
        scores: float32 ``[most_rows, experts]``.
    """
    rows = tl.minimum(_rows_of(given, ring), most_rows)
    if rows == 0:
        tl.store(misses, 0)
        return
    lane = tl.arange(0, P)
    is_expert = lane < experts
    epoch = (tl.load(ring) // _HALF_LIFE).to(tl.int32)
    row = tl.load(tables + lane, mask=is_expert, other=-1)
    warm = tl.load(tables + width + lane, mask=is_expert, other=0)
    since = tl.load(tables + 2 * width + lane, mask=is_expert, other=0)
    record = tl.load(tables + 3 * width + lane, mask=is_expert, other=-1)
    who = tl.load(tables + 4 * width + lane, mask=lane < slots, other=-1)
    mark = tl.load(tables + 5 * width + lane, mask=is_expert, other=0)
    score = tl.full((P,), float("-inf"), tl.float32)
    for r in range(0, rows):
        score = tl.maximum(score, tl.load(scores + r * experts + lane, mask=is_expert, other=float("-inf")))
    likely = score > threshold
    absent = tl.where(likely & (record >= 0) & (row < 0), score, float("-inf"))
    best = tl.max(absent, axis=0)
    victim = tl.min(_keys(likely & (row >= 0), warm >> tl.minimum(epoch - since, 31), who, slots, lane), axis=0)
    count = tl.where(best > threshold, 1, 0) * tl.where(victim != _NEVER, 1, 0)
    if count == 1:
        expert = tl.min(tl.where(absent == best, lane, _NO_EXPERT), axis=0)
        slot = ((victim >> 16) & _NO_EXPERT).to(tl.int32)
        left = (victim & _NO_EXPERT).to(tl.int32)
        row = tl.where(lane == left, -1, tl.where(lane == expert, base + slot, row))
        tl.store(tables + lane, row, mask=is_expert)
        tl.store(tables + 4 * width + lane, tl.where(lane == slot, expert, who), mask=lane < slots)
        tl.store(tables + 5 * width + lane, tl.where(mark > 0, 3, 2), mask=lane == expert)
        tl.store(misses + 1, tl.sum(tl.where(lane == expert, record, 0), axis=0))
        tl.store(misses + 2, slot)
        tl.store(misses + 3, -1)
    tl.store(misses, count)
