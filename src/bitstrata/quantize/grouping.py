"""A weight as independent groups: [N, K] <-> [N J, g], with a mask where the last group is short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..planes.pack import pack_bits
from ..planes.weights import SCALE_DTYPE, AffineDecoder, PlaneWeight, group_count


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
        padded = torch.nn.functional.pad(weight, (0, self.groups * self.size - self.columns))
        return padded.reshape(self.rows * self.groups, self.size)

    def mask(self, device: torch.device) -> Tensor:
        """1 where a column exists, 0 where it is padding: fp32 [N J, g]."""
        return self.split(torch.ones(self.rows, self.columns, device=device))

    def join(self, grouped: Tensor) -> Tensor:
        """[..., N J, g] -> [..., N, K], the padding dropped."""
        shape = (*grouped.shape[:-2], self.rows, self.groups * self.size)
        return grouped.reshape(shape)[..., : self.columns]


def to_scale(value: Tensor) -> Tensor:
    """Round to the stored scale dtype, clamped to its finite range."""
    limit = torch.finfo(SCALE_DTYPE).max
    return value.clamp(-limit, limit).to(SCALE_DTYPE)


def affine_weight(grouping: Grouping, planes: Tensor, coefficients: dict[int, tuple[Tensor, Tensor]]) -> PlaneWeight:
    """Assemble a PlaneWeight from grouped solutions.

    Args:
        planes: bool [P, N J, g], True = +1.
        coefficients: bits -> (scales [bits, N J], offset [N J]), any float dtype; rounded to fp16 here.
    """
    shape = (grouping.rows, grouping.groups)
    decoders = {
        bits: AffineDecoder(
            to_scale(scale).reshape(bits, *shape).contiguous(), to_scale(offset).reshape(shape).contiguous()
        )
        for bits, (scale, offset) in coefficients.items()
    }
    packed = tuple(pack_bits(grouping.join(plane)) for plane in planes)
    return PlaneWeight(packed, decoders, grouping.columns, grouping.size)


def check_weight(name: str, weight: Tensor) -> None:
    """Raise ModelError if `weight` cannot be stored: not finite, or beyond the range of fp16 scales."""
    if not bool(weight.isfinite().all()):
        raise ModelError(f"{name} holds NaN or infinity", hint="the source model is damaged")
    limit = torch.finfo(SCALE_DTYPE).max
    if float(weight.abs().max()) > limit:
        raise ModelError(f"{name} has weights above {limit:.0f}, the largest scale the format can store")


def row_chunks(rows: int, per_row: int, budget: int = 1 << 26) -> Sequence[slice]:
    """Slices of `rows` so that `per_row` elements times the slice stay under `budget` elements."""
    step = max(1, budget // max(1, per_row))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
