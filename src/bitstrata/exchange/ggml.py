"""The block types of ggml: values to bytes, for those that can be written here.

A row is cut into blocks; a block has its numbers in fp16 first or last, and codes in an order of its own. With
sub-blocks of 16 or 32 values the numbers of each are small whole multiples of the block's:

    Q4_0 Q5_0 Q8_0   d c                       Q4_1 Q5_1        d q + m             32 values
    IQ4_NL           d times one of 16 numbers                                      32
    Q2_K Q4_K Q5_K   d s_i q - dmin m_i        Q3_K Q6_K        d s_i c             256, of 16 or 32

Reading is the gguf package's; it is also what a written weight is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .fitting import (
    affine_codes,
    fit_affine,
    fit_symmetric,
    fit_table,
    nearest_in,
    symmetric_codes,
    whole_multiples,
)

NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL
CHUNK = 1 << 18  # values fitted at a time, so that they stay in the cache

Known = tuple[Tensor, Tensor] | None  # step and low of the grid that the values of a sub-block are on: fp32 [n] each


@dataclass(frozen=True)
class BlockType:
    """A type of ggml.

    values, size: of a block, and its bytes. part: values of a sub-block, which share a scale.
    levels: how many a value may have.
    write: blocks fp32 [n, values], and what is known of their parts -> uint8 [n, size].
    """

    name: str
    values: int
    size: int
    part: int
    levels: int
    write: Callable[[Tensor, Known], Tensor]

    @property
    def bpw(self) -> float:
        return 8 * self.size / self.values

    def row_bytes(self, columns: int) -> int:
        return columns // self.values * self.size

    def quantize(self, weight: Tensor, step: Tensor | None = None, low: Tensor | None = None) -> Tensor:
        """weight fp32 [N, K], K a multiple of `values` -> uint8 [N, K / values * size].

        step, low: fp32 [N, K], of the uniform grid that each value is on, where there is one.
        """
        rows, columns = weight.shape
        result = torch.empty(rows, self.row_bytes(columns), dtype=torch.uint8)
        count = max(1, CHUNK // columns)
        for start in range(0, rows, count):
            some = slice(start, start + count)
            known: Known = None
            if step is not None and low is not None:
                every = slice(None, None, self.part)
                known = step[some, every].reshape(-1), low[some, every].reshape(-1)
            blocks = weight[some].reshape(-1, self.values)
            result[some] = self.write(blocks, known).view(-1, result.shape[1])
        return result


def _half(numbers: Tensor) -> Tensor:
    """fp32 [n] -> the bytes of fp16, uint8 [n, 2]."""
    return numbers.half().unsqueeze(1).contiguous().view(torch.uint8)


def _rounded(numbers: Tensor) -> Tensor:
    return numbers.half().float()


def _nibbles(q: Tensor, width: int) -> Tensor:
    """Codes [n, m] below 16, m a multiple of 2 width, as bytes: of each 2 width the first half in the low bits."""
    halves = q.view(len(q), -1, 2, width).to(torch.uint8)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def _quarters(q: Tensor) -> Tensor:
    """Codes [n, 256] below 4 as bytes [n, 64]: a byte has values 32 apart."""
    parts = q.view(len(q), 2, 4, 32).to(torch.uint8)
    return (parts[:, :, 0] | (parts[:, :, 1] << 2) | (parts[:, :, 2] << 4) | (parts[:, :, 3] << 6)).flatten(1)


def _bits(flags: Tensor) -> Tensor:
    """Zeros and ones [n, 256] as bytes [n, 32]: bit i of byte j is value 32 i + j."""
    parts = flags.view(len(flags), 8, 32).to(torch.uint8)
    result = torch.zeros(len(flags), 32, dtype=torch.uint8)
    for index in range(8):
        result |= parts[:, index] << index
    return result


def _fifth_bits(q: Tensor) -> Tensor:
    """The fifth bits of codes [n, 32] as 4 bytes, the first value lowest."""
    flags = (q.to(torch.int64) >> 4).view(len(q), 4, 8)
    return (flags << torch.arange(8)).sum(2).to(torch.uint8)


def _offset_block(x: Tensor, known: Known, top: int) -> Tensor:
    step, low = fit_affine(x, top, [] if known is None else [known])
    d, m = _rounded(step), _rounded(low)
    q = affine_codes(x, d, m, top)
    fifth = [_fifth_bits(q)] if top > 15 else []
    return torch.cat([_half(d), _half(m), *fifth, _nibbles(q.to(torch.int64) & 15, 16)], 1)


def _signed_block(x: Tensor, known: Known, zero: int) -> Tensor:
    step = fit_symmetric(x, -zero, zero - 1, [] if known is None else [known[0], -known[0], known[0] / 2])
    d = _rounded(step)
    q = symmetric_codes(x, d, -zero, zero - 1) + zero
    if zero == 128:
        codes = (q - zero).to(torch.int8).view(torch.uint8)
        return torch.cat([_half(d), codes], 1)
    fifth = [_fifth_bits(q)] if zero > 8 else []
    return torch.cat([_half(d), *fifth, _nibbles(q.to(torch.int64) & 15, 16)], 1)


def _nonlinear_block(x: Tensor, known: Known) -> Tensor:
    table = torch.tensor(NONLINEAR, dtype=torch.float32)
    d = _rounded(fit_table(x, table))
    return torch.cat([_half(d), _nibbles(nearest_in(x, d, table), 16)], 1)


def _two_scales(
    x: Tensor, known: Known, part: int, top: int, most: int, tried: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, dmin [n], their multiples s, m [n, S], and the codes q [n, 256], of d s q - dmin m."""
    parts = x.reshape(-1, part)
    step, low = fit_affine(parts, top, [] if known is None else [known], below_zero=True)
    q = affine_codes(parts, step, low, top)
    count = x.shape[1] // part
    weight = q.square().sum(1).view(-1, count)
    d, s = whole_multiples(step.view(-1, count), most, weight, tried)
    dmin, m = whole_multiples(-low.view(-1, count), most, torch.full_like(weight, part), tried)
    q = affine_codes(parts, (d.unsqueeze(1) * s).view(-1), -(dmin.unsqueeze(1) * m).view(-1), top)
    return d, dmin, s.to(torch.uint8), m.to(torch.uint8), q.view(len(x), -1)


