"""Keys and values as codes of 8 or 4 bits, with an offset o and a step s for each head of each token.

    H x = o + s c,    c in 0 .. n,    n = 2^bits - 1
    o = the smallest number of H x, rounded down to bf16
    s = (the largest - o) / n, rounded up to bf16

H is a Walsh-Hadamard transform (orthonormal, its own inverse) of as many neighbours as the largest power of two that
divides the head's width. It spreads the few large numbers that keys have over all of them, without which 4 bits are of
little use; attention may leave it on the keys if it transforms its queries, and undo that of the values in what comes
out. An odd width has none.

Rounded outwards, so that every number of H x lies between two codes and is off by s / 2 at most, up to float32's own
rounding. A head depends on nothing but its own numbers: what a token reads is the same in any company, and a token that
is computed again is written as before. A step below 1e-30 counts as 0; a head that holds infinity or NaN, or spans more
than float32, comes back as NaN.

Codes of 8 bits are bytes, those of c - 128 as int8. Of 4 bits 32 numbers share 16 bytes: number j in the low half of
byte j, number 16 + j in the high half; a head that is no multiple of 32 wide is padded with zeros. This is the
reference; kernels/cpu/native/generic/cached.h is the same in native code, and reads such heads as they lie.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import UsageError

BITS: dict[str, int | None] = {"auto": None, "int8": 8, "int4": 4}  # kv_cache_dtype -> bits of a code
PACKED = 32  # numbers of 4 bits that are packed together
MEANING = 4  # bytes of offset and step
SMALLEST = 1e-30


def check_kv_cache_dtype(kind: str) -> str:
    """`kind` if it is one of BITS; UsageError otherwise."""
    if not isinstance(kind, str) or kind not in BITS:
        raise UsageError(f"kv_cache_dtype={kind!r} cannot be used", hint=f"give one of {', '.join(BITS)}")
    return kind


def head_bytes(width: int, kind: str, dtype: torch.dtype) -> int:
    """Bytes that a head of one token takes, of keys or of values; `dtype` is the model's."""
    bits = BITS[check_kv_cache_dtype(kind)]
    return width * dtype.itemsize if bits is None else code_bytes(width, bits) + MEANING


def code_bytes(width: int, bits: int) -> int:
    """Bytes of a head's codes."""
    return width if bits == 8 else -(-width // PACKED) * PACKED // 2


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [..., D], any float dtype -> codes uint8 [..., code_bytes] and (step, offset) bf16 [..., 2]."""
    x, most = _mixed(x.float()), 2**bits - 1
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    offset = -_up(-low)
    step = _up((high - offset) / most)
    step = torch.where(step < SMALLEST, 0, step)  # NaN stays
    step = torch.where((high - offset).isfinite(), step, torch.nan)
    codes = ((x - offset) / step).round().clamp(0, most)
    codes = torch.where(step > 0, codes, 0).to(torch.uint8)
    meaning = torch.cat([step, offset], -1).to(torch.bfloat16)
    if bits == 8:
        return codes ^ 128, meaning
    width = x.shape[-1]
    padded = codes.new_zeros(*codes.shape[:-1], 2 * code_bytes(width, bits))
    padded[..., :width] = codes
    low_half, high_half = padded.unflatten(-1, (-1, 2, PACKED // 2)).unbind(-2)
    return (low_half | high_half << 4).flatten(-2), meaning


def decode(codes: Tensor, meaning: Tensor, width: int, bits: int) -> Tensor:
    """What `encode` made -> float32 [..., width]."""
    if bits == 8:
        numbers = codes ^ 128
    else:
        halves = codes.unflatten(-1, (-1, 1, PACKED // 2))
        numbers = torch.cat([halves & 15, halves >> 4], -2).flatten(-3)[..., :width]
    step, offset = meaning.float().split(1, -1)
    return _mixed(numbers.float() * step + offset)


def _mixed(x: Tensor) -> Tensor:
    """H x of float32 x [..., D]."""
    block = x.shape[-1] & -x.shape[-1]
    mixed: Tensor = x.unflatten(-1, (-1, block)) @ _transform(block, x.device)
    return mixed.flatten(-2)


@lru_cache
def _transform(size: int, device: torch.device) -> Tensor:
    """Walsh-Hadamard [size, size], orthonormal and symmetric; a power of two."""
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)], 0)
    scaled: Tensor = made / size**0.5
    return scaled.to(device)


def _up(x: Tensor) -> Tensor:
    """float32 `x` rounded up to a number that bf16 has, as float32."""
    bits = x.contiguous().view(torch.int32)
    # a number's bits grow with its magnitude: up is away from zero for positive ones, towards it for negative ones
    return torch.where(x > 0, (bits + 0xFFFF) & -0x10000, bits & -0x10000).view(torch.float32)
