"""Blocks of ggml as uniform grids: what they hold, number for number (ggml.py says what the types are).

A block's numbers are fp16; those of sub-blocks are fp16 numbers times whole ones, kept here in fp64, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .uniform import Grid, grid_from_groups

Parts = tuple[Tensor, Tensor, Tensor]  # codes uint8 [n, values]; step and low of sub-blocks, float64 [n, S]


def _numbers(data: Tensor, at: int) -> Tensor:
    """The fp16 number at a place of every block: float64 [n, 1]."""
    return data[:, at : at + 2].contiguous().view(torch.float16).double()


def _nibbles(data: Tensor, width: int) -> Tensor:
    halves = data.view(len(data), -1, width)
    return torch.stack([halves & 15, halves >> 4], 2).flatten(1)


def _quarters(data: Tensor) -> Tensor:
    parts = data.view(len(data), 2, 32)
    return torch.stack([(parts >> shift) & 3 for shift in (0, 2, 4, 6)], 2).flatten(1)


def _bits(data: Tensor) -> Tensor:
    return torch.stack([(data >> index) & 1 for index in range(8)], 1).flatten(1)


def _fifth(data: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((data.unsqueeze(2) >> shifts) & 1) << 4).flatten(1)


def _with_zero(codes: Tensor, step: Tensor, zero: int) -> Parts:
    return codes, step, -zero * step


def _q4_0(data: Tensor) -> Parts:
    return _with_zero(_nibbles(data[:, 2:], 16), _numbers(data, 0), 8)


def _q4_1(data: Tensor) -> Parts:
    return _nibbles(data[:, 4:], 16), _numbers(data, 0), _numbers(data, 2)


def _q5_0(data: Tensor) -> Parts:
    return _with_zero(_nibbles(data[:, 6:], 16) | _fifth(data[:, 2:6]), _numbers(data, 0), 16)


def _q5_1(data: Tensor) -> Parts:
    return _nibbles(data[:, 8:], 16) | _fifth(data[:, 4:8]), _numbers(data, 0), _numbers(data, 2)


def _q8_0(data: Tensor) -> Parts:
    codes = (data[:, 2:].contiguous().view(torch.int8).short() + 128).to(torch.uint8)
    return _with_zero(codes, _numbers(data, 0), 128)


def _q2_k(data: Tensor) -> Parts:
    scales = data[:, :16]
    return (
        _quarters(data[:, 16:80]),
        _numbers(data, 80) * (scales & 15),
        -_numbers(data, 82) * (scales >> 4),
    )


def _q3_k(data: Tensor) -> Parts:
    codes = _quarters(data[:, 32:96]) | (_bits(data[:, :32]) << 2)
    low, high = data[:, 96:104], data[:, 104:108]
    scales = torch.cat([low & 15, low >> 4], 1) | (torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 1) << 4)
    return _with_zero(codes, _numbers(data, 108) * (scales.double() - 32), 4)


def _pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima [n, 8] of 12 bytes."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scales, minima


def _q4_k(data: Tensor) -> Parts:
    scales, minima = _pairs(data[:, 4:16])
    return _nibbles(data[:, 16:], 32), _numbers(data, 0) * scales, -_numbers(data, 2) * minima


def _q5_k(data: Tensor) -> Parts:
    scales, minima = _pairs(data[:, 4:16])
    codes = _nibbles(data[:, 48:], 32) | (_bits(data[:, 16:48]) << 4)
    return codes, _numbers(data, 0) * scales, -_numbers(data, 2) * minima


def _q6_k(data: Tensor) -> Parts:
    codes = _nibbles(data[:, :128], 64) | (_quarters(data[:, 128:192]) << 4)
    scales = data[:, 192:208].contiguous().view(torch.int8).double()
    return _with_zero(codes, _numbers(data, 208) * scales, 32)


# type -> bits of a code, values of a sub-block, and bytes of blocks [n, size] -> their parts
GRIDS: Mapping[str, tuple[int, int, Callable[[Tensor], Parts]]] = MappingProxyType(
    {
        "Q4_0": (4, 32, _q4_0),
        "Q4_1": (4, 32, _q4_1),
        "Q5_0": (5, 32, _q5_0),
        "Q5_1": (5, 32, _q5_1),
        "Q8_0": (8, 32, _q8_0),
        "Q2_K": (2, 16, _q2_k),
        "Q3_K": (3, 16, _q3_k),
        "Q4_K": (4, 32, _q4_k),
        "Q5_K": (5, 32, _q5_k),
        "Q6_K": (6, 16, _q6_k),
    }
)


def grid_of_blocks(kind: str, data: Tensor, size: int) -> Grid:
    """Rows of blocks of a type, uint8 [N, bytes], each of `size` bytes, as a grid."""
    bits, part, read = GRIDS[kind]
    rows = len(data)
    codes, step, low = read(data.reshape(-1, size))
    return grid_from_groups(codes.reshape(rows, -1), step.reshape(rows, -1), low.reshape(rows, -1), bits, part)
