"""What the device code shares, and what Triton's interpreter needs put right."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def axis(size: tl.constexpr, at: tl.constexpr, rank: tl.constexpr):
    """0..size-1 along dimension `at` of `rank`; by expand_dims, through which alignment is known to the compiler."""
    values = tl.arange(0, size)
    for _ in tl.static_range(at):
        values = tl.expand_dims(values, 0)
    for _ in tl.static_range(rank - at - 1):
        values = tl.expand_dims(values, -1)
    return values


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x, float32 or fp16, in DTYPE, to nearest even; the interpreter cuts bf16 off instead."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def bound(x):
    """x, a number, as the bound of a loop; the interpreter has arrays of one number, which Python's range refuses."""
    if INTERPRETED:
        return x.handle.data.item()
    else:
        return x


@triton.jit
def stored_column(column, group_size, WIDTH: tl.constexpr):
    """Where a column of groups padded to WIDTH is stored, and whether it is there at all."""
    group = column // WIDTH
    within = column - group * WIDTH
    return group * group_size + within, within < group_size


@triton.jit
def dot(a, b, total=None):
    """total + a @ b in float32; the interpreter takes the bit patterns of bf16 for integers."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)
