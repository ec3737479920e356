"""H and D of what a linear reads at one precision, summed batch by batch (solvers/moments.py says what they are for).

Summed are H = X_p^T X_p, of which nothing below the diagonal is needed, and the drift D = (X - X_p)^T X_p; C = H + D. A
product in bf16 rounds the small numbers of D, not their difference from H.

Wide ones are summed a panel of columns at a time, and the inputs are read again for each: memory holds a panel of H and
one of D, as often as a sum over lanes needs it (calibration/lanes.py). Sums do not depend on panels but by the rounding
of a matrix product, and panels depend on the width alone.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.lanes import EVERYTHING, LANES, LaneSum, Share
from ..kernels.cpu import add_gram
from ..scratch import IN_MEMORY, kept
from ..solvers import Moments

PANEL = 384  # columns of H computed at a time
SUMMED = 1 << 26  # numbers of H and D summed at a time
KEPT = 1 << 23  # numbers of each that are read from a file at a time


def panels(columns: int) -> list[tuple[int, int]]:
    """First and last column, which is not in it, of each panel that is summed at a time."""
    ends = [0]
    while (start := ends[-1]) < columns:
        # a panel of D has K rows, one of H as many as its last column says
        width = int(((columns + start) ** 2 + 4 * SUMMED) ** 0.5 - (columns + start)) // 2
        ends.append(min(columns, start + max(1, width)))
    return list(itertools.pairwise(ends))


def summing_bytes(columns: int) -> int:
    """The most that a panel's sums take in memory."""
    return max(4 * (1 + int(math.log2(LANES))) * (columns + end) * (end - start) for start, end in panels(columns))


class MomentSums:
    """Sums over the batches of lanes: for each of `panels`, `add` each batch, `end_lane` after each lane, `end_panel`.

    On a CPU with instructions for it, products of bf16 are summed in fp32 in native code.

    Args:
        columns: K.
        folder: for the file of sums that are large; None for the system's own place.
        share: which lanes these are; the result is that of all.
    """

    def __init__(
        self, columns: int, device: torch.device, folder: Path | None = None, share: Share = EVERYTHING
    ) -> None:
        self.columns, self.panels, self._device, self._folder = columns, panels(columns), device, folder
        self._share = share
        self._upper, self._drift = kept(columns**2, folder), kept(columns**2, folder)
        self._ends: list[int] = []
        self._left = iter(self.panels)
        self._begin(*next(self._left))

    def _begin(self, start: int, end: int) -> None:
        self._span, self._tokens = (start, end), 0
        self._hessian = LaneSum((end, end - start), self._device, self._share)
        self._apart = LaneSum((self.columns, end - start), self._device, self._share)

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Inputs [n, K] of the original and of the quantized chain, in the dtype of the products."""
        start, end = self._span
        hessian, drift = self._hessian.current, self._apart.current
        apart, mine = original - quantized, quantized[:, start:end]
        if add_gram(drift, apart, mine):
            if start:
                add_gram(hessian[:start], quantized[:, :start], mine)
            add_gram(hessian[start:], mine, mine, upper=True)
        else:  # all sums in fp32: of products rounded to bf16, H would no longer be positive
            one = quantized[:, :end].float()
            drift.addmm_(apart.float().T, one[:, start:])
            for at in range(start, end, PANEL):
                to = min(at + PANEL, end)
                hessian[:to, at - start : to - start].addmm_(one[:, :to].T, one[:, at:to])
        self._tokens += len(original)

    def end_lane(self) -> None:
        self._hessian.end_lane()
        self._apart.end_lane()

    def end_panel(self) -> None:
        """All lanes of a panel have ended: keep it, and begin the next one, if there is one."""
        (start, end), count = self._span, self._share.counted(self._tokens)
        self._tokens = count
        hessian, drift = self._hessian.result().div_(count), self._apart.result().div_(count)
        width = self.columns if self.columns**2 <= IN_MEMORY else max(1, KEPT // self.columns)
        for at in range(start, end, width):
            to = min(at + width, end)
            self._upper.append(hessian[:to, at - start : to - start])
            self._drift.append(drift[:, at - start : to - start])
            self._ends.append(to)
        following = next(self._left, None)
        if following is not None:
            del hessian, drift
            self._begin(*following)

    def result(self) -> Moments:
        """Both over the number of tokens, once all panels have ended."""
        return Moments(self._ends, self._upper, self._drift, self._tokens, self._folder)
