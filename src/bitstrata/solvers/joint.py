"""The joint solver: one code for every precision, in the geometry of the Hessian.

A *track* is one precision p of a layer: its target W*_p, its Hessian H_p and its own coefficients.
All tracks share one code of P bits a weight, of which track p reads the first p. What is minimised,
for each row on its own, is

    sum_p lambda_p L_p,    L_p = (w_p - q_p) H_p (w_p - q_p)^T

Two passes over the columns (algorithms: BPDQ, arXiv 2602.04163, section 3, for one precision;
"multi-track" is our extension of it, and with a single track it is BPDQ):

    compensated   GPTQ's order: every track propagates its error to the columns that are still free,
                  the code of a column minimises the tracks' weighted squared errors, coefficients
                  are refitted in the metric of the group given what comes later may compensate
    polish        coordinate descent in the full metric: a column's code, given all others; a
                  group's coefficients, given all others; never increases a row's loss

Rows lie last ([K, N]), so that a column of all rows is contiguous and every step is a few
operations over vectors of rows, on any device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.cpu import choose_codes, fit_codes
from ..planes.weights import PlaneWeight, byte_unit
from ..scratch import Tensors
from .grouping import Grouping, affine_weight, code_planes, code_signs, even_scales, to_bytes, to_scale
from .metric import Metric

RIDGE = 1e-6  # of the mean diagonal of a group's normal matrix
HEADROOM = 1.2  # of byte units over the first grid: the groups' own fits go beyond it
STARTS = (1.0, 0.85, 0.7, 0.55)  # shares of the range from minimum to maximum that the first grid covers


Start = Callable[[Tensor, int, Tensor], Tensor]  # (weights [g, N], bits, metric [g, g]) -> coefficients [bits + 1, N]


@dataclass
class Track:
    """One precision: target [K, N], the metric with a panel for each group, weight lambda.

    unit: fp16 [N] if coefficients are stored as bytes (planes.weights.ByteScales).
    coefficients: what the solver finds, [J, p + 1, N], offset last.
    """

    bits: int
    weight: float
    target: Tensor
    metric: Metric
    unit: Tensor | None = None
    coefficients: Tensor = field(init=False)

    def loss(self, decoded: Tensor) -> Tensor:
        """L_p of every row for weights [K, N]: [N]."""
        return self.metric.losses([self.target - decoded])[0]


def levels(coefficients: Tensor) -> Tensor:
    """The value of every code: [p + 1, N] -> [2^p, N]."""
    signs = code_signs(len(coefficients) - 1, coefficients.device).T
    return torch.addmm(coefficients[-1], signs, coefficients[:-1])


def rounded(coefficients: Tensor, unit: Tensor | None = None) -> Tensor:
    """As they will be stored, [p + 1, N]."""
    return to_scale(coefficients).float() if unit is None else to_bytes(coefficients, unit)


def common_unit(targets: Mapping[int, Tensor], groups: Sequence[int]) -> Tensor:
    """A byte unit for every row, of the first grids of all groups at all bits: {bits: [K, N]} -> fp16 [N].

    One for all bits, so that every precision can take over a lower one's coefficients.
    """
    largest = torch.zeros(1)
    for bits, target in targets.items():
        for part in target.split(list(groups)):
            grid = first_grid(part, bits, torch.eye(len(part), device=target.device))
            largest = torch.maximum(largest.to(target.device), torch.maximum(grid[0].abs(), grid[-1].abs()))
    return byte_unit(largest * HEADROOM)


def column_order(diagonal: Tensor, group_size: int) -> list[Tensor]:
    """Groups of columns in the order in which they are solved, each with its most important column first.

    Groups stay whole, so the order leaves no trace in the result (BPDQ's group-aware reordering).
    """
    groups = [
        torch.arange(start, min(start + group_size, len(diagonal))) for start in range(0, len(diagonal), group_size)
    ]
    diagonal = diagonal.cpu()
    inside = [group[diagonal[group].argsort(descending=True, stable=True)] for group in groups]
    return sorted(inside, key=lambda group: -float(diagonal[group[0]]))


class JointSolver:
    """Solves some rows of a layer.

    Args:
        tracks: ascending in bits; targets and metrics in the same column order.
        groups: lengths of the groups, in order; they add up to K.
        start: the coefficients that a group begins with; `first_grid` by default.
    """

    def __init__(self, tracks: Sequence[Track], groups: Sequence[int], start: Start | None = None) -> None:
        self.tracks = list(tracks)
        self.start = start or first_grid
        self.top = tracks[-1].bits
        self._bits = [track.bits for track in tracks]
        ends = torch.tensor([0, *groups]).cumsum(0).tolist()
        self.spans = list(itertools.pairwise(ends))
        self.device = tracks[0].target.device
        rows = tracks[0].target.shape[1]
        self.code = torch.zeros(tracks[0].target.shape, dtype=torch.int64, device=self.device)
        for track in tracks:
            track.coefficients = torch.zeros(len(groups), track.bits + 1, rows, device=self.device)

    def part(self, code: Tensor, track: Track) -> Tensor:
        """The bits of a code that a track reads."""
        return code >> (self.top - track.bits)

    def values(self, group: int, track: Track) -> Tensor:
        """Decoded weights of a group: [g, N]."""
        start, end = self.spans[group]
        return levels(track.coefficients[group]).gather(0, self.part(self.code[start:end], track))

    def compensate(self, iterations: int) -> list[Tensor]:
        """Solve all groups from left to right; returns L_p of every row by the errors passed on, [N] a track."""
        totals = [torch.zeros(self.code.shape[1], device=self.device) for _ in self.tracks]
        free = [track.target.clone() for track in self.tracks]
        for group, ((start, end), panels) in enumerate(self._by_group([t.metric.factor for t in self.tracks])):
            local = [panel[:, : end - start] for panel in panels]
            errors = self._compensate_group(group, [y[start:end] for y in free], local, iterations)
            for y, panel, error, total in zip(free, panels, errors, totals, strict=True):
                y[end:] -= panel[:, end - start :].T @ error
                total += error.square().sum(0)
        return totals

    def _compensate_group(
        self, group: int, targets: list[Tensor], factors: list[Tensor], iterations: int
    ) -> list[Tensor]:
        start, end = self.spans[group]
        eye = torch.eye(end - start, device=self.device)
        whiten = [torch.linalg.solve_triangular(factor.T, eye, upper=False) for factor in factors]  # U^-T
        metrics = [w.T @ w for w in whiten]
        spread = [factor / factor.diagonal().unsqueeze(1) for factor in factors]
        weights = [
            track.weight / float(factor.diagonal().square().mean())
            for track, factor in zip(self.tracks, factors, strict=True)
        ]
        tables = [
            self.start(y, track.bits, metric) for y, track, metric in zip(targets, self.tracks, metrics, strict=True)
        ]
        best: list[Tensor] = []
        for turn in range(iterations):
            code = self._greedy_codes(targets, spread, tables, weights)
            score = torch.zeros(code.shape[1], device=self.device)
            errors, made = [], []
            for index, track in enumerate(self.tracks):
                part = self.part(code, track)
                tables[index] = rounded(refitted(targets[index], part, tables[index], metrics[index]), track.unit)
                error = whiten[index] @ (targets[index] - levels(tables[index]).gather(0, part))
                score += track.weight * error.square().sum(0)
                errors.append(error)
                made.append(tables[index])
            current = [score.unsqueeze(0), code, *errors, *made]
            if not turn:
                best, last = current, code
                continue
            better = score < best[0]
            best = [torch.where(better, new, old) for new, old in zip(current, best, strict=True)]
            if bool((code == last).all()):
                break
            last = code
        count = len(self.tracks)
        self.code[start:end] = best[1]
        for track, coefficients in zip(self.tracks, best[2 + count :], strict=True):
            track.coefficients[group, :] = coefficients
        return best[2 : 2 + count]

    def _greedy_codes(
        self, targets: list[Tensor], spread: list[Tensor], tables: list[Tensor], weights: list[float]
    ) -> Tensor:
        """One code a column, from left to right, errors passed on inside the group."""
        code = torch.empty(targets[0].shape, dtype=torch.int64, device=self.device)
        fixed = [torch.full((len(code),), weight, device=self.device) for weight in weights]
        column_codes(self._bits, [levels(table) for table in tables], targets, spread, fixed, code, given=False)
        return code

    def polish(self, sweeps: int) -> None:
        """Coordinate descent in the full metric."""
        # (W* - Q) H, as [K, N]
        residual = []
        for track in self.tracks if sweeps else ():
            error, r = track.target - self.decoded(track), torch.empty_like(track.target)
            for (start, end), (panel,) in self._by_group([track.metric.hessian]):
                torch.mm(panel, error, out=r[start:end])
            residual.append(r)
        for _ in range(sweeps):
            for group, ((start, end), panels) in enumerate(self._by_group([t.metric.hessian for t in self.tracks])):
                metrics = [panel[:, start:end] for panel in panels]
                before = [self.values(group, track) for track in self.tracks]
                self._polish_codes(group, residual, metrics)
                for track, old, r, panel, metric in zip(self.tracks, before, residual, panels, metrics, strict=True):
                    moved = self.values(group, track) - old
                    local = r[start:end] - metric @ moved
                    moved += self._polish_coefficients(group, track, local, metric)
                    r -= panel.T @ moved  # H is symmetric

    def _by_group(self, matrices: Sequence[Tensors]) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
        """Of each group its columns, and its panel of each of these matrices."""
        for span, *panels in zip(self.spans, *matrices, strict=True):
            yield span, [panel.to(self.device) for panel in panels]

    def _polish_codes(self, group: int, residual: list[Tensor], metrics: list[Tensor]) -> None:
        start, end = self.spans[group]
        tables = [levels(track.coefficients[group]) for track in self.tracks]
        left = [r[start:end] for r in residual]
        scales = [track.weight * metric.diagonal() for track, metric in zip(self.tracks, metrics, strict=True)]
        column_codes(self._bits, tables, left, metrics, scales, self.code[start:end], given=True)

    def _polish_coefficients(self, group: int, track: Track, residual: Tensor, metric: Tensor) -> Tensor:
        """Refit a group's coefficients of one track where that lowers the loss; returns how its weights moved."""
        start, end = self.spans[group]
        part = self.part(self.code[start:end], track)
        old = track.coefficients[group]
        new = rounded(old + least_squares_step(part, track.bits, metric, residual), track.unit)
        moved = levels(new).gather(0, part) - levels(old).gather(0, part)
        change = (moved * (metric @ moved - 2 * residual)).sum(0)
        better = change < 0
        track.coefficients[group, :] = torch.where(better, new, old)
        return moved * better

    def decoded(self, track: Track) -> Tensor:
        """The weights of a track: [K, N]."""
        return torch.cat([self.values(group, track) for group in range(len(self.spans))])

    def secure(self) -> int:
        """Let no row lose by more bits: where L_p of its own weights exceeds that of p - 1's, take over those.

        The lower track's coefficients with 0 for the further planes decode to the same weights. Returns how many
        (row, precision) this changed.
        """
        changed = 0
        for lower, track in itertools.pairwise(self.tracks):
            own, of_lower = track.metric.losses([track.target - self.decoded(one) for one in (track, lower)])
            worse = own > of_lower
            changed += int(worse.sum())
            same = torch.zeros_like(track.coefficients)
            same[:, : lower.bits] = lower.coefficients[:, :-1]
            same[:, -1] = lower.coefficients[:, -1]
            track.coefficients = torch.where(worse, same, track.coefficients)
        return changed

    def plane_weight(self, groups: Sequence[Tensor], group_size: int) -> PlaneWeight:
        """The solution, columns and groups back in their own order; `groups`: the columns of each of the groups."""
        code = self.code.cpu()[torch.cat(list(groups)).argsort()].T  # [N, K]
        grouping = Grouping.of(code, group_size)
        place = torch.tensor([int(group.min()) for group in groups]).argsort()
        coefficients, units = {}, {}
        for track in self.tracks:
            stored = track.coefficients.cpu()[place]  # [J, p + 1, N]
            scale = stored[:, :-1].permute(1, 2, 0).reshape(track.bits, -1)
            coefficients[track.bits] = scale, stored[:, -1].T.reshape(-1)
            if track.unit is not None:
                units[track.bits] = track.unit.cpu()
        return affine_weight(grouping, code_planes(grouping.split(code), self.top), coefficients, units)


def column_codes(
    bits: Sequence[int],
    tables: Sequence[Tensor],
    left: Sequence[Tensor],
    factors: Sequence[Tensor],
    scales: Sequence[Tensor],
    codes: Tensor,
    *,
    given: bool,
    which: Sequence[int] | None = None,
) -> None:
    """Find the best code of one column after the other, in place; in native code where that can run, with one table.

    A column's code has the least sum_p s_p (z_p - v_p(code))^2. What it leaves is passed on to further columns:

        given=False   z = y[k]                             y[k+1:] -= factor[k, k+1:] (z - v)
        given=True    z = v(old code) + y[k] / factor[k, k]   y[k+1:] -= factor[k, k+1:] (v - v(old code))

    Args:
        bits: of each track, ascending.
        tables: the values v of codes, fp32 [2^p, N] each; or [S, 2^p, N], and those of column k are `which[k]`.
        left: y, fp32 [g, N]; factors: fp32 [g, g]; scales: s, fp32 [g]; codes: int64 [g, N].
    """
    if which is None:
        if choose_codes(bits, tables, left, factors, scales, codes, given=given):
            return
        which, tables = [0] * len(codes), [table.unsqueeze(0) for table in tables]
    shifts = [bits[-1] - value for value in bits]
    wide = [table.repeat_interleave(1 << shift, 1) for table, shift in zip(tables, shifts, strict=True)]
    squares = [table.square() for table in wide]
    weights = list(zip(*(scale.tolist() for scale in scales), strict=True))
    left = [y.clone() for y in left]

    def values(code: Tensor) -> list[Tensor]:
        return [t[own].gather(0, (code >> shift).unsqueeze(0))[0] for t, shift in zip(tables, shifts, strict=True)]

    for column, (own, mine) in enumerate(zip(which, weights, strict=True)):
        wanted = before = [y[column] for y in left]
        if given:
            before = values(codes[column])
            wanted = [v + z / f[column, column] for v, z, f in zip(before, wanted, factors, strict=True)]
        cost = torch.zeros_like(wide[0][own])
        for weight, square, table, z in zip(mine, squares, wide, wanted, strict=True):
            cost.add_(square[own], alpha=weight).addcmul_(table[own], z, value=-2 * weight)
        codes[column] = cost.argmin(0)
        for y, factor, old, new in zip(left, factors, before, values(codes[column]), strict=True):
            y[column + 1 :].addr_(factor[column, column + 1 :], new - old if given else old - new, alpha=-1)


def first_grid(y: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Coefficients of an even grid for each row: the share of the range with the least rounding error.

    y [g, N], metric [g, g], of which the diagonal weighs the errors -> [bits + 1, N].
    """
    importance = metric.diagonal()
    low, high = y.amin(0), y.amax(0)
    middle, count = (low + high) / 2, 2**bits - 1
    best_error = torch.full_like(middle, torch.inf)
    best_half = torch.zeros_like(middle)
    for share in STARTS:
        half = (high - low) * (share / count / 2)
        code = torch.where(half > 0, (y - middle) / (2 * half) + count / 2, 0.0).round().clamp_(0, count)
        error = (((code - count / 2) * 2 * half + middle - y).square() * importance.unsqueeze(1)).sum(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_half = torch.where(better, half, best_half)
    return torch.cat([even_scales(best_half, bits), middle.unsqueeze(0)])


def refitted(target: Tensor, code: Tensor, coefficients: Tensor, metric: Tensor) -> Tensor:
    """Coefficients [p + 1, N] that bring the decoded codes [g, N] nearest to `target` in `metric` [g, g]."""
    residual = metric @ (target - levels(coefficients).gather(0, code))
    return coefficients + least_squares_step(code, len(coefficients) - 1, metric, residual)


def least_squares_step(code: Tensor, bits: int, metric: Tensor, residual: Tensor) -> Tensor:
    """The change of coefficients [bits + 1, N] that least squares asks for; in native code where that can run.

    Args:
        code: int64 [g, N]; metric: fp32 [g, g].
        residual: metric @ (target - decoded), fp32 [g, N].
    """
    found = fit_codes(code, bits, metric, residual, RIDGE)
    if found is not None:
        return found
    basis = torch.ones(bits + 1, *code.shape, device=code.device)
    basis[:-1] = code_planes(code, bits).float() * 2 - 1
    weighted = metric @ basis  # [p + 1, g, N]
    normal = torch.empty(bits + 1, bits + 1, code.shape[1], device=code.device, dtype=torch.float64)
    for row in range(bits + 1):
        for column in range(row, bits + 1):
            normal[row, column] = normal[column, row] = (basis[row] * weighted[column]).sum(0)
    right = (basis * residual).sum(1, dtype=torch.float64)
    diagonal = normal.diagonal(dim1=0, dim2=1)  # [N, p + 1]
    diagonal += (RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(1e-30)
    return solve_small(normal, right).float()


def solve_small(normal: Tensor, right: Tensor) -> Tensor:
    """x with normal x = right for many small positive definite systems [m, m, N], [m, N]. Overwrites both."""
    size = len(right)
    for pivot in range(size):
        factor = normal[pivot + 1 :, pivot] / normal[pivot, pivot]
        normal[pivot + 1 :, pivot:] -= factor.unsqueeze(1) * normal[pivot, pivot:]
        right[pivot + 1 :] -= factor * right[pivot]
    for pivot in range(size - 1, -1, -1):
        right[pivot] = (right[pivot] - (normal[pivot, pivot + 1 :] * right[pivot + 1 :]).sum(0)) / normal[pivot, pivot]
    return right
