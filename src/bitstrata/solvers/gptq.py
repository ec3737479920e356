"""GPTQ: integers on a min-max grid a group, each column's error passed on to the columns that follow.

arXiv 2210.17323, with groups, an integer zero point and asymmetric grids, as the libraries that
users know it from run it. One precision. A group's grid is made from its weights when its first column
is reached, errors of earlier columns included; with `act_order` all grids are made beforehand, and
columns are taken by descending importance (static groups), so that groups stay contiguous in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planes import PlaneWeight
from .grouping import Grouping, affine_weight, code_planes, even_scales, to_scale
from .joint import upper_factor
from .method import Each, MomentsMethod, in_turn
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
        for start in range(0, columns, COLUMNS_AT_ONCE):
            end = min(start + COLUMNS_AT_ONCE, columns)
            errors = torch.empty(end - start, rows, device=weight.device)
            for column in range(start, end):
                group = where[column] // group_size
                if group not in grids:
                    last = min(column + group_size, columns)
                    pending = factor[start:column, column:last].T @ errors[: column - start]
                    fresh = free[column:last].clone()
                    fresh[max(0, end - column) :] -= pending[max(0, end - column) :]
                    grids[group] = grid(fresh, bits)
                half, middle = grids[group]
                # levels are middle + half (2 c - (2^p - 1))
                position = torch.where(half > 0, (free[column] - middle) / (2 * half), 0.0) + (2**bits - 1) / 2
                code[column] = position.round().clamp(0, 2**bits - 1).long()
                value = middle + half * (2 * code[column] - (2**bits - 1))
                errors[column - start] = (free[column] - value) / factor[column, column]
                free[column + 1 : end].addr_(factor[column, column + 1 : end], errors[column - start], alpha=-1)
            free[end:] -= factor[start:end, end:].T @ errors
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
