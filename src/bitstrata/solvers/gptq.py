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
from .grouping import Grouping, affine_weight, code_planes, even_scales, to_scale
from .joint import column_codes, upper_factor
from .method import MomentsMethod
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

    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int) -> PlaneWeight:
        ((bits, moments),) = found.items()
        rows, columns = weight.shape
        free = moments.alive(weight).T.contiguous()  # [K, N]
        order = torch.arange(columns, device=weight.device)
        grouping = Grouping.of(weight, group_size)
        grids: dict[int, tuple[Tensor, Tensor]] = {}
        if self.act_order:
            order = moments.hessian.diagonal().argsort(descending=True, stable=True).to(weight.device)
            for group in range(grouping.groups):
                grids[group] = grid(free[group * group_size : (group + 1) * group_size], bits)
        free = free[order]
        factor = upper_factor(moments.damped(self.damping)[order][:, order])
        code = torch.empty(columns, rows, dtype=torch.int64, device=weight.device)
        where = order.tolist()
        ends = [
            end for end in range(1, columns) if end % COLUMNS_AT_ONCE == 0 or not (self.act_order or end % group_size)
        ]
        for start, end in itertools.pairwise([0, *ends, columns]):
            mine = list(dict.fromkeys(column // group_size for column in where[start:end]))
            for group in mine:
                if group not in grids:
                    grids[group] = grid(free[start : start + group_size], bits)
            # levels are middle + half (2 c - (2^p - 1))
            steps = 2 * torch.arange(2**bits, device=weight.device).unsqueeze(1) - (2**bits - 1)
            tables = torch.stack([middle + half * steps for half, middle in (grids[group] for group in mine)])
            local, y = factor[start:end, start:end], free[start:end]
            spread, ones = local / local.diagonal().unsqueeze(1), torch.ones(end - start, device=weight.device)
            chosen = code[start:end]
            if len(mine) == 1:
                column_codes((bits,), [tables[0]], [y], [spread], [ones], chosen, given=False)
                errors = y - tables[0].gather(0, chosen)
            else:
                which = [mine.index(column // group_size) for column in where[start:end]]
                column_codes((bits,), [tables], [y], [spread], [ones], chosen, given=False, which=which)
                errors = y - tables[which].gather(1, chosen.unsqueeze(1))[:, 0]
            free[end:] -= factor[start:end, end:].T @ torch.linalg.solve_triangular(local.T, errors, upper=False)
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
