"""The universal order of pages: one sequence whose every prefix is a good plan.

A greedy order goes wrong where layers only gain together. So plans are solved for at a series of
budgets from the largest down, each within the bits of the one above it, which makes them nested; between
neighbours the order is what saves most predicted loss for its bytes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..checkpoint import CheckpointReader, Fingerprint
from ..plans import ModelSizes, Page, PageOrder
from . import paired
from .problem import Array, Problem
from .sensitivity import Sensitivity

STONES = 24  # budgets that are solved for, in equal ratios


def page_order(found: Sensitivity, reader: CheckpointReader, sizes: ModelSizes, *, together: bool = False) -> PageOrder:
    """The order of pages of a checkpoint, from its smallest plan to its largest.

    Args:
        together: a page raises all layers that share a kernel call.

    Raises PlanError if no such order leads from the smallest plan to the largest.
    """
    problem = Problem.build(found, sizes, sizes.of_plan(sizes.largest).weights, together=together)
    x, pages = problem.lowest, []
    for stone in _stones(problem):
        while (x < stone).any():
            choice = _next(problem, x, stone)
            unit = problem.unit[choice]
            raised = x.copy()
            raised[unit] = choice
            pages.append(
                Page(
                    layers=list(problem.units[unit]),
                    from_bits=int(problem.bits[x[unit]]),
                    to_bits=int(problem.bits[choice]),
                    bytes=problem.size(raised) - problem.size(x),
                    saving=found.corrected(problem.loss(x)) - found.corrected(problem.loss(raised)),
                )
            )
            x = raised
    order = PageOrder(pages, Fingerprint.of(reader), {"divergence_from": found.target})
    order.check(reader, sizes)
    return order


def _stones(problem: Problem) -> list[Array]:
    """Nested allocations from above the lowest to the highest."""
    sizes = np.geomspace(problem.size(problem.lowest), problem.size(problem.highest), STONES + 2)
    stones = [problem.highest]
    for limit in sizes[-2:0:-1]:
        kept = np.flatnonzero(np.arange(len(problem.unit)) <= stones[0][problem.unit])
        smaller = replace(
            problem,
            unit=problem.unit[kept],
            bits=problem.bits[kept],
            bytes=problem.bytes[kept],
            linear=problem.linear[kept],
            products=problem.products[np.ix_(kept, kept)],
            limit=int(limit),
        )
        stones.insert(0, kept[paired.solve(smaller)])
    return stones


def _next(problem: Problem, x: Array, stone: Array) -> int:
    """The choice between `x` and `stone` that saves most for its bytes."""
    loss, size = problem.changes(x)
    possible = (size > 0) & (np.arange(len(size)) <= stone[problem.unit])
    return int(np.where(possible, loss / np.maximum(size, 1), np.inf).argmin())
