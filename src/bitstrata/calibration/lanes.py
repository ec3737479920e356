"""In which order sums over windows are made, so that who computes them leaves no trace in the result.

Windows fall into LANES fixed stretches. The sum of a lane is made in the order of its windows, a batch at a time, and
the lanes' sums are added by a fixed tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). A process that has whole lanes
therefore makes the same sums whatever others do. Batches never reach from one lane into the next.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

LANES = 8


def lanes(windows: int, batch: int) -> list[list[slice]]:
    """For each lane the batches of its windows, at most `batch` windows each, in order."""
    ends = [windows * lane // LANES for lane in range(LANES + 1)]
    return [
        [slice(at, min(at + batch, end)) for at in range(start, end, batch)] for start, end in itertools.pairwise(ends)
    ]


def batches(windows: int, batch: int) -> list[slice]:
    """Those of all lanes, in order."""
    return [rows for lane in lanes(windows, batch) for rows in lane]


class LaneSum:
    """A sum of equally shaped tensors over lanes; at most 1 + log2(LANES) of them are held.

    `current` is the lane's own, to add to in place; `end_lane` after each lane, also an empty one.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._done: list[tuple[int, Tensor]] = []  # sums of 2^level lanes, levels descending
        self._fresh: Tensor | None = None

    @property
    def current(self) -> Tensor:
        if self._fresh is None:
            self._fresh = torch.zeros(self._shape, device=self._device)
        return self._fresh

    def end_lane(self) -> None:
        level, total = 0, self.current
        self._fresh = None
        while self._done and self._done[-1][0] == level:
            total = self._done.pop()[1].add_(total)
            level += 1
        self._done.append((level, total))

    def result(self) -> Tensor:
        """The sum of all lanes; each has ended."""
        ((_, total),) = self._done
        return total
