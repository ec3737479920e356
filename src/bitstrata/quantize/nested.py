"""`nested`: every precision's loss in the Hessian metric, minimised jointly over one nested code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..planes import PlaneWeight, decode
from .grouping import Grouping, affine_weight, check_weight, join_rows, row_chunks
from .method import BlockTask, Method
from .moments import Moments, moments, stages
from .tracks import JointSolver, Track, column_order


@dataclass(frozen=True)
class NestedOptions:
    """
    iterations: of codes and coefficients in each group of the compensated pass.
    sweeps: of coordinate descent over all columns.
    growth: lambda of p bits over that of p - 1 bits.
    damping: added to the Hessian's diagonal, as a share of its mean.
    correction: how far targets follow what quantized inputs ask for, 0..1.
    """

    iterations: int = 4
    sweeps: int = 2
    growth: float = 2.5
    damping: float = 0.01
    correction: float = 0.5

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.sweeps < 0:
            raise ValueError("iterations must be at least 1, sweeps at least 0")
        if not (self.growth > 0 and self.damping > 0 and 0 <= self.correction <= 1):
            raise ValueError("growth and damping must be above 0, correction must lie in 0..1")


class Nested(Method):
    """Joint multi-track solver in the Hessian metric."""

    name = "nested"
    options_type = NestedOptions
    presets: ClassVar = {}

    @property
    def needs_calibration(self) -> bool:
        return True

    def quantize_block(self, task: BlockTask) -> dict[str, PlaneWeight]:
        solved: dict[int, dict[str, Tensor]] = {bits: {} for bits in task.bits}
        result = {}
        for stage in stages(task):
            found = moments(task, stage, solved)
            for name in stage:
                check_weight(name, task.weights[name])
                result[name] = self.solve(task.weights[name].float(), found, task.group_size)
                for bits in task.bits:
                    solved[bits][name] = decode(result[name], bits).to(task.weights[name].device)
        return {name: result[name] for name in task.weights}

    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int) -> PlaneWeight:
        """W fp32 [N, K] and the moments at each bits -> planes and decoders."""
        options = self.options
        highest = found[max(found)]
        groups = column_order(highest.hessian.diagonal(), group_size)
        order = torch.cat(groups).to(weight.device)
        back = order.argsort()
        hessians = {b: m.damped(options.damping)[order][:, order] for b, m in found.items()}
        targets = {b: m.target(weight, options.damping, options.correction)[:, order] for b, m in found.items()}
        parts = []
        for rows in row_chunks(len(weight), 1, budget=1024):
            tracks = [
                Track(
                    bits,
                    options.growth ** (bits - min(found)),
                    targets[bits][rows].T.contiguous(),
                    hessians[bits],
                    torch.zeros(len(groups), bits + 1, rows.stop - rows.start, device=weight.device),
                )
                for bits in sorted(found)
            ]
            solver = JointSolver(tracks, [len(group) for group in groups])
            solver.compensate(options.iterations)
            solver.polish(options.sweeps)
            parts.append(self._pack(solver, groups, back, weight.shape[1], group_size))
        return join_rows(parts)

    def _pack(
        self, solver: JointSolver, groups: list[Tensor], back: Tensor, columns: int, group_size: int
    ) -> PlaneWeight:
        code = solver.code[back].T.cpu()  # [N, K]
        planes = torch.stack([(code >> (solver.top - 1 - plane)) & 1 for plane in range(solver.top)]).bool()
        place = torch.tensor([int(group.min()) // group_size for group in groups]).argsort()
        grouping = Grouping(len(code), columns, group_size)
        coefficients = {}
        for track in solver.tracks:
            stored = track.coefficients[place.to(track.coefficients.device)].cpu()  # [J, p + 1, N]
            scale = stored[:, :-1].permute(1, 2, 0).reshape(track.bits, -1)
            coefficients[track.bits] = scale, stored[:, -1].T.reshape(-1)
        return affine_weight(grouping, torch.stack([grouping.split(plane) for plane in planes]), coefficients)
