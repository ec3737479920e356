"""Small random problems that can be solved by trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np

from bitstrata.allocation import Problem


def random_problem(
    seed: int, *, units: int = 5, interacting: bool = True, gaps: bool = True, share: float = 0.4
) -> Problem:
    """`units` units with 2 to 4 choices each; the loss is a square of a sum of vectors, or a sum of squares.

    gaps: whether a unit's bits may be any, as 2 and 7; else they are 2 to 5.
    share: where between the smallest and the largest allocation the limit lies.
    """
    generator = np.random.default_rng(seed)
    unit, bits, size, vectors = [], [], [], []
    for index in range(units):
        weights = int(generator.integers(3, 40))
        direction = generator.normal(size=3)
        drawn = generator.choice(range(2, 9), size=generator.integers(2, 5), replace=False)
        chosen = drawn if gaps else range(2, 6)
        for step, value in enumerate(sorted(chosen)):
            unit.append(index)
            bits.append(int(value))
            size.append(weights * int(value) + 4 * step)
            vectors.append(direction * 2.0**-value + 0.02 * interacting * generator.normal(size=3))
    vectors = np.array(vectors)
    products = vectors @ vectors.T
    if not interacting:
        products = np.diag(np.diag(products))
    made = Problem(
        units=[(f"layer{index}",) for index in range(units)],
        unit=np.array(unit),
        bits=np.array(bits),
        bytes=np.array(size),
        constant=0.01,
        linear=0.002 * np.abs(generator.normal(size=len(unit))) if interacting else np.zeros(len(unit)),
        products=products,
        limit=0,
    )
    low, high = made.size(made.lowest), made.size(made.highest)
    return Problem(**{**vars_of(made), "limit": int(low + share * (high - low))})


def vars_of(problem: Problem) -> dict:
    return {name: getattr(problem, name) for name in Problem.__dataclass_fields__}


def all_allocations(problem: Problem):
    """Every allocation that fits."""
    choices = [np.flatnonzero(problem.unit == index) for index in range(len(problem.units))]
    for x in product(*choices):
        x = np.array(x)
        if problem.size(x) <= problem.limit:
            yield x
