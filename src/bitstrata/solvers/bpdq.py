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
from .grouping import even_scales, join_rows
from .joint import JointSolver, Track, column_order, refitted
from .method import Each, MomentsMethod, in_turn, row_pieces
from .metric import prepare
from .moments import Moments

GRID_BITS = 8


@dataclass(frozen=True)
class BPDQ(MomentsMethod):
    """Bit-plane decomposition on a variable grid; one precision.

    iterations: rounds in each group; damping: added to the Hessian's diagonal, as a share of its mean.
    """

    iterations: int = 10
    damping: float = 0.05

    name = "bpdq"
    nests = False

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.damping > 0:
            raise ValueError("iterations must be at least 1, damping above 0")

    def rounds(self) -> tuple[int, int]:
        return self.iterations, 1

    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int, each: Each = in_turn) -> PlaneWeight:
        ((bits, moments),) = found.items()
        groups = column_order(moments.diagonal, group_size)
        order, lengths = torch.cat(groups), [len(group) for group in groups]
        metric, targets = prepare(weight, moments, order, lengths, damping=self.damping)
        dead = moments.dead.to(weight.device)[order.to(weight.device)]
        pieces = row_pieces(weight)

        def piece(index: int) -> PlaneWeight:
            number, rows = pieces[index]
            target = targets[number][:, rows].to(weight.device).masked_fill(dead.unsqueeze(1), 0)
            solver = JointSolver([Track(bits, 1.0, target, metric)], lengths, start=highest_bits)
            solver.compensate(self.iterations)
            return solver.plane_weight(groups, group_size)

        return join_rows(each([float(rows.stop - rows.start) for _, rows in pieces], piece))


def highest_bits(y: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Coefficients fitted to the highest bits of an 8-bit code of y [g, N] between its extremes and 0."""
    low, high = y.amin(0).clamp_max(0), y.amax(0).clamp_min(0)
    levels_count = 2**GRID_BITS - 1
    size = ((high - low) / levels_count).clamp_min(1e-12)
    zero = (-low / size).round()
    code = ((y / size).round() + zero).clamp(0, levels_count).long()
    half = size * 2 ** (GRID_BITS - bits) / 2
    even = torch.cat([even_scales(half, bits), (half * (2**bits - 1) - size * zero).unsqueeze(0)])
    return refitted(y, code >> (GRID_BITS - bits), even, metric)
