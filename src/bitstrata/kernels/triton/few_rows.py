"""y = x W^T for up to 16 rows a program, from the planes: device code.

    y[r, n] = sum over groups j of ( offset[n, j] X[j, r] + sum_i scale_i[n, j] P_i[n, j, r] )
    P_i[n, j, r] = sum over the group's columns of B_i[n, k] x[r, k],    X[j, r] the group's sum of x

P_i and X are products on the tensor cores: their fp16 or bf16 operand is +-1, which is exact, and costs one shift and
one mask for two weights, with no arithmetic at all. Scales meet sums of a whole unit of 32 to 128 columns in
float32, so nothing is rounded to 16 bits before the result. Summing plane by plane (Park et al., LUT-GEMM, 2022,
section 3.1, does it with tables of partial sums instead) makes the cost per plane equal for any bits, and lets rows
at different bits share every plane. float32 activations are split into three bf16 parts, 24 bits together.

A warp takes tiles c, c + WARPS, ... of BLOCKS * 16 rows: the warps of a program split K, and add their sums in a
fixed order at the end. There is no other communication. Every tensor of the loop is written with a dimension for the
lanes' two coordinates (t of 4, g of 8), so that the compiler's default layouts are those of the tensor cores:
no shared memory, no shuffles (tests/kernels/test_triton_compile.py looks at the result).

The order of columns inside a product is that of the lanes' registers, the same for weights and activations:
column 32 c + 8 t + 4 sub + 2 blk + half  ->  32 c + 16 blk + 4 t + 2 sub + half.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import axis, dot, rounded, stored_column


@triton.jit
def pairs(words, mask, one: tl.constexpr, DTYPE: tl.constexpr):
    """Words [a, b, c, d, e] -> +1 where a bit is set, else -1: DTYPE [a, b, c, d, e, 16, 2].

    mask is 0x80008000, an argument at run time: as a constant it would cost the assembler a second instruction.
    one: -1 in both halves of a word.
    """
    shape: tl.constexpr = words.shape
    moved = tl.reshape(words, (shape[0], shape[1], shape[2], shape[3], shape[4], 1)) << (15 - axis(16, 5, 6))
    signs = (moved & mask) ^ one
    return tl.join(signs.to(tl.int16), (signs >> 16).to(tl.int16)).to(DTYPE, bitcast=True)


@triton.jit
def operand(values, UNITS: tl.constexpr, WARPS: tl.constexpr, BLOCKS: tl.constexpr):
    """Weights [t, g, WARPS, BLOCKS, h v, 16, 2] as products take them: [v UNITS WARPS, 16 BLOCKS, 128 / UNITS]."""
    REST: tl.constexpr = 4 // UNITS
    values = tl.reshape(values, (4, 8, WARPS, BLOCKS, 2, 2, UNITS, REST, 2, 2, 2))  # ... h v unit c sub blk half
    values = tl.permute(values, (5, 6, 2, 3, 4, 1, 7, 9, 0, 8, 10))  # v unit warp block h g c blk t sub half
    return tl.reshape(values, (2 * UNITS * WARPS, BLOCKS * 16, 128 // UNITS))


@triton.jit
def activations(
    x_ptr, stride, rows, columns, first, group_size,
    UNITS: tl.constexpr, GROUP_UNITS: tl.constexpr, PADDED: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x of chunks first..first+WARPS-1, zeros outside: [v UNITS WARPS, 128 / UNITS, ROWS]."""
    REST: tl.constexpr = 4 // UNITS
    # [t, g, WARPS, v, c, rows / 8, e]
    row = tl.program_id(1) * ROWS + axis(ROWS // 8, 5, 7) * 8 + axis(8, 1, 7)
    column = (first + axis(WARPS, 2, 7)) * 256 + axis(2, 3, 7) * 128 + axis(4, 4, 7) * 32
    column += axis(4, 0, 7) * 8 + axis(8, 6, 7)
    keep = row < rows
    if PADDED:
        column, real = stored_column(column, group_size, GROUP_UNITS * 128 // UNITS)
        keep = keep & real
    x = tl.load(x_ptr + row.to(tl.int64) * stride + column, mask=keep & (column < columns), other=0.0)
    x = tl.reshape(x, (4, 8, WARPS, 2, UNITS, REST, ROWS // 8, 2, 2, 2))  # ... unit c rows/8 sub blk half
    x = tl.permute(x, (3, 4, 2, 5, 8, 0, 7, 9, 6, 1))  # v unit warp c blk t sub half rows/8 g
    return tl.reshape(x, (2 * UNITS * WARPS, 128 // UNITS, ROWS))


@triton.jit
def product(weights, x):
    """weights @ x in float32; weights exact in bf16 if x is float32."""
    if x.dtype == tl.float32:
        high = rounded(x, tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rounded(rest, tl.bfloat16)
        low = rounded(rest - middle.to(tl.float32), tl.bfloat16)
        return dot(weights, high, dot(weights, middle, dot(weights, low)))
    else:
        return dot(weights, x)


@triton.jit
def store_rows(y_ptr, y, rows, out_features, block, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """y [16 BLOCKS, ROWS] float32 -> rows of the result."""
    n = (block * 16 + tl.arange(0, BLOCKS * 16))[:, None]
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[None, :]
    keep = (n < out_features) & (row < rows)
    tl.store(y_ptr + row.to(tl.int64) * out_features + n, rounded(y, y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def coefficients(scales, value_at, lane_values, row_bits, plane: tl.constexpr, bits: tl.constexpr, MIXED: tl.constexpr):
    """Scales of `plane`, or offsets if it is -1, in float32, without the unit that bytes have; MIXED: zero for rows
    at other bits.
    """
    entry: tl.constexpr = bits if plane < 0 else plane
    address = scales + (value_at * (bits + 1) + entry) * 16 + lane_values
    if MIXED:
        value = tl.load(address, mask=row_bits == bits, other=0).to(tl.float32)
    else:
        value = tl.load(address).to(tl.float32)
    if scales.dtype.element_ty == tl.int8:
        step: tl.constexpr = 1.0 / (1 << (7 + (0 if plane < 0 else plane)))
        value = value * step
    return value


@triton.jit
def few_rows_affine(
    x_ptr, planes, scales, units, row_bits_ptr, y_ptr,
    rows, out_features, columns, blocks, groups, group_size, stride, row_bits_stride, mask,
    CHUNKS: tl.constexpr, SCALES_BITS: tl.constexpr, MIXED: tl.constexpr, UNITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr,
    MINUS_ONE: tl.constexpr,
):  # fmt: skip
    """x [rows, K] -> y [rows, N]; program (i, j): blocks i * BLOCKS.. of 16 rows of W, rows j * ROWS.. of x.

    planes, scales, units: tuples in the order of SCALES_BITS; units: None where coefficients are not bytes.
    MIXED: row r is at row_bits[r] bits, one of SCALES_BITS, or NaN; otherwise all rows are at the only entry.
    UNITS: units of scale in 128 columns; GROUP_UNITS: those of a group. MINUS_ONE: -1 twice in a word, as x's kind.
    """
    DTYPE: tl.constexpr = tl.float16 if x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    BATCH: tl.constexpr = 2 * UNITS * WARPS
    OWN_ROWS: tl.constexpr = ROWS // 8 if MIXED else 1  # sizes of the dimensions that tell one row's scales
    OWN_HALF: tl.constexpr = 2 if MIXED else 1
    COUNT: tl.constexpr = len(SCALES_BITS)
    PLANES: tl.constexpr = SCALES_BITS[COUNT - 1]
    first_block = tl.program_id(0) * BLOCKS
    # a block past the end reads the last one again: its rows are not stored
    word_block = tl.minimum(first_block + axis(BLOCKS, 3, 5), blocks - 1)
    lane_words = axis(8, 1, 5) * 16 + axis(4, 0, 5) * 4 + axis(4, 4, 5)
    # coefficients: [t, g, WARPS, v, unit, BLOCKS, rows / 8, half, h]
    block = tl.minimum(first_block + axis(BLOCKS, 5, 9), blocks - 1)
    lane_values = axis(8, 1, 9) * 2 + axis(2, 8, 9) + axis(4, 0, 9) * 0
    top = PLANES
    row_bits = 0
    if MIXED:
        row = tl.program_id(1) * ROWS + axis(OWN_ROWS, 6, 9) * 8 + axis(4, 0, 9) * 2 + axis(OWN_HALF, 7, 9)
        row_bits = tl.load(row_bits_ptr + row * row_bits_stride, mask=row < rows, other=0).to(tl.int32)
        each = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        each_bits = tl.load(row_bits_ptr + each * row_bits_stride, mask=each < rows, other=0).to(tl.int32)
        top = tl.max(each_bits, axis=0)
    ones = tl.full((BATCH, BLOCKS * 16, 64 // UNITS), 0x3C00 if DTYPE == tl.float16 else 0x3F80, tl.int16)
    ones = tl.join(ones, ones).to(DTYPE, bitcast=True)  # joined, to have the planes' layout
    ones = tl.reshape(ones, (BATCH, BLOCKS * 16, 128 // UNITS))
    total = tl.zeros((WARPS, BLOCKS * 16, ROWS), tl.float32)
    for first in range(0, CHUNKS, WARPS):
        x = activations(
            x_ptr, stride, rows, columns, first, group_size, UNITS, GROUP_UNITS, PADDED, WARPS, ROWS
        )  # fmt: skip
        tile = tl.minimum(first + axis(WARPS, 2, 5), CHUNKS - 1)
        word_at = (word_block * CHUNKS + tile) * 128 + lane_words
        unit = ((first + axis(WARPS, 2, 9)) * 2 + axis(2, 3, 9)) * UNITS + axis(UNITS, 4, 9)
        value_at = block * groups + tl.minimum(unit // GROUP_UNITS, groups - 1)
        for plane in tl.static_range(-1, PLANES):  # -1: the offset
            if plane < top:
                if plane < 0:
                    sums = product(ones, x)
                else:
                    words = tl.load(planes[plane] + word_at)
                    sums = product(operand(pairs(words, mask, MINUS_ONE, DTYPE), UNITS, WARPS, BLOCKS), x)
                scale = 0.0
                for at in tl.static_range(COUNT):
                    if plane < SCALES_BITS[at]:
                        value = coefficients(scales[at], value_at, lane_values, row_bits, plane, SCALES_BITS[at], MIXED)
                        value = tl.permute(value, (3, 4, 2, 5, 8, 1, 6, 0, 7))  # v unit warp block h g rows/8 t half
                        value = tl.reshape(value, (BATCH, BLOCKS * 16, OWN_ROWS, 4, OWN_HALF))
                        value = tl.broadcast_to(value, (BATCH, BLOCKS * 16, ROWS // 8, 4, 2))
                        value = tl.reshape(value, (BATCH, BLOCKS * 16, ROWS))
                        scale = value if at == 0 or SCALES_BITS[at - 1] <= plane else scale + value
                total += tl.sum(tl.reshape(sums * scale, (2 * UNITS, WARPS, BLOCKS * 16, ROWS)), axis=0)
    y = tl.sum(total, axis=0)  # [16 BLOCKS, ROWS], warps in order
    # bytes are worth their row's unit; bits without scales are worth NaN
    n = tl.minimum(first_block * 16 + tl.arange(0, BLOCKS * 16), blocks * 16 - 1)[:, None]
    unit_at = n // 16 * 16 + n % 8 * 2 + n // 8 % 2
    if MIXED:
        factor = tl.full((BLOCKS * 16, ROWS), float("nan"), tl.float32)
        for at in tl.static_range(COUNT):
            value = 1.0
            if scales[at].dtype.element_ty == tl.int8:
                value = tl.load(units[at] + unit_at).to(tl.float32)
            factor = tl.where(each_bits[None, :] == SCALES_BITS[at], value, factor)
        y = y * factor
    elif scales[0].dtype.element_ty == tl.int8:
        y = y * tl.load(units[0] + unit_at).to(tl.float32)
    store_rows(y_ptr, y, rows, out_features, first_block, ROWS, BLOCKS)


@triton.jit
def few_rows_codebook(
    x_ptr, planes, tables, row_bits_ptr, y_ptr,
    rows, out_features, columns, blocks, stride, row_bits_stride,
    CHUNKS: tl.constexpr, SCALES_BITS: tl.constexpr, MIXED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """As few_rows_affine, of weights that are entries of their row's table: looked up in memory that stays in L1."""
    COUNT: tl.constexpr = len(SCALES_BITS)
    PLANES: tl.constexpr = SCALES_BITS[COUNT - 1]
    first_block = tl.program_id(0) * BLOCKS
    block = tl.minimum(first_block + axis(BLOCKS, 3, 5), blocks - 1)
    lane_words = axis(8, 1, 5) * 16 + axis(4, 0, 5) * 4 + axis(4, 4, 5)
    # weights: [t, g, WARPS, BLOCKS, h v, 16, 2]
    n = (first_block + axis(BLOCKS, 3, 7)) * 16 + axis(4, 4, 7) // 2 * 8 + axis(8, 1, 7)
    n = tl.minimum(n, out_features - 1)
    top = PLANES
    each = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    each_bits = tl.full((ROWS,), SCALES_BITS[0], tl.int32)
    if MIXED:
        each_bits = tl.load(row_bits_ptr + each * row_bits_stride, mask=each < rows, other=0).to(tl.int32)
        top = tl.max(each_bits, axis=0)
    total = tl.zeros((2 * WARPS, BLOCKS * 16, ROWS), tl.float32)
    for first in range(0, CHUNKS, WARPS):
        x = activations(x_ptr, stride, rows, columns, first, columns, 1, 1, False, WARPS, ROWS)
        tile = tl.minimum(first + axis(WARPS, 2, 5), CHUNKS - 1)
        word_at = (block * CHUNKS + tile) * 128 + lane_words
        codes = tl.zeros((4, 8, WARPS, BLOCKS, 4, 16), tl.int32)  # two 16-bit codes each
        for at in tl.static_range(COUNT):
            if (SCALES_BITS[at - 1] if at > 0 else 0) < top:
                for plane in tl.static_range(PLANES):
                    if plane >= (SCALES_BITS[at - 1] if at > 0 else 0) and plane < SCALES_BITS[at]:
                        words = tl.reshape(tl.load(planes[plane] + word_at), (4, 8, WARPS, BLOCKS, 4, 1))
                        codes = codes * 2 + ((words >> axis(16, 5, 6)) & 0x00010001)
                index = tl.join(codes & 0xFFFF, codes >> 16)
                weights = operand(tl.load(tables[at] + n * (1 << SCALES_BITS[at]) + index), 1, WARPS, BLOCKS)
                own = x
                if MIXED:
                    own = tl.where(each_bits[None, None, :] == SCALES_BITS[at], x, tl.zeros_like(x))
                if x.dtype == tl.float32:
                    high = rounded(weights, tl.bfloat16)  # fp16 has 11 bits: two bf16 numbers hold it
                    low = rounded(weights.to(tl.float32) - high.to(tl.float32), tl.bfloat16)
                    total += product(low, own) + product(high, own)
                else:
                    total = dot(rounded(weights, x.dtype), own, total)
    y = tl.sum(total, axis=0)
    if MIXED:
        known = tl.zeros((ROWS,), tl.int1)
        for at in tl.static_range(COUNT):
            known = known | (each_bits == SCALES_BITS[at])
        y = tl.where(known[None, :], y, float("nan"))
    store_rows(y_ptr, y, rows, out_features, first_block, ROWS, BLOCKS)
