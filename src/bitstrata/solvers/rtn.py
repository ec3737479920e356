"""Round-to-nearest, nested: the baseline that needs no data and no search.

Each group gets a uniform grid of 2^P levels from its minimum to its maximum, P the highest bits:

    s = (max - min) / (2^P - 1),   q = round((w - min) / s)

The planes are the bits of q, most significant first. At p < P bits the dropped planes are replaced
by their mean, which is 0 in +-1 form (algorithm: MSB slicing of an integer grid), so all bits share

    scale_i = s 2^(P-1-i) / 2,   offset = min + s (2^P - 1) / 2.

With a single bits value this is ordinary asymmetric round-to-nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..planes.weights import SCALE_DTYPE, PlaneWeight
from .grouping import Grouping, affine_weight, code_planes, even_scales, extremes
from .method import Method


@dataclass(frozen=True)
class RTN(Method):
    """Nested round-to-nearest; it has no options."""

    name = "rtn"

    def solve_rows(self, weight: Tensor, bits: tuple[int, ...], group_size: int) -> PlaneWeight:
        grouping = Grouping.of(weight, group_size)
        values = grouping.split(weight)
        low, high = extremes(values, grouping.mask(weight.device))
        top = max(bits)
        levels = 2**top - 1
        # the stored half-step is what the codes are rounded to, so round it before it is used
        half = ((high - low) / levels / 2).to(SCALE_DTYPE).float()
        middle = ((high + low) / 2).to(SCALE_DTYPE).float()
        start = middle - half * levels
        code = torch.where(half > 0, (values - start) / (2 * half), 0.0).round().clamp(0, levels).int()
        scale = even_scales(half[:, 0], top)
        return affine_weight(grouping, code_planes(code, top), {p: (scale[:p], middle[:, 0]) for p in bits})
