"""A weight as independent groups: [N, K] <-> [N J, g], with a mask where the last group is short."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..planes.pack import pack_bits
from ..planes.weights import (
    SCALE_DTYPE,
    AffineScales,
    ByteScales,
    PlaneWeight,
    Scales,
    all_finite,
    byte_steps,
    group_count,
    join_scales,
)


@dataclass(frozen=True)
class Grouping:
    """How a weight [N, K] is cut into J = ceil(K / g) groups a row."""

    rows: int
    columns: int
    size: int

    @classmethod
    def of(cls, weight: Tensor, size: int) -> Grouping:
        """The grouping of `weight` [N, K] with `size` columns a group."""
        rows, columns = weight.shape
        return cls(rows, columns, size)

    @property
    def groups(self) -> int:
        return group_count(self.columns, self.size)

    def split(self, weight: Tensor) -> Tensor:
        """[N, K] -> [N J, g], zeros behind the last column."""
        padding = self.groups * self.size - self.columns
        padded = torch.nn.functional.pad(weight, (0, padding)) if padding else weight
        return padded.reshape(self.rows * self.groups, self.size)

    def mask(self, device: torch.device) -> Tensor:
        """1 where a column exists, 0 where it is padding: fp32 [N J, g]."""
        if self.groups * self.size == self.columns:
            return torch.ones(1, 1, device=device).expand(self.rows * self.groups, self.size)
        return self.split(torch.ones(self.rows, self.columns, device=device))

    def join(self, grouped: Tensor) -> Tensor:
        """[..., N J, g] -> [..., N, K], the padding dropped."""
        shape = (*grouped.shape[:-2], self.rows, self.groups * self.size)
        return grouped.reshape(shape)[..., : self.columns]


def extremes(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum and the maximum of each group [R, g] where `mask` is above 0: [R, 1] each."""
    real = mask > 0
    low = values.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    return low, values.masked_fill(~real, -torch.inf).amax(1, keepdim=True)


def code_planes(code: Tensor, bits: int) -> Tensor:
    """The bits of integer codes [...], the highest first: bool [bits, ...]."""
    return torch.stack([((code >> (bits - 1 - plane)) & 1).bool() for plane in range(bits)])


@functools.cache
def code_signs(bits: int, device: torch.device) -> Tensor:
    """The planes of every code as -1 and +1: fp32 [bits, 2^bits]; shared, not to be changed."""
    return code_planes(torch.arange(2**bits, device=device), bits).float() * 2 - 1


def even_scales(half: Tensor, bits: int) -> Tensor:
    """The scales of an even grid of 2^bits levels, `half` a step [...]: [bits, ...]."""
    return torch.stack([half * 2 ** (bits - 1 - plane) for plane in range(bits)])


def to_scale(value: Tensor) -> Tensor:
    """Round to the stored scale dtype, clamped to its finite range."""
    limit = torch.finfo(SCALE_DTYPE).max
    return value.clamp(-limit, limit).to(SCALE_DTYPE)


def to_bytes(coefficients: Tensor, unit: Tensor) -> Tensor:
    """The nearest that bytes can say, still as numbers: [bits + 1, ...], the offset last; unit [...]."""
    return _byte_codes(coefficients, unit) * byte_steps(unit, len(coefficients) - 1)


def _byte_codes(coefficients: Tensor, unit: Tensor) -> Tensor:
    """The bytes of that, as floats."""
    step = byte_steps(unit, len(coefficients) - 1).clamp_min(1e-30)
    return (coefficients / step).round_().clamp_(-127, 127)


def make_affine(scale: Tensor, offset: Tensor, unit: Tensor | None) -> Scales:
    """Scales from scale [bits, N, J] and offset [N, J], rounded as it stores them: bytes if there is a unit [N]."""
    if unit is None:
        return AffineScales(to_scale(scale).contiguous(), to_scale(offset).contiguous())
    both = _byte_codes(torch.cat([scale, offset.unsqueeze(0)]), unit.unsqueeze(-1)).to(torch.int8)
    return ByteScales(both[:-1].contiguous(), both[-1].contiguous(), unit)


def affine_weight(
    grouping: Grouping,
    planes: Tensor,
    coefficients: dict[int, tuple[Tensor, Tensor]],
    units: Mapping[int, Tensor] | None = None,
) -> PlaneWeight:
    """Assemble a PlaneWeight from grouped solutions.

    Args:
        planes: bool [P, N J, g], True = +1.
        coefficients: bits -> (scales [bits, N J], offset [N J]), any float dtype; rounded here.
        units: bits -> fp16 [N], for scales of bytes; the others are fp16.
    """
    shape = (grouping.rows, grouping.groups)
    scales = {
        bits: make_affine(scale.reshape(bits, *shape), offset.reshape(shape), (units or {}).get(bits))
        for bits, (scale, offset) in coefficients.items()
    }
    packed = tuple(pack_bits(grouping.join(plane)) for plane in planes)
    return PlaneWeight(packed, scales, grouping.columns, grouping.size)


def join_rows(parts: Sequence[PlaneWeight]) -> PlaneWeight:
    """Weights of consecutive row ranges as one."""
    scales = {bits: join_scales([part.scales[bits] for part in parts]) for bits in parts[0].bits}
    planes = tuple(torch.cat(planes) for planes in zip(*(part.planes for part in parts), strict=True))
    return PlaneWeight(planes, scales, parts[0].in_features, parts[0].group_size)


def check_weight(name: str, weight: Tensor, *, hint: str = "leave the layer out with --skip") -> None:
    """Raise ModelError if `weight` cannot be stored: not finite, or beyond the range of fp16 scales.

    `hint` says what to do about the range.
    """
    if not all_finite(weight):
        raise ModelError(f"{name} holds NaN or infinity", hint="the source model is damaged")
    limit = torch.finfo(SCALE_DTYPE).max
    if any(float(bound.abs()) > limit for bound in weight.aminmax()):
        raise ModelError(f"{name} has weights above {limit:.0f}, the largest scale the format can store", hint=hint)


def row_chunks(rows: int, per_row: int, budget: int = 1 << 24) -> Sequence[slice]:
    """Slices of `rows` so that `per_row` elements times the slice stay under `budget` elements."""
    step = max(1, budget // max(1, per_row))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
