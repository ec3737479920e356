"""`nested`: one code for all precisions, every precision's loss in the Hessian metric minimised jointly.

    fast      no calibration: plain squared error of the weights
    default   each precision's own Hessian and target (moments.py), joint solver (tracks.py)
    best      and then the scales of the whole model tuned end to end (refine.py)

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
from .grouping import Grouping, affine_weight, join_rows, row_chunks
from .hessian import ROWS_AT_ONCE, HessianMethod, pack
from .method import BlockTask, Method, Tuning
from .moments import Moments
from .tracks import JointSolver, Track, column_order, common_unit, upper_factor


def _growths(bits: int) -> float:
    """Above 4 bits losses are so small that a full growth would sacrifice the lowest bits for nothing."""
    return bits if bits <= 4 else 4 + (bits - 4) / 2


@dataclass(frozen=True)
class NestedOptions:
    """
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

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.sweeps < 0 or self.tune_steps < 0 or self.tune_tokens < 1:
            raise ValueError("iterations and tune_tokens must be at least 1, sweeps and tune_steps at least 0")
        if not (self.growth > 0 and self.damping > 0 and self.tune_rate > 0 and 0 <= self.correction <= 1):
            raise ValueError("growth, damping and tune_rate must be above 0, correction must lie in 0..1")
        if self.scale_bits not in (8, 16):
            raise ValueError("scale_bits must be 8 or 16")
        if self.tune_steps and not self.hessian:
            raise ValueError("tune_steps needs hessian=true: both need calibration text")


class Nested(HessianMethod):
    """Joint multi-track solver, one Hessian and target a precision."""

    name = "nested"
    options_type = NestedOptions
    presets: ClassVar = {"fast": {"hessian": False}, "best": {"growth": 3.0, "tune_steps": 400}}

    def scales_kind(self, bits: tuple[int, ...]) -> Kind:
        return "affine8" if self.options.scale_bits == 8 and min(bits) <= BYTE_BITS else "affine"

    @property
    def needs_calibration(self) -> bool:
        return bool(self.options.hessian)

    @property
    def tuning(self) -> Tuning | None:
        options = self.options
        return Tuning(options.tune_steps, options.tune_rate, options.tune_tokens) if options.tune_steps else None

    def quantize_block(self, task: BlockTask) -> dict[str, PlaneWeight]:
        return super().quantize_block(task) if self.options.hessian else Method.quantize_block(self, task)

    def solve(self, weight: Tensor, found: Mapping[int, Moments], group_size: int) -> PlaneWeight:
        options = self.options
        groups = column_order(found[max(found)].hessian.diagonal(), group_size)
        order = torch.cat(groups).to(weight.device)
        hessians = {bits: m.damped(options.damping)[order][:, order] for bits, m in found.items()}
        targets = {bits: m.target(weight, options.damping, options.correction)[:, order].T for bits, m in found.items()}
        factors = {bits: upper_factor(hessian) for bits, hessian in hessians.items()}
        parts = []
        for rows in row_chunks(len(weight), 1, budget=ROWS_AT_ONCE):
            mine = {bits: target[:, rows].contiguous() for bits, target in targets.items()}
            lengths = [len(group) for group in groups]
            unit = self._unit(mine, lengths)
            solver = self._solver(mine, hessians, lengths, unit, factors)
            parts.append(pack(solver, groups, weight.shape[1], group_size))
        return join_rows(parts)

    def quantize_rows(self, weight: Tensor, bits: tuple[int, ...], group_size: int) -> PlaneWeight:
        """Without a Hessian every group is a problem of its own: groups become rows."""
        grouping = Grouping.of(weight, group_size)
        whole = weight.shape[1] // group_size * group_size
        parts = [weight[:, :whole].reshape(-1, group_size), weight[:, whole:]]
        planes = torch.zeros(max(bits), grouping.rows, grouping.groups * group_size, dtype=torch.bool)
        coefficients = {value: torch.zeros(value + 1, grouping.rows, grouping.groups) for value in bits}
        lengths = [min(group_size, weight.shape[1] - first) for first in range(0, weight.shape[1], group_size)]
        unit = self._unit(dict.fromkeys(bits, weight.T), lengths)
        for part, first in zip(parts, (0, whole), strict=True):
            if not part.numel():
                continue
            target, eye = part.T.contiguous(), torch.eye(part.shape[1], device=weight.device)
            units = None if unit is None else unit.repeat_interleave(part.numel() // part.shape[1] // len(weight))
            solver = self._solver(dict.fromkeys(bits, target), dict.fromkeys(bits, eye), [part.shape[1]], units)
            code = solver.code.T.reshape(grouping.rows, -1).cpu()
            for plane in range(solver.top):
                planes[plane, :, first : first + code.shape[1]] = ((code >> (solver.top - 1 - plane)) & 1).bool()
            for track in solver.tracks:
                found = track.coefficients[0].reshape(track.bits + 1, grouping.rows, -1).cpu()
                place = first // group_size
                coefficients[track.bits][:, :, place : place + found.shape[2]] = found
        split = planes.reshape(max(bits), -1, group_size)
        flat = {value: (c[:-1].reshape(value, -1), c[-1].reshape(-1)) for value, c in coefficients.items()}
        stored = {} if unit is None else {value: unit.cpu() for value in bits if value <= BYTE_BITS}
        return affine_weight(grouping, split, flat, stored)

    def _unit(self, targets: Mapping[int, Tensor], groups: Sequence[int]) -> Tensor | None:
        """The rows' byte unit, if any precision is stored in bytes; targets [K, N]."""
        chosen = {bits: target for bits, target in targets.items() if bits <= BYTE_BITS}
        return common_unit(chosen, groups) if chosen and self.options.scale_bits == 8 else None

    def _solver(
        self,
        targets: Mapping[int, Tensor],
        hessians: Mapping[int, Tensor],
        groups: Sequence[int],
        unit: Tensor | None,
        factors: Mapping[int, Tensor] | None = None,
    ) -> JointSolver:
        """Solved: targets [K, N] and damped Hessians [K, K] at each bits; the byte unit of rows, fp16 [N]."""
        options = self.options
        tracks = [
            Track(
                bits,
                options.growth ** (_growths(bits) - _growths(min(targets))),
                targets[bits],
                hessians[bits],
                torch.zeros(len(groups), bits + 1, targets[bits].shape[1], device=targets[bits].device),
                None if factors is None else factors[bits],
                unit if bits <= BYTE_BITS else None,
            )
            for bits in sorted(targets)
        ]
        solver = JointSolver(tracks, groups)
        solver.compensate(options.iterations)
        solver.polish(options.sweeps)
        solver.secure()
        return solver
