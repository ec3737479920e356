"""What the error of a layer is measured in, and what its weights should be, made ready for going over columns.

With the columns in the order in which they are solved, and H damped, a solver needs for one group of columns at a time

    H[start:end, :]          the rows of the group
    U[start:end, start:]     upper triangular, H^-1 = U^T U: how errors are passed on to later columns
    W*[:, rows]              the target of some rows of the layer, transposed: W + correction W D H^-1 (moments.py)

All of these are written once, and read in order as often as a solver likes; from a file where they are large. What has
to be in memory as a whole is one matrix [K, K] of float64: H with its columns reversed, which becomes its Cholesky
factor L in place, and then L^-1. With R = L reversed, H = R R^T and U = R^-1.

Source: GPTQ, arXiv 2210.17323, section 3, which says why U is all that is needed of H.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scratch import IN_MEMORY, Tensors, kept
from .grouping import row_chunks
from .moments import Moments

ROWS_AT_ONCE = 4096  # rows that are solved at a time, at most
BLOCK = 256  # columns of a triangular matrix inverted at a time
STRIP = 2048  # rows of it multiplied at a time, so that few of its zeros are
PIECE = 1 << 22  # numbers of targets made at a time


@dataclass(frozen=True)
class Metric:
    """hessian: of each group H[start:end, :], fp32 [g, K]; factor: U[start:end, start:], fp32 [g, K - start]."""

    hessian: Tensors
    factor: Tensors

    @classmethod
    def of(cls, hessian: Tensor, groups: Sequence[int]) -> Metric:
        """From H as a whole, fp32 [K, K], damped, columns in order; `groups`: their lengths."""
        factor = upper_factor(hessian)
        starts = itertools.accumulate(groups[:-1], initial=0)
        parts = [part[:, start:].contiguous() for start, part in zip(starts, factor.split(list(groups)), strict=True)]
        return cls(list(hessian.split(list(groups))), parts)

    def losses(self, errors: Sequence[Tensor]) -> list[Tensor]:
        """e H e^T of every row, for errors [K, N] each: [N] each."""
        totals = [torch.zeros(error.shape[1], device=error.device) for error in errors]
        start = 0
        for panel in self.hessian:
            end = start + len(panel)
            for error, total in zip(errors, totals, strict=True):
                total += (error[start:end] * (panel.to(error.device) @ error)).sum(0)
            start = end
        return totals


def stretches(rows: int, columns: int) -> Sequence[slice]:
    """Which rows of a layer are solved at a time."""
    return row_chunks(rows, 1, budget=min(ROWS_AT_ONCE, max(1, IN_MEMORY // columns)))


def solving_bytes(rows: int, columns: int, precisions: int) -> int:
    """What solving such a layer takes in memory, at most, by the sizes above; files do not count.

    The layer in fp32 and what is kept of its moments, metrics and targets; then the matrix and a piece of the targets,
    or the solver's own: for each precision a target, what is left of it, residuals, and the codes in eight bytes.
    """
    square, layer = columns**2, rows * columns
    stretch = columns * int(stretches(rows, columns)[0].stop)
    held = 4 * layer + (precisions * 4 * layer if layer <= IN_MEMORY else 0)
    held += precisions * 14 * square if square <= IN_MEMORY else 0  # H and D, ordered H, half of U
    making = 8 * square + 6 * 8 * min(PIECE, layer) + 16 * min(IN_MEMORY, square)
    return held + max(making, 4 * stretch * (3 * precisions + 6))


def solving_disk(rows: int, columns: int, precisions: int) -> int:
    """What the files of moments, metrics and targets of such a layer take."""
    square, layer = columns**2, rows * columns
    return precisions * ((13 * square if square > IN_MEMORY else 0) + (4 * layer if layer > IN_MEMORY else 0))


def upper_factor(hessian: Tensor) -> Tensor:
    """U with H^-1 = U^T U, upper triangular, fp32; H [K, K] is positive definite."""
    matrix = hessian.double().flip(0, 1).mT.contiguous().mT  # as LAPACK has it: columns one after the other
    cholesky_(matrix)
    invert_(matrix)
    return matrix.flip(0, 1).float()


def cholesky_(matrix: Tensor) -> None:
    """Positive definite [K, K], stored by columns -> L with L L^T = it, in place, zeros above the diagonal.

    Raises torch.linalg.LinAlgError if it is not positive definite.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, check_errors=True, out=(matrix, info))


