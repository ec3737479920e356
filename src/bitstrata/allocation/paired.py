"""`paired`: budget-neutral refinement. One unit goes up while another goes down, while that helps.

SliM-LLM (arXiv 2405.14917) pairs groups inside one matrix; here whole layers are paired, because a layer's
rows share one number of planes in the format. Starts: the exact knapsack, the greedy walks and the
uniform plans that fit. Each is improved by the best single or double move of the predicted loss, interactions between
layers counted, until none is left. The last word has the true loss, if it can be measured: it chooses
among the results and tries the next most promising moves.
"""

from __future__ import annotations

import numpy as np

from . import greedy, milp
from .problem import Array, Problem

NEAR = 256  # choices that double moves are made of: the best for their bytes
LEAST_GAIN = 1e-5  # of the loss: smaller ones are below what was measured
BEST = 3  # predictions compared on the true loss
TRIALS = 16  # moves tried on the true loss after the last one that helped
MOST_TRIALS = 48  # in all


def solve(problem: Problem) -> Array:
    """The best allocation found, within the limit."""
    starts = [milp.solve(problem), greedy.climb(problem), greedy.slide(problem), *uniform_starts(problem)]
    found = {tuple(x): x for x in (descend(problem, start) for start in starts)}
    ranked = sorted(found.values(), key=problem.loss)
    if problem.true_loss is None:
        return ranked[0]
    candidates = [*ranked[:BEST], starts[-1]]  # the uniform plan itself too: never worse than that
    loss, number = min((problem.true_loss(problem.plan(x)), number) for number, x in enumerate(candidates))
    return polish(problem, candidates[number], loss)


def uniform_starts(problem: Problem) -> list[Array]:
    """Everything at its lowest, and the largest uniform allocation that fits."""
    starts = [problem.lowest]
    for bits in sorted(set(problem.bits.tolist())):
        at_most = np.bincount(problem.unit, problem.bits <= bits, len(problem.units)).astype(np.int64)
        x = problem.lowest + np.maximum(at_most, 1) - 1
        if problem.size(x) <= problem.limit:
            starts.append(x)
    return [starts[0], starts[-1]]


def descend(problem: Problem, x: Array) -> Array:
    """`x` after the best moves of one or two units, until none lowers the predicted loss."""
    x, row, loss = x.copy(), problem.products[:, x].sum(1), problem.loss(x)
    while True:
        move, change = next(iter(moves(problem, x, 1, row)), ((), 0.0))
        if change >= -LEAST_GAIN * max(loss, 1e-12):
            return x
        loss += change
        for choice in move:
            row += problem.products[choice] - problem.products[x[problem.unit[choice]]]  # Q is symmetric
            x[problem.unit[choice]] = choice


def moves(problem: Problem, x: Array, count: int, row: Array | None = None) -> list[tuple[tuple[int, ...], float]]:
    """The `count` best moves of one or two units that fit: (choices, change of the predicted loss), best first."""
    loss, size = problem.changes(x, row)
    room = problem.limit - problem.size(x)
    own = x[problem.unit] == np.arange(len(loss))
    alone = np.flatnonzero((size <= room) & ~own)
    found: list[tuple[tuple[int, ...], float]] = [
        ((int(j),), float(loss[j])) for j in alone[loss[alone].argsort()[:count]]
    ]
    near = _near(problem, loss, size, own)
    if len(near) < 2:
        return found
    both = loss[near][:, None] + loss[near][None] + problem.pair_changes(x, near)
    same = problem.unit[near][:, None] == problem.unit[near][None]
    both[same | (size[near][:, None] + size[near][None] > room)] = np.inf
    both[np.tril_indices(len(near))] = np.inf
    best = np.argpartition(both, min(count, both.size - 1), axis=None)[:count]
    rows, columns = np.unravel_index(best, both.shape)
    found += [
        ((int(near[i]), int(near[j])), float(both[i, j]))
        for i, j in zip(rows, columns, strict=True)
        if np.isfinite(both[i, j])
    ]
    return sorted(found, key=lambda move: move[1])[:count]


def _near(problem: Problem, loss: Array, size: Array, own: Array) -> Array:
    """The most promising choices: ups that save most for a byte, downs that cost least for one."""
    worth = loss / np.maximum(np.abs(size), 1)
    chosen = []
    for side in (size > 0, size <= 0):
        index = np.flatnonzero(side & ~own)
        chosen.append(index[worth[index].argsort()[: NEAR // 2]])
    return np.concatenate(chosen)


def apply(problem: Problem, x: Array, move: tuple[int, ...]) -> Array:
    """The allocation after a move."""
    x = x.copy()
    for choice in move:
        x[problem.unit[choice]] = choice
    return x


def polish(problem: Problem, x: Array, loss: float) -> Array:
    """`x` after the moves that lower the true loss, tried in the order of their promise."""
    assert problem.true_loss is not None
    tried = {tuple(x)}
    while True:
        for move, _ in moves(problem, x, TRIALS):
            other = apply(problem, x, move)
            if tuple(other) in tried:
                continue
            if len(tried) > MOST_TRIALS:
                return x
            tried.add(tuple(other))
            measured = problem.true_loss(problem.plan(other))
            if measured < loss:
                x, loss = other, measured
                break
        else:
            return x
