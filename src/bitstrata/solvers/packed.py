"""A weight from its packed planes and coefficients of any precision, and the derivatives of the coefficients.

    W[n, k]        = z[r] + sum_i a_i[r] B_i[n, k]         r: the group of n and k
    d L / d a_i[r] = sum over the columns k of the group of (d L / d W[n, k]) B_i[n, k];   of z: without the B

Planes stay in their words, a bit a weight. They become numbers for a stretch of rows at a time, through a table of all
bytes, so that they are in the cache when they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .grouping import Grouping, row_chunks

STRETCH = 1 << 18  # weights worked on at a time


@functools.cache
def _signs_of_bytes(device: torch.device) -> Tensor:
    """-1 and +1 for the bits of every byte, the lowest first: fp32 [256, 8]."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (bits & 1).float() * 2 - 1


def _signs(words: Tensor, grouping: Grouping) -> Tensor:
    """The signs of some rows of a plane: int32 [n, ceil(K / 32)] -> fp32 [n J, g], zeros behind the last column."""
    octets = words.view(torch.uint8).flatten().int()
    rows = _signs_of_bytes(words.device).index_select(0, octets).view(len(words), -1)
    return Grouping(len(words), grouping.columns, grouping.size).split(rows[:, : grouping.columns])


def _stretches(grouping: Grouping) -> Iterator[tuple[slice, slice]]:
    """Rows, and the groups of these rows."""
    for rows in row_chunks(grouping.rows, grouping.columns, STRETCH):
        yield rows, slice(rows.start * grouping.groups, rows.stop * grouping.groups)


@torch.no_grad()
def weight_of(planes: Sequence[Tensor], coefficients: Tensor, grouping: Grouping, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, summed in fp32, the offset first.

    Args:
        planes: int32 [N, ceil(K / 32)], one for each scale.
        coefficients: fp32 [P + 1, N J], the offset last.
    """
    result = torch.empty(grouping.rows, grouping.columns, dtype=dtype, device=coefficients.device)
    for rows, groups in _stretches(grouping):
        part = coefficients[-1, groups].unsqueeze(1).repeat(1, grouping.size)  # [n J, g]
        for plane, scale in zip(planes, coefficients[:-1, groups], strict=True):
            part.addcmul_(_signs(plane[rows], grouping), scale.unsqueeze(1))
        result[rows] = Grouping(rows.stop - rows.start, grouping.columns, grouping.size).join(part)
    return result


@torch.no_grad()
def coefficient_gradient(planes: Sequence[Tensor], gradient: Tensor, grouping: Grouping) -> Tensor:
    """The derivatives of the coefficients fp32 [P + 1, N J], from those of the weight [N, K] of any dtype."""
    result = torch.empty(len(planes) + 1, grouping.rows * grouping.groups, device=gradient.device)
    for rows, groups in _stretches(grouping):
        part = Grouping(rows.stop - rows.start, grouping.columns, grouping.size).split(gradient[rows].float())
        torch.sum(part, 1, out=result[-1, groups])
        for index, plane in enumerate(planes):
            torch.sum(_signs(plane[rows], grouping).mul_(part), 1, out=result[index, groups])
    return result
