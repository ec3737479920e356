"""In which order sums over windows are made, so that who computes them leaves no trace in the result.

Windows fall into LANES fixed stretches. The sum of a lane is made in the order of its windows, a batch at a time, and
the lanes' sums are added by a fixed tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). A process that has whole lanes
(`Share`) therefore makes the same sums whatever others do. Batches never reach from one lane into the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

LANES = 8

Stretch = tuple[int, int]  # lanes from the first number up to the second


class Share:
    """The lanes that a process has, and how what it finds out on them becomes that of all windows.

    As it is: all lanes, in a process that is alone. Others are in quantization/team.py.
    """

    lanes: Stretch = (0, LANES)

    def total(self, parts: Sequence[tuple[Stretch, Tensor]]) -> Tensor:
        """The sum of all lanes, from those that `merged` left of this process's own; they may be overwritten."""
        ((_, whole),) = parts
        return whole

    def counted(self, own: int) -> int:
        """The sum of a number over all processes."""
        return own


EVERYTHING = Share()


def lanes(windows: int, batch: int, share: Share = EVERYTHING) -> list[list[slice]]:
    """For each lane of `share` the batches of its windows, at most `batch` windows each, in order."""
    ends = [windows * lane // LANES for lane in range(LANES + 1)]
    first, last = share.lanes
    return [
        [slice(at, min(at + batch, end)) for at in range(start, end, batch)]
        for start, end in itertools.pairwise(ends[first : last + 1])
    ]


def batches(windows: int, batch: int, share: Share = EVERYTHING) -> list[slice]:
    """Those of all its lanes, in order."""
    return [rows for lane in lanes(windows, batch, share) for rows in lane]


def windows_of(windows: int, share: Share) -> slice:
    """Which of so many windows lie in the lanes of `share`."""
    first, last = share.lanes
    return slice(windows * first // LANES, windows * last // LANES)


def is_pair(left: Stretch, right: Stretch) -> bool:
    """Whether the tree adds these two, which follow each other."""
    length = left[1] - left[0]
    return right[1] - right[0] == length and left[0] % (2 * length) == 0


def stretches_of(lanes: Stretch) -> list[Stretch]:
    """Into which stretches the tree adds these lanes without any others."""
    found: list[Stretch] = []
    for lane in range(*lanes):
        found.append((lane, lane + 1))
        while len(found) > 1 and is_pair(*found[-2:]):
            found[-2:] = [(found[-2][0], found[-1][1])]
    return found


class LaneSum:
    """A sum of equally shaped tensors over lanes; at most 1 + log2(LANES) of them are held.

    `current` is the lane's own, to add to in place; `end_lane` after each lane of `share`, also an empty one.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, share: Share = EVERYTHING) -> None:
        self._shape, self._device, self._share = shape, device, share
        self._lane = share.lanes[0]
        self._done: list[tuple[Stretch, Tensor]] = []  # sums of stretches that the tree has
        self._fresh: Tensor | None = None

    @property
    def current(self) -> Tensor:
        if self._fresh is None:
            self._fresh = torch.zeros(self._shape, device=self._device)
        return self._fresh

    def end_lane(self) -> None:
        self._done.append(((self._lane, self._lane + 1), self.current))
        self._fresh = None
        self._lane += 1
        while len(self._done) > 1 and is_pair(self._done[-2][0], self._done[-1][0]):
            ((start, _), left), ((_, end), right) = self._done[-2:]
            self._done[-2:] = [((start, end), left.add_(right))]

    def result(self) -> Tensor:
        """The sum of all lanes; each has ended. Every process of a team asks for it, in the same order."""
        return self._share.total(self._done)
