"""Plain planes for one precision, from weights alone and no worse than round-to-nearest in any group.

Per group, at p bits:

    grid     round-to-nearest with both ends drawn in by the factor, out of SHRINKS, of least squared error
    refine   ROUNDS alternations from there as in bcq.py: fit offset and scales, assign the nearest codes
    choose   the one of the two with the smaller error as it is stored

Starting from an even grid matters above 4 bits: from a greedy start the alternation ends in a worse
optimum than plain round-to-nearest. Measured figures are in docs/log.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..planes import PlaneWeight
from ..planes.weights import SCALE_DTYPE
from .bcq import Solution, alternate, objective
from .grouping import Grouping, affine_weight, code_planes, even_scales, extremes, to_scale

ROUNDS = 5
SHRINKS = 20
LEAST_SHRINK = 0.5


def clipped_rows(weight: Tensor, bits: int, group_size: int) -> PlaneWeight:
    """Rows W fp32 [n, K] as planes with affine scales, for `bits`."""
    grouping = Grouping.of(weight, group_size)
    w, d = grouping.split(weight), grouping.mask(weight.device)
    start = clipped_grid(w, d, bits)
    planes, scale, offset = alternate(w, d, start, ROUNDS)
    scale, offset = to_scale(scale).float(), to_scale(offset).float()
    better = objective(w, d, planes, scale, offset) < objective(w, d, *start)
    planes = torch.where(better.unsqueeze(1), planes, start[0])
    coefficients = torch.where(better, scale, start[1]), torch.where(better, offset, start[2])
    return affine_weight(grouping, planes > 0, {bits: coefficients})


def clipped_grid(w: Tensor, d: Tensor, bits: int) -> Solution:
    """For groups w [R, g] with mask d: even levels between the ends drawn in as far as is best; scales as stored."""
    low, high = extremes(w, d)
    levels = 2**bits - 1
    middle = to_scale((high + low) / 2).float()
    best_error = torch.full_like(middle, torch.inf)
    best_half = torch.zeros_like(middle)
    best_code = torch.zeros_like(w)
    for step in range(SHRINKS):
        share = 1 - step * (1 - LEAST_SHRINK) / SHRINKS
        # the stored half-step is what the codes are rounded to, so round it before it is used
        half = ((high - low) * share / levels / 2).to(SCALE_DTYPE).float()
        start = middle - half * levels
        code = torch.where(half > 0, (w - start) / (2 * half), 0.0).round().clamp(0, levels)
        error = (d * (start + 2 * half * code - w).square()).sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_half = torch.where(better, half, best_half)
        best_code = torch.where(better, code, best_code)
    planes = code_planes(best_code.int(), bits).to(w.dtype) * 2 - 1
    return planes, to_scale(even_scales(best_half[:, 0], bits)).float(), middle[:, 0]
