"""Methods that solve one linear at a time, knowing its inputs: the loop over a block that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..planes import PlaneWeight, decode
from .grouping import Grouping, affine_weight, check_weight
from .method import BlockTask, Method
from .moments import Moments, moments, stages
from .tracks import JointSolver

ROWS_AT_ONCE = 4096  # rows that a solver holds


class HessianMethod(Method):
    """Solves the linears of a block in the order in which they run, each on the inputs that the solved ones give it."""

    @property
    def needs_calibration(self) -> bool:
        return True

    def layer_bytes(self, rows: int, columns: int, bits: tuple[int, ...]) -> int:
        """Hessian, cross moments, the damped one and its factor a precision, two in float64; the solver's tensors."""
        if not self.needs_calibration:
            return 0
        return 4 * columns * (columns * (4 * len(bits) + 4) + min(rows, ROWS_AT_ONCE) * (4 * len(bits) + 6))

    @abstractmethod
    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int) -> PlaneWeight:
        """W fp32 [N, K], checked, and the moments of its inputs at each bits -> planes and scales."""

    def quantize_block(self, task: BlockTask) -> dict[str, PlaneWeight]:
        solved: dict[int, dict[str, Tensor]] = {bits: {} for bits in task.bits}
        result = {}
        for stage in stages(task):
            found = moments(task, stage, solved)
            for name in stage:
                weight = task.weights[name].float()
                check_weight(name, weight)
                highest = found[max(found)]
                if highest.tokens < weight.shape[1]:
                    task.say(
                        f"{name}: {highest.tokens} calibration tokens for {weight.shape[1]} inputs; "
                        "damping fills in, more tokens would be better"
                    )
                result[name] = self.solve(weight, found, task.group_size)
                for bits in task.bits:
                    solved[bits][name] = decode(result[name], bits).to(weight.device)
        return {name: result[name] for name in task.weights}


def pack(solver: JointSolver, groups: list[Tensor], columns: int, group_size: int) -> PlaneWeight:
    """What the solver found, columns and groups back in their own order.

    groups: the columns of each of the solver's groups.
    """
    back = torch.cat(groups).argsort()
    code = solver.code.cpu()[back].T  # [N, K]
    grouping = Grouping(len(code), columns, group_size)
    planes = [grouping.split((code >> (solver.top - 1 - plane)) & 1).bool() for plane in range(solver.top)]
    place = torch.tensor([int(group.min()) for group in groups]).argsort()
    coefficients = {}
    for track in solver.tracks:
        stored = track.coefficients.cpu()[place]  # [J, p + 1, N]
        scale = stored[:, :-1].permute(1, 2, 0).reshape(track.bits, -1)
        coefficients[track.bits] = scale, stored[:, -1].T.reshape(-1)
    units = {track.bits: track.unit.cpu() for track in solver.tracks if track.unit is not None}
    return affine_weight(grouping, torch.stack(planes), coefficients, units)
