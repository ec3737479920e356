"""BPDQ: bit-planes on a variable grid in the Hessian's geometry, for one precision.

arXiv 2602.04163 and its published code (section 5 of the paper's algorithm): groups from left to
right; in each, codes chosen column by column with GPTQ's compensation, coefficients refitted in the
metric of the group, the best of several such rounds kept. It starts from the highest bits of an
8-bit grid that includes 0. What we do differently, because it has no drawback:

  * the best round is kept for each row, not for all rows together;
  * coefficients are rounded as they are stored before errors are passed on;
  * errors leave a group once, after its best round is known, in the form E = (Y - Q) U^-1,
    which equals the published incremental correction;
  * the ridge of the refit is relative to the normal matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planes import PlaneWeight
from .grouping import join_rows, row_chunks
from .hessian import ROWS_AT_ONCE, HessianMethod, pack
from .moments import Moments
from .tracks import JointSolver, Track, column_order, fit

GRID_BITS = 8


@dataclass(frozen=True)
class BPDQOptions:
    """iterations: rounds in each group; damping: added to the Hessian's diagonal, as a share of its mean."""

    iterations: int = 10
    damping: float = 0.05

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.damping > 0:
            raise ValueError("iterations must be at least 1, damping above 0")


class BPDQ(HessianMethod):
    """Bit-plane decomposition on a variable grid; one precision."""

    name = "bpdq"
    options_type = BPDQOptions
    nests = False

    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int) -> PlaneWeight:
        ((bits, moments),) = found.items()
        groups = column_order(moments.hessian.diagonal(), group_size)
        order = torch.cat(groups).to(weight.device)
        hessian = moments.damped(self.options.damping)[order][:, order]
        target = weight.masked_fill((moments.hessian.diagonal() <= 0).to(weight.device), 0)[:, order].T
        parts = []
        for rows in row_chunks(len(weight), 1, budget=ROWS_AT_ONCE):
            mine = target[:, rows].contiguous()
            nothing = torch.zeros(len(groups), bits + 1, mine.shape[1], device=weight.device)
            solver = JointSolver(
                [Track(bits, 1.0, mine, hessian, nothing)], [len(group) for group in groups], start=highest_bits
            )
            solver.compensate(self.options.iterations)
            parts.append(pack(solver, groups, weight.shape[1], group_size))
        return join_rows(parts)


def highest_bits(y: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Coefficients fitted to the highest bits of an 8-bit code of y [g, N] between its extremes and 0."""
    low, high = y.amin(0).clamp_max(0), y.amax(0).clamp_min(0)
    levels_count = 2**GRID_BITS - 1
    size = ((high - low) / levels_count).clamp_min(1e-12)
    zero = (-low / size).round()
    code = ((y / size).round() + zero).clamp(0, levels_count).long()
    half = size * 2 ** (GRID_BITS - bits) / 2
    powers = 2.0 ** torch.arange(bits - 1, -1, -1, device=y.device).unsqueeze(1)
    even = torch.cat([half * powers, (half * (2**bits - 1) - size * zero).unsqueeze(0)])
    return fit(y, code >> (GRID_BITS - bits), even, metric)