def _signed_scales(x: Tensor, known: Known, zero: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """d [n], its multiples s of either sign [n, 16], and the codes c [n, 256], of d s c."""
    parts = x.reshape(-1, 16)
    given = [] if known is None else [known[0], -known[0], known[0] / 2]
    step = fit_symmetric(parts, -zero, zero - 1, given)
    weight = symmetric_codes(parts, step, -zero, zero - 1).square().sum(1).view(len(x), -1)
    sizes = step.view(len(x), -1)
    d, s = whole_multiples(sizes.abs(), most, weight, 16)
    s = s * sizes.sign()
    c = symmetric_codes(parts, (d.unsqueeze(1) * s).view(-1), -zero, zero - 1)
    return d, s, c.view(len(x), -1)


def _q2_k(x: Tensor, known: Known) -> Tensor:
    d, dmin, s, m, q = _two_scales(x, known, 16, 3, 15, 15)
    return torch.cat([s | (m << 4), _quarters(q), _half(d), _half(dmin)], 1)


def _six_bit_pairs(s: Tensor, m: Tensor) -> Tensor:
    """Scales and minima [n, 8] below 64 as 12 bytes."""
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], 1)


def _q4_k(x: Tensor, known: Known) -> Tensor:
    d, dmin, s, m, q = _two_scales(x, known, 32, 15, 63, 24)
    return torch.cat([_half(d), _half(dmin), _six_bit_pairs(s, m), _nibbles(q, 32)], 1)


def _q5_k(x: Tensor, known: Known) -> Tensor:
    d, dmin, s, m, q = _two_scales(x, known, 32, 31, 63, 24)
    codes = q.to(torch.int64)
    return torch.cat([_half(d), _half(dmin), _six_bit_pairs(s, m), _bits(codes >> 4), _nibbles(codes & 15, 32)], 1)


def _q3_k(x: Tensor, known: Known) -> Tensor:
    d, s, c = _signed_scales(x, known, 4, 31)
    q = c.to(torch.int64) + 4
    shifted = (s + 32).to(torch.uint8)  # [n, 16] below 64
    low = (shifted[:, :8] & 15) | ((shifted[:, 8:] & 15) << 4)
    top = (shifted >> 4).view(-1, 4, 4)
    high = top[:, 0] | (top[:, 1] << 2) | (top[:, 2] << 4) | (top[:, 3] << 6)
    return torch.cat([_bits(q >> 2), _quarters(q & 3), low, high, _half(d)], 1)


def _q6_k(x: Tensor, known: Known) -> Tensor:
    d, s, c = _signed_scales(x, known, 32, 127)
    q = c.to(torch.int64) + 32
    scales = s.to(torch.int8).view(torch.uint8)
    return torch.cat([_nibbles(q & 15, 64), _quarters(q >> 4), scales, _half(d)], 1)


BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        one.name: one
        for one in (
            BlockType("Q2_K", 256, 84, 16, 4, _q2_k),
            BlockType("Q3_K", 256, 110, 16, 8, _q3_k),
            BlockType("Q4_0", 32, 18, 32, 16, lambda x, known: _signed_block(x, known, 8)),
            BlockType("Q4_K", 256, 144, 32, 16, _q4_k),
            BlockType("IQ4_NL", 32, 18, 32, 16, _nonlinear_block),
            BlockType("Q4_1", 32, 20, 32, 16, lambda x, known: _offset_block(x, known, 15)),
            BlockType("Q5_0", 32, 22, 32, 32, lambda x, known: _signed_block(x, known, 16)),
            BlockType("Q5_K", 256, 176, 32, 32, _q5_k),
            BlockType("Q5_1", 32, 24, 32, 32, lambda x, known: _offset_block(x, known, 31)),
            BlockType("Q6_K", 256, 210, 16, 64, _q6_k),
            BlockType("Q8_0", 32, 34, 32, 256, lambda x, known: _signed_block(x, known, 128)),
        )
    }
)  # from the smallest to the largest