def invert_(lower: Tensor) -> None:
    """L [K, K], zeros above the diagonal -> L^-1, in place.

    From the last columns to the first: with L = [[A, 0], [B, C]] the part below A^-1 is -C^-1 B A^-1, C^-1 being known.
    """
    size = len(lower)
    for start in reversed(range(0, size, BLOCK)):
        end = min(start + BLOCK, size)
        eye = torch.eye(end - start, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower[start:end, start:end], eye, upper=False)
        below = lower[end:, start:end] @ inverse
        for at in range(end, size, STRIP):
            to = min(at + STRIP, size)
            lower[at:to, start:end] = -(lower[at:to, end:to] @ below[: to - end])
        lower[start:end, start:end] = inverse


def prepare(
    weight: Tensor,
    moments: Moments,
    order: Tensor,
    groups: Sequence[int],
    *,
    damping: float,
    correction: float = 0.0,
) -> tuple[Metric, Tensors]:
    """The metric of a layer at one precision, and its targets W* for each of `stretches`, fp32 [K, n].

    Args:
        weight: W fp32 [N, K].
        order: the columns in the order in which they are solved, int64 [K]; groups: how many are solved at a time.
        damping: share of the mean of H's diagonal; correction: how far targets follow the drift, 0..1.
    """
    columns, device = weight.shape[1], weight.device
    order = order.to(device)
    place = torch.empty_like(order)
    place[order] = torch.arange(columns - 1, -1, -1, device=device)
    matrix = torch.empty(columns, columns, dtype=torch.float64, device=device).mT  # stored by columns
    for start, end, panel in moments.symmetric():
        values, down, across = panel.to(device).double(), place[:end].unsqueeze(1), place[start:end].unsqueeze(0)
        matrix[down, across] = values
        matrix[across, down] = values
    matrix.diagonal().add_(moments.damping(damping))
    spans = list(itertools.pairwise(itertools.accumulate(groups, initial=0)))
    hessian, factor = kept(columns**2, moments.folder), kept(columns**2, moments.folder)
    for start, end in spans:
        hessian.append(matrix[:, columns - end : columns - start].T.float().flip(0, 1).contiguous())
    cholesky_(matrix)
    targets = kept(weight.numel(), moments.folder)
    for rows in stretches(*weight.shape):
        targets.append(_target(weight[rows], moments, order, place, matrix, correction))
    invert_(matrix)
    for start, end in spans:
        factor.append(matrix[columns - end : columns - start, : columns - start].float().flip(0, 1).contiguous())
    return Metric(hessian, factor), targets


def _target(weight: Tensor, moments: Moments, order: Tensor, place: Tensor, lower: Tensor, correction: float) -> Tensor:
    """W* [K, n] of some rows, columns in order; `lower`: L, in which column c is at `place[c]`."""
    target = weight[:, order].T.contiguous()
    if not correction:
        return target
    for rows in row_chunks(len(weight), weight.shape[1], budget=PIECE):
        wide = weight[rows].double()
        change = torch.empty_like(wide)
        for (start, end), panel in zip(moments.spans(), moments.drift, strict=True):
            change[:, place[start:end]] = wide @ panel.to(wide.device).double()
        solved = change.T  # stored by columns, so that it is solved in place
        torch.linalg.solve_triangular(lower, solved, upper=False, out=solved)
        torch.linalg.solve_triangular(lower.mT, solved, upper=True, out=solved)
        target[:, rows] += correction * solved.flip(0).float()
    return target
