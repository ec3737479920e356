"""Attention of one new token a row over a cache in which each row has a range of its own: device code.

    append          keys and values of the rows' tokens, to their places
    attend_chunk    program (row, key head; chunk): its query heads over CHUNK positions of the row
    attend_whole    program (row; head): the chunks of the row put together

Where a row begins and how long it is are read from memory, so a captured graph serves any; a row of length 0 is
padding: nothing is written for it, and its result is 0. Chunks are counted from the row's own first position and added
in their order, so a row is the same in any company. Softmax runs along with the sum, with a maximum that grows
(Milakov and Gimelshein, Online normalizer calculation for softmax, 2018); chunks are put together by their own maxima
and sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import bound, dot, rounded


@triton.jit
def exact_dot(a, b):
    """a @ b in float32, without rounding float32 operands."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return dot(a, b)


@triton.jit
def first_seen(length, WINDOW: tl.constexpr):
    """The first position that the last of `length` tokens sees."""
    if WINDOW > 0:
        return tl.maximum(length - WINDOW, 0)
    else:
        return length * 0


@triton.jit
def append(
    key, value, keys, values, starts, lengths,
    key_head, key_row, value_head, value_row, keys_head, values_head,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """key [heads, rows, D] and value [heads, rows, DV], by strides, to the rows' last places; program (row, head)."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    place = tl.load(starts + row) + length - 1
    column = tl.arange(0, WIDTH)
    keep = (column < D) & (length > 0)
    x = tl.load(key + head * key_head + row * key_row + column, mask=keep)
    tl.store(keys + head.to(tl.int64) * keys_head + place * D + column, x, mask=keep)
    keep = (column < DV) & (length > 0)
    x = tl.load(value + head * value_head + row * value_row + column, mask=keep)
    tl.store(values + head.to(tl.int64) * values_head + place * DV + column, x, mask=keep)


@triton.jit
def attend_chunk(
    query, keys, values, starts, lengths, out, parts, sums,
    query_head, query_row, keys_head, values_head, scale, softcap,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ALONE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """query [H, rows, D] by strides, H = HEADS * GROUPS. ALONE: no row has a second chunk, and this writes `out`
    [rows, H, DV]. Else sums that are not divided yet go to `parts` [rows, H, chunks, DV], and the maximum of the scores
    and the sum of the weights to `sums` [rows, H, chunks, 2], both float32.

    ROWS: GROUPS, padded to what tensor cores take; WIDTH, WIDTH_V: D and DV likewise. STEP: positions at a time.
    """
    row, head, chunk = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    start = tl.load(starts + row)
    seen = first_seen(length, WINDOW)
    number = seen // CHUNK + chunk
    low = tl.maximum(number * CHUNK, seen)
    high = tl.minimum(number * CHUNK + CHUNK, length)
    group = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    column_v = tl.arange(0, WIDTH_V)
    own = head * GROUPS + group
    q = tl.load(
        query + own[:, None] * query_head + row * query_row + column[None, :],
        mask=(group < GROUPS)[:, None] & (column < D)[None, :], other=0.0,
    )  # fmt: skip
    keys += head.to(tl.int64) * keys_head + start * D
    values += head.to(tl.int64) * values_head + start * DV
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, WIDTH_V), tl.float32)
    for first in range(bound(low), bound(high), STEP):
        at = first + tl.arange(0, STEP)
        there = at < high
        k = tl.load(keys + at[None, :] * D + column[:, None], mask=there[None, :] & (column < D)[:, None], other=0.0)
        scores = exact_dot(q, k) * scale  # [ROWS, STEP]
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(best - higher)
        v = tl.load(
            values + at[:, None] * DV + column_v[None, :], mask=there[:, None] & (column_v < DV)[None, :], other=0.0
        )
        total = total * shrink + tl.sum(weights, axis=1)
        mean = mean * shrink[:, None] + exact_dot(rounded(weights, v.dtype), v)
        best = higher
    keep = (group < GROUPS)[:, None] & (column_v < DV)[None, :]
    result = row.to(tl.int64) * HEADS * GROUPS + own
    if ALONE:
        mean = mean / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + result[:, None] * DV + column_v[None, :], rounded(mean, out.dtype.element_ty), mask=keep)
    else:
        part = result * tl.num_programs(1) + chunk
        tl.store(parts + part[:, None] * DV + column_v[None, :], mean, mask=keep)
        tl.store(sums + part * 2, best, mask=group < GROUPS)
        tl.store(sums + part * 2 + 1, total, mask=group < GROUPS)


@triton.jit
def attend_whole(
    parts, sums, lengths, out, chunks,
    WINDOW: tl.constexpr, DV: tl.constexpr, WIDTH_V: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`out` from `parts` and `sums` of `chunks` chunks, as attend_chunk left them; program (row, head)."""
    row = tl.program_id(0)
    result = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    count = tl.cdiv(length, CHUNK) - first_seen(length, WINDOW) // CHUNK
    column = tl.arange(0, WIDTH_V)
    each = tl.arange(0, STEP)
    best = tl.full((STEP,), float("-inf"), tl.float32)
    for first in range(0, bound(count), STEP):
        at = result * chunks + first + each
        best = tl.maximum(best, tl.load(sums + at * 2, mask=first + each < count, other=float("-inf")))
    highest = tl.max(best, axis=0)
    total = tl.zeros((STEP,), tl.float32)
    mean = tl.zeros((WIDTH_V,), tl.float32)
    for first in range(0, bound(count), STEP):
        there = first + each < count
        at = result * chunks + first + each
        weights = tl.exp(tl.load(sums + at * 2, mask=there, other=float("-inf")) - highest)
        total += weights * tl.load(sums + at * 2 + 1, mask=there, other=0.0)
        part = tl.load(
            parts + at[:, None] * DV + column[None, :], mask=there[:, None] & (column < DV)[None, :], other=0.0
        )
        mean += tl.sum(part * weights[:, None], axis=0)
    whole = tl.sum(total, axis=0)
    mean = mean / tl.where(whole == 0, 1.0, whole)
    tl.store(out + result * DV + column, rounded(mean, out.dtype.element_ty), mask=column < DV)
