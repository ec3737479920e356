"""`nested`: one code for all precisions, every precision's loss in the Hessian metric minimised jointly.

    fast      no calibration: plain squared error of the weights
    default   each precision's own Hessian and target (moments.py), joint solver (joint.py)
    best      and then the scales of the whole model tuned end to end

The weights lambda of the precisions' losses grow geometrically with the bits. Equal weights favour
the lowest bits, whose loss is largest; what was measured for others is in docs/log.md. Tuning gives
the lowest bits the most, so `best` grows faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..planes import PlaneWeight
from ..planes.weights import BYTE_BITS, Kind
from .grouping import Grouping, affine_weight, code_planes, join_rows
from .joint import JointSolver, Track, column_order, common_unit
from .method import Each, MomentsMethod, Need, Tuning, in_turn, row_pieces
from .metric import Metric, prepare
from .moments import Moments


def _growths(bits: int) -> float:
    """Above 4 bits losses are so small that a full growth would sacrifice the lowest bits for nothing."""
    return bits if bits <= 4 else 4 + (bits - 4) / 2


@dataclass(frozen=True)
class Nested(MomentsMethod):
    """Joint solver of all precisions, one Hessian and target for each.

    hessian: false for plain squared error, without calibration.
    iterations: of codes and coefficients in each group of the compensated pass.
    sweeps: of coordinate descent over all columns.
    growth: lambda of p bits over that of p - 1 bits; its square root above 4 bits.
    damping: added to the Hessian's diagonal, as a share of its mean.
    correction: how far targets follow what quantized inputs ask for, 0..1.
    scale_bits: 8 stores scales and offsets of up to 4 bits as bytes, 16 all of them as fp16.
    tune_steps: of tuning all scales end to end; tune_rate, tune_tokens: its learning rate and tokens a step.
    """

    hessian: bool = True
    iterations: int = 4
    sweeps: int = 2
    growth: float = 2.0
    damping: float = 0.01
    correction: float = 1.0
    scale_bits: int = 8
    tune_steps: int = 0
    tune_rate: float = 0.03
    tune_tokens: int = 2048

    name = "nested"
    presets: ClassVar = {"fast": {"hessian": False}, "best": {"growth": 3.0, "tune_steps": 400}}

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.sweeps < 0 or self.tune_steps < 0 or self.tune_tokens < 1:
            raise ValueError("iterations and tune_tokens must be at least 1, sweeps and tune_steps at least 0")
        if not (self.growth > 0 and self.damping > 0 and self.tune_rate > 0 and 0 <= self.correction <= 1):
            raise ValueError("growth, damping and tune_rate must be above 0, correction must lie in 0..1")
        if self.scale_bits not in (8, 16):
            raise ValueError("scale_bits must be 8 or 16")
        if self.tune_steps and not self.hessian:
            raise ValueError("tune_steps needs hessian=true: both need calibration text")

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs if self.hessian else frozenset()

    def rounds(self) -> tuple[int, int]:
        return self.iterations + self.sweeps, 4 + self.sweeps

    @property
    def tuning(self) -> Tuning | None:
        return Tuning(self.tune_steps, self.tune_rate, self.tune_tokens) if self.tune_steps else None

    def scales_kind(self, bits: tuple[int, ...]) -> Kind:
        return "affine8" if self.scale_bits == 8 and min(bits) <= BYTE_BITS else "affine"

    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int, each: Each = in_turn) -> PlaneWeight:
        groups = column_order(found[max(found)].diagonal, group_size)
        order, lengths = torch.cat(groups), [len(group) for group in groups]
        ready = {
            bits: prepare(weight, moments, order, lengths, damping=self.damping, correction=self.correction)
            for bits, moments in found.items()
        }
        metrics = {bits: metric for bits, (metric, _) in ready.items()}
        pieces = row_pieces(weight)

        def piece(index: int) -> PlaneWeight:
            number, rows = pieces[index]
            held = {bits: targets[number] for bits, (_, targets) in ready.items()}
            mine = {bits: target[:, rows].to(weight.device).contiguous() for bits, target in held.items()}
            solver = self._solved(mine, metrics, lengths, self._unit(mine, lengths))
            return solver.plane_weight(groups, group_size)

        return join_rows(each([float(rows.stop - rows.start) for _, rows in pieces], piece))

    def solve_rows(self, weight: Tensor, bits: tuple[int, ...], group_size: int) -> PlaneWeight:
        """Without a Hessian every group is a problem of its own: groups become rows."""
        rows, columns = weight.shape
        whole = columns // group_size * group_size
        lengths = [min(group_size, columns - first) for first in range(0, columns, group_size)]
        unit = self._unit(dict.fromkeys(bits, weight.T), lengths)
        codes: list[Tensor] = []
        parts: dict[int, list[Tensor]] = {value: [] for value in bits}
        for part in (weight[:, :whole].reshape(-1, group_size), weight[:, whole:]):
            if not part.numel():
                continue
            targets = dict.fromkeys(bits, part.T.contiguous())
            eye = Metric.of(torch.eye(part.shape[1], device=weight.device), [part.shape[1]])
            units = None if unit is None else unit.repeat_interleave(len(part) // rows)
            solver = self._solved(targets, dict.fromkeys(bits, eye), [part.shape[1]], units)
            codes.append(solver.code.T.reshape(rows, -1).cpu())
            for track in solver.tracks:
                parts[track.bits].append(track.coefficients[0].reshape(track.bits + 1, rows, -1).cpu())
        joined = {value: torch.cat(found, 2) for value, found in parts.items()}  # [bits + 1, N, J]
        coefficients = {value: (c[:-1].reshape(value, -1), c[-1].reshape(-1)) for value, c in joined.items()}
        stored = {} if unit is None else {value: unit.cpu() for value in bits if value <= BYTE_BITS}
        grouping = Grouping.of(weight, group_size)
        planes = code_planes(grouping.split(torch.cat(codes, 1)), max(bits))
        return affine_weight(grouping, planes, coefficients, stored)

    def _unit(self, targets: Mapping[int, Tensor], groups: Sequence[int]) -> Tensor | None:
        """The rows' byte unit, if any precision is stored in bytes; targets [K, N]."""
        chosen = {bits: target for bits, target in targets.items() if bits <= BYTE_BITS}
        return common_unit(chosen, groups) if chosen and self.scale_bits == 8 else None

    def _solved(
        self,
        targets: Mapping[int, Tensor],
        metrics: Mapping[int, Metric],
        groups: Sequence[int],
        unit: Tensor | None,
    ) -> JointSolver:
        """Targets [K, N] and metrics at each bits; the byte unit of rows, fp16 [N]."""
        tracks = [
            Track(
                bits,
                self.growth ** (_growths(bits) - _growths(min(targets))),
                targets[bits],
                metrics[bits],
                unit if bits <= BYTE_BITS else None,
            )
            for bits in sorted(targets)
        ]
        solver = JointSolver(tracks, groups)
        solver.compensate(self.iterations)
        solver.polish(self.sweeps)
        solver.secure()
        return solver
