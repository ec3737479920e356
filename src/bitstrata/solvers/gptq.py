"""GPTQ: integers on a min-max grid a group, each column's error passed on to the columns that follow.

arXiv 2210.17323, with groups, an integer zero point and asymmetric grids, as the libraries that
users know it from run it. One precision. A group's grid is made from its weights when its first column
is reached, errors of earlier columns included; with `act_order` all grids are made beforehand, and
columns are taken by descending importance (static groups), so that groups stay contiguous in the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planes import PlaneWeight
from .grouping import Grouping, affine_weight, code_planes, even_scales, join_rows, to_scale
from .joint import column_codes
from .method import Each, MomentsMethod, in_turn
from .metric import Metric, prepare
from .moments import Moments

COLUMNS_AT_ONCE = 128


@dataclass(frozen=True)
class GPTQ(MomentsMethod):
    """Optimal-brain-style rounding to a uniform grid; one precision.

    act_order: columns by descending importance; damping: added to the Hessian's diagonal, a share of its mean.
    """

    act_order: bool = False
    damping: float = 0.01

    name = "gptq"
    nests = False

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError("damping must be above 0")

    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int, each: Each = in_turn) -> PlaneWeight:
        (whole,) = each([1.0], lambda _: self._solved(weight, found, group_size))
        return whole

    def _solved(self, weight: Tensor, found: Mapping[int, Moments], group_size: int) -> PlaneWeight:
        ((bits, moments),) = found.items()
        columns = weight.shape[1]
        order = torch.arange(columns)
        if self.act_order:
            order = moments.diagonal.cpu().argsort(descending=True, stable=True)
        lengths = [min(COLUMNS_AT_ONCE, columns - start) for start in range(0, columns, COLUMNS_AT_ONCE)]
        metric, targets = prepare(weight, moments, order, lengths, damping=self.damping)
        dead = moments.dead.cpu()[order].to(weight.device)
        free = (target.to(weight.device).masked_fill(dead.unsqueeze(1), 0) for target in targets)
        return join_rows([self._solve_rows(part, metric, order, bits, group_size) for part in free])

    def _solve_rows(self, free: Tensor, metric: Metric, order: Tensor, bits: int, group_size: int) -> PlaneWeight:
        """Some rows [K, n], columns in order; they are overwritten."""
        columns, rows = free.shape
        grouping = Grouping(rows, columns, group_size)
        grids: dict[int, tuple[Tensor, Tensor]] = {}
        if self.act_order:
            own = order.argsort().to(free.device)
            for group in range(grouping.groups):
                grids[group] = grid(free[own[group * group_size : (group + 1) * group_size]], bits)
        code = torch.empty(columns, rows, dtype=torch.int64, device=free.device)
        where = order.tolist()
        for start, panel in zip(range(0, columns, COLUMNS_AT_ONCE), metric.factor, strict=True):
            factor = panel.to(free.device)  # U[start:stop, start:]
            stop = start + len(factor)
            ends = [end for end in range(start + 1, stop) if not (self.act_order or end % group_size)]
            for first, end in itertools.pairwise([start, *ends, stop]):
                mine = list(dict.fromkeys(column // group_size for column in where[first:end]))
                for group in mine:
                    if group not in grids:
                        grids[group] = grid(free[first : first + group_size], bits)
                # levels are middle + half (2 c - (2^p - 1))
                steps = 2 * torch.arange(2**bits, device=free.device).unsqueeze(1) - (2**bits - 1)
                tables = torch.stack([middle + half * steps for half, middle in (grids[group] for group in mine)])
                own_rows = factor[first - start : end - start]
                local, y = own_rows[:, first - start : end - start], free[first:end]
                spread, ones = local / local.diagonal().unsqueeze(1), torch.ones(end - first, device=free.device)
                chosen = code[first:end]
                if len(mine) == 1:
                    column_codes((bits,), [tables[0]], [y], [spread], [ones], chosen, given=False)
                    errors = y - tables[0].gather(0, chosen)
                else:
                    which = [mine.index(column // group_size) for column in where[first:end]]
                    column_codes((bits,), [tables], [y], [spread], [ones], chosen, given=False, which=which)
                    errors = y - tables[which].gather(1, chosen.unsqueeze(1))[:, 0]
                errors = torch.linalg.solve_triangular(local.T, errors, upper=False)
                free[end:] -= own_rows[:, end - start :].T @ errors
        planes = code_planes(grouping.split(code[order.argsort()].T.cpu()), bits)
        half, middle = (torch.stack(parts, 1).cpu() for parts in zip(*(grids[j] for j in sorted(grids)), strict=True))
        return affine_weight(grouping, planes, {bits: (even_scales(half, bits).reshape(bits, -1), middle.reshape(-1))})


def grid(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Half a step and the middle of the grid for y [g, N], rounded as they are stored: [N], [N].

    2^bits values from the minimum to the maximum, 0 among them.
    """
    low, high = y.amin(0).clamp_max(0), y.amax(0).clamp_min(0)
    count = 2**bits - 1
    size = (high - low) / count
    zero = torch.where(size > 0, -low / size, 0.0).round()
    half = to_scale(size / 2).float()
    return half, to_scale(half * (count - 2 * zero)).float()
