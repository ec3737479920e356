"""`greedy`: what saves most for its bytes goes first, then batches of moves are tried on the true loss.

The first stage walks from everything at its lowest bits upward, always raising the unit whose next bits save
most predicted loss for their bytes, and from everything at its highest downward, always lowering the
unit whose bits cost least; the better of the two is taken. (Going up alone can stall: where layers were
quantized for each other's errors, no single one gains by itself.)

The second is ScaleBITS's (arXiv 2602.17698): the best share of the units goes up one step and as many
of the worst go down as pay for it, all at once. If the true loss falls that is the new allocation, else
the share is halved, until it is less than one unit. ScaleBITS ranks by gradients at the quantized point;
here the sketches give the change at the current allocation, so nothing is differentiated.
"""

from __future__ import annotations

import numpy as np

from .problem import Array, Problem

SHARE = 0.25  # of the units, that move in the first batch
ROUNDS = 32


def solve(problem: Problem) -> Array:
    """The greedy allocation, refined by batches if the true loss can be measured."""
    return _batches(problem, min(climb(problem), problem.fill(slide(problem)), key=problem.loss))


def climb(problem: Problem) -> Array:
    """From the lowest up, as far as bytes reach, by the most loss saved for a byte; bits may be skipped."""
    return problem.fill(problem.lowest)


def slide(problem: Problem) -> Array:
    """From the highest down until it fits, by the least loss added for a byte; bits may be skipped."""
    x = problem.highest.copy()
    while problem.size(x) > problem.limit:
        loss, size = problem.changes(x)
        best = int(np.where(size < 0, loss / np.maximum(-size, 1), np.inf).argmin())
        x[problem.unit[best]] = best
    return x


def _batches(problem: Problem, x: Array) -> Array:
    if problem.true_loss is None:
        return x
    best, share = problem.true_loss(problem.plan(x)), SHARE
    for _ in range(ROUNDS):
        count = int(share * len(problem.units))
        if count < 1:
            break
        other = _moved(problem, x, count)
        measured = problem.true_loss(problem.plan(other)) if (other != x).any() else np.inf
        if measured < best:
            x, best = other, measured
        else:
            share /= 2
    return x


def _moved(problem: Problem, x: Array, count: int) -> Array:
    """Up to `count` units a step up, and the units whose bits are worth least down until it fits."""
    loss, size = problem.changes(x)
    up, down = np.minimum(x + 1, problem.highest), np.maximum(x - 1, problem.lowest)
    saved = np.where(up > x, -loss[up] / np.maximum(size[up], 1), -np.inf)
    price = np.where(down < x, loss[down] / np.maximum(-size[down], 1), np.inf)
    other = x.copy()
    raised = saved.argsort()[::-1][:count]
    raised = raised[saved[raised] > 0]
    other[raised] = up[raised]
    for unit in price.argsort():
        if problem.size(other) <= problem.limit:
            return problem.fill(other)
        if other[unit] == x[unit] and np.isfinite(price[unit]):
            other[unit] = down[unit]
    return x if problem.size(other) > problem.limit else problem.fill(other)
