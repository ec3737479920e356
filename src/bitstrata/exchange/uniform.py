"""Uniform grids, the weights that other programs hold, and planes that stand for the same numbers.

    W[n, k] = low[n, j] + step[n, j] code[n, k],    0 <= code < 2^bits,    j = k div group_size

In planes (planes/decode.py) this is scale_i = step 2^(bits-1-i) / 2 and offset = low + step (2^bits - 1) / 2: the bits
of a code, most significant first, are those of the planes. Both must be fp16 numbers there. Halving a step keeps it
one, but for the smallest; an offset of a step and a whole zero point has up to 15 significant bits, fp16 has 11. Its
rest is then the scale of one more plane, in which every bit is +1, and is exact again. So such a weight has its own
bits, with rounded offsets, and one more, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..planes import AffineScales, Codebook, PlaneWeight, codes, group_count, pack_bits, unpack_bits
from ..planes.weights import MAX_BITS, SCALE_DTYPE


@dataclass(frozen=True)
class Grid:
    """A weight [N, K] on a uniform grid: code uint8 [N, K]; step, low float64 [N, J]."""

    code: Tensor
    step: Tensor
    low: Tensor
    bits: int
    group_size: int

    def values(self) -> Tensor:
        """The weight: float64 [N, K]."""
        columns = self.code.shape[1]
        step, low = (spread(part, columns, self.group_size) for part in (self.step, self.low))
        return low + step * self.code


def spread(groups: Tensor, columns: int, group_size: int) -> Tensor:
    """What groups have, for each of their columns: [N, J] -> [N, K]."""
    return groups.repeat_interleave(group_size, dim=1)[:, :columns]


def grid_of(weight: PlaneWeight, bits: int) -> Grid | None:
    """The grid that `weight` is on at `bits`; None if it is on none."""
    scales = weight.scales[bits]
    if isinstance(scales, Codebook):
        return None
    affine = scales.affine()
    scale = affine.scale.double()  # [bits, N, J]
    powers = torch.exp2(torch.arange(bits - 1, -1, -1, dtype=torch.float64)).view(-1, 1, 1)
    if not torch.equal(scale, scale[-1] * powers):
        return None
    code = codes(weight, bits).to(torch.uint8)
    low = affine.offset.double() - scale.sum(0)
    return Grid(code, 2 * scale[-1], low, bits, weight.group_size)


@dataclass(frozen=True)
class Coefficients:
    """A weight [N, K]: planes int32 [N, ceil(K / 32)], scales [bits, N, J] and offset [N, J] in float64."""

    planes: tuple[Tensor, ...]
    scale: Tensor
    offset: Tensor
    columns: int
    group_size: int

    def values(self) -> Tensor:
        """The weight: float64 [N, K]."""
        result = spread(self.offset, self.columns, self.group_size)
        for plane, scale in zip(self.planes, self.scale, strict=True):
            signs = unpack_bits(plane, self.columns).double() * 2 - 1
            result = result + signs * spread(scale, self.columns, self.group_size)
        return result


def coefficients_of(grid: Grid) -> Coefficients:
    """The planes of a grid: the bits of its codes."""
    shifts = range(grid.bits - 1, -1, -1)
    planes = tuple(pack_bits((grid.code >> shift) & 1) for shift in shifts)
    scale = torch.stack([grid.step / 2 * 2.0**shift for shift in shifts])
    middle = grid.low + grid.step * ((2**grid.bits - 1) / 2)
    return Coefficients(planes, scale, middle, grid.code.shape[1], grid.group_size)


def planes_of(found: Grid | Coefficients, *, rounded: bool = False) -> PlaneWeight | None:
    """Planes of a weight: at the highest bits they are its numbers, exactly, or None if there are no such planes.

    rounded: scales and offset become the nearest fp16 numbers, and there is no plane more.
    """
    given = coefficients_of(found) if isinstance(found, Grid) else found
    bits, planes = len(given.planes), list(given.planes)
    scale, offset = given.scale.to(SCALE_DTYPE), given.offset.to(SCALE_DTYPE)
    if not (scale.isfinite().all() and offset.isfinite().all()):
        return None
    own = {bits: AffineScales(scale, offset)}
    if not rounded:
        if not torch.equal(scale.double(), given.scale):
            return None
        rest = given.offset - offset.double()
        if bool((rest != 0).any()):
            stored = rest.to(SCALE_DTYPE)
            if not torch.equal(stored.double(), rest) or bits == MAX_BITS:
                return None
            planes.append(pack_bits(torch.ones(len(rest), given.columns, dtype=torch.bool)))
            own[bits + 1] = AffineScales(torch.cat([scale, stored.unsqueeze(0)]), offset)
    return PlaneWeight(tuple(planes), own, given.columns, given.group_size)


def with_bits(weight: PlaneWeight, wanted: Iterable[int]) -> PlaneWeight:
    """`weight` with scales for the `wanted` bits too, where it has none: its own without the last planes' scales.

    A plane that is left out is replaced by its mean, which is 0 of bits that are as often set as not.
    """
    scales = dict(weight.scales)
    for bits in wanted:
        if bits not in scales:
            above = scales[min(own for own in weight.bits if own > bits)]
            if isinstance(above, Codebook):
                raise ValueError(f"a codebook has no scales for {bits} bits")
            affine = above.affine()
            scales[bits] = AffineScales(affine.scale[:bits].contiguous(), affine.offset)
    return replace(weight, scales=scales)


def grid_from_groups(code: Tensor, step: Tensor, low: Tensor, bits: int, group_size: int) -> Grid:
    """A grid, its shapes checked: code [N, K] of whole numbers, step and low [N, J]. Raises ValueError."""
    shape = (code.shape[0], group_count(code.shape[1], group_size))
    if tuple(step.shape) != shape or tuple(low.shape) != shape:
        raise ValueError(f"scales of shape {list(step.shape)} do not fit {list(code.shape)} in groups of {group_size}")
    return Grid(code.to(torch.uint8), step.double(), low.double(), bits, group_size)
