"""Sums over windows are made in one order, whoever makes which lanes."""

from __future__ import annotations

import pytest
import torch

from bitstrata.calibration.lanes import LANES, LaneSum, batches, lanes


@pytest.mark.parametrize("windows", [1, 7, 8, 9, 64, 127])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_lanes_are_all_windows_in_order(windows: int, batch: int) -> None:
    found = lanes(windows, batch)
    assert len(found) == LANES
    rows = [row for lane in found for part in lane for row in range(windows)[part]]
    assert rows == list(range(windows))
    assert all(part.stop - part.start <= batch for lane in found for part in lane)
    sizes = [sum(part.stop - part.start for part in lane) for lane in found]
    assert max(sizes) - min(sizes) <= 1
    assert batches(windows, batch) == [part for lane in found for part in lane]


def summed(parts: torch.Tensor) -> torch.Tensor:
    total = LaneSum(tuple(parts.shape[1:]), torch.device("cpu"))
    for part in parts:
        total.current.add_(part)
        total.end_lane()
    return total.result()


def test_the_sum_is_that_of_the_tree(seed: int) -> None:
    parts = torch.randn(LANES, 5, 6, generator=torch.Generator().manual_seed(seed)) * 1e3
    a, b, c, d, e, f, g, h = parts
    assert torch.equal(summed(parts), ((a + b) + (c + d)) + ((e + f) + (g + h)))
    halves = summed(parts[:4]) + summed(parts[4:])  # as two processes would make them
    assert torch.equal(summed(parts), halves)


def test_an_empty_lane_adds_nothing(seed: int) -> None:
    parts = torch.randn(LANES, 4, generator=torch.Generator().manual_seed(seed))
    parts[3] = 0
    total = LaneSum((4,), torch.device("cpu"))
    for number, part in enumerate(parts):
        if number != 3:
            total.current.add_(part)
        total.end_lane()
    assert torch.equal(total.result(), summed(parts))
