"""Planes and scales -> weights, and the products of many rows with them: device code.

A weight is decoded exactly as the reference does it: in float32, offset first, then planes 0, 1, ..., converted once.
A plane adds +scale or -scale: its bit becomes the sign bit of the scale, one shift and one logic operation a weight.

Tensors have a dimension for every coordinate of the tiled layout, so that a lane decodes the words it loaded itself:
words [t, g, warp, block, h v] (4, 8, WARPS, BLOCKS, 4 or 2), weights [..., unit, c, e] (UNITS, 4 / UNITS, 8) after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import axis, dot, rounded, stored_column


@triton.jit
def decode_affine(
    planes, scales, units, word_at, value_at, lane_values, unit_at, BITS: tl.constexpr, UNITS: tl.constexpr
):
    """Weights in float32 [4, 8, warps, blocks, h v, UNITS, 4 / UNITS, 8].

    word_at [.., h v]: places of words; value_at [.., h v, UNITS, 1, 1]: which block's and group's coefficients;
    lane_values, unit_at: a row's place among those of its block, and its unit's place.
    """
    shape: tl.constexpr = word_at.shape
    BYTES: tl.constexpr = scales.dtype.element_ty == tl.int8
    unit = 1.0
    if BYTES:
        unit = tl.load(units + unit_at).to(tl.float32) * 0.0078125  # 2^-7
    first = scales + value_at * ((BITS + 1) * 16) + lane_values
    whole: tl.constexpr = (shape[0], shape[1], shape[2], shape[3], shape[4], UNITS, 4 // UNITS, 8)
    total = tl.broadcast_to(tl.load(first + BITS * 16).to(tl.float32) * unit, whole)
    # the bit of (unit, c, e) moved to the sign
    e = axis(8, 7, 8)
    shift = 31 - (axis(UNITS, 5, 8) * (16 // UNITS) + axis(4 // UNITS, 6, 8) * 4 + e // 2 + e % 2 * 16)
    for plane in tl.static_range(BITS):
        scale = tl.load(first + plane * 16).to(tl.float32) * unit
        if BYTES:
            scale = scale * (1.0 / (1 << plane))
        words = tl.reshape(
            tl.load(planes[plane] + word_at), (shape[0], shape[1], shape[2], shape[3], shape[4], 1, 1, 1)
        )
        signed = ((words << shift) & -0x80000000) ^ (-scale).to(tl.int32, bitcast=True)
        total += signed.to(tl.float32, bitcast=True)
    return total


@triton.jit
def decode_codebook(planes, table, word_at, n, BITS: tl.constexpr):
    """Weights in fp16 [4, 8, warps, blocks, h v, 1, 4, 8]; n [.., h v, 1, 1, 1]: rows of the table."""
    shape: tl.constexpr = word_at.shape
    e = axis(8, 7, 8)
    shift = axis(4, 6, 8) * 4 + e // 2 + e % 2 * 16
    codes = tl.zeros((shape[0], shape[1], shape[2], shape[3], shape[4], 1, 4, 8), tl.int32)
    for plane in tl.static_range(BITS):
        words = tl.reshape(
            tl.load(planes[plane] + word_at), (shape[0], shape[1], shape[2], shape[3], shape[4], 1, 1, 1)
        )
        codes = codes * 2 + ((words >> shift) & 1)
    return tl.load(table + n * (1 << BITS) + codes)


@triton.jit
def decode_rows(
    planes, scales, units, index_ptr, out_ptr,
    count, out_features, columns, chunks, groups, group_size,
    BITS: tl.constexpr, CODEBOOK: tl.constexpr, INDEXED: tl.constexpr, UNITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr, PADDED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """out [count, K]: rows index[0..count-1] of the weight, or rows 0..count-1; program (i, j): 8 rows, WARPS tiles."""
    place = tl.program_id(0) * 8 + axis(8, 1, 8)
    row = place
    if INDEXED:
        row = tl.load(index_ptr + place, mask=place < count, other=0).to(tl.int32)
    row = tl.minimum(tl.maximum(row, 0), out_features - 1)
    block, lane, high = row // 16, row % 8, row // 8 % 2
    tile = tl.program_id(1) * WARPS + axis(WARPS, 2, 8)
    known_tile = tl.minimum(tile, chunks - 1)
    v = axis(2, 4, 8)
    word_at = (block * chunks + known_tile) * 128 + lane * 16 + axis(4, 0, 8) * 4 + high * 2 + v
    word_at = tl.reshape(word_at, (4, 8, WARPS, 1, 2))
    if CODEBOOK:
        weights = decode_codebook(planes, scales, word_at, row + axis(4, 0, 8) * 0, BITS)
    else:
        unit = (known_tile * 2 + v) * UNITS + axis(UNITS, 5, 8)
        value_at = block * groups + tl.minimum(unit // GROUP_UNITS, groups - 1) + axis(4, 0, 8) * 0
        lane_values = lane * 2 + high
        weights = decode_affine(
            planes, scales, units, word_at, value_at, lane_values, block * 16 + lane_values, BITS, UNITS
        )
    column = tile * 256 + v * 128 + (axis(UNITS, 5, 8) * (4 // UNITS) + axis(4 // UNITS, 6, 8)) * 32
    column += axis(4, 0, 8) * 8 + axis(8, 7, 8)
    keep = (place < count) & (tile < chunks)
    if PADDED:
        column, real = stored_column(column, group_size, GROUP_UNITS * 128 // UNITS)
        keep = keep & real
    keep = keep & (column < columns)
    tl.store(out_ptr + place.to(tl.int64) * columns + column, rounded(weights, out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def many_rows(
    x_ptr, planes, scales, units, y_ptr,
    rows, out_features, blocks, groups,
    CHUNKS: tl.constexpr, BITS: tl.constexpr, CODEBOOK: tl.constexpr, UNITS: tl.constexpr, GROUP_UNITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """y [rows, N] from x [rows, chunks * 256], columns in the order v c sub blk t half of tiles.

    Program (i, j): WARPS * BLOCKS blocks of 16 rows of W, decoded to x's dtype in registers, by ROWS rows of x.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SIZE: tl.constexpr = WARPS * BLOCKS * 16
    first_block = tl.program_id(0) * (WARPS * BLOCKS)
    # rows of a program: (BLOCKS, WARPS, h, g), a warp's 16 together, as the tensor cores' operand has them
    block = tl.minimum(first_block + axis(BLOCKS, 3, 5) * WARPS + axis(WARPS, 2, 5), blocks - 1)
    word_at = block * CHUNKS * 128 + axis(8, 1, 5) * 16 + axis(4, 0, 5) * 4 + axis(2, 4, 5) * 2
    block = tl.minimum(first_block + axis(BLOCKS, 3, 8) * WARPS + axis(WARPS, 2, 8), blocks - 1)
    h = axis(2, 4, 8)
    lane_values = axis(8, 1, 8) * 2 + h + axis(4, 0, 8) * 0
    n = tl.minimum(block * 16 + h * 8 + axis(8, 1, 8), out_features - 1) + axis(4, 0, 8) * 0
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x_at = x_ptr + row.to(tl.int64)[:, None] * (CHUNKS * 256) + tl.arange(0, 128)[None, :]
    total = tl.zeros((SIZE, ROWS), tl.float32)
    for half in range(CHUNKS * 2):  # 128 columns: twice as many would not fit into registers
        x = tl.load(x_at + half * 128, mask=(row < rows)[:, None], other=0.0)
        here = word_at + half // 2 * 128 + half % 2
        if CODEBOOK:
            weights = decode_codebook(planes, scales, here, n, BITS)
        else:
            unit = half * UNITS + axis(UNITS, 5, 8)
            value_at = block * groups + tl.minimum(unit // GROUP_UNITS, groups - 1)
            unit_at = block * 16 + lane_values
            weights = decode_affine(planes, scales, units, here, value_at, lane_values, unit_at, BITS, UNITS)
        weights = rounded(weights, DTYPE)
        weights = tl.reshape(weights, (4, 8, WARPS, BLOCKS, 2, 4, 2, 2, 2))  # t g warp block h c sub blk half
        weights = tl.permute(weights, (3, 2, 4, 1, 5, 6, 7, 0, 8))  # block warp h g, c sub blk t half
        total = dot(tl.reshape(weights, (SIZE, 128)), tl.trans(x), total)
    n = first_block * 16 + tl.arange(0, SIZE)
    keep = (n < out_features)[None, :] & (row < rows)[:, None]
    y_at = y_ptr + row.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(y_at, rounded(tl.trans(total), DTYPE), mask=keep)
