"""`waterfill`: BAQ's closed form (arXiv 2506.05664) with measured slopes.

What unit u costs at r bits is modelled as c_u 2^(-theta_u r), c and theta fitted to its measured single costs.
With b_u bytes a bit, the least sum for a number of bytes has, for one price lambda,

    r_u = log2( c_u theta_u ln 2 / (lambda b_u) ) / theta_u,

clamped to the bits there are; lambda is found by bisection. Then every unit is rounded down and the bytes
that are left go, as measured, where they save most. No search, no evaluations: seconds for any model.
"""

from __future__ import annotations

import numpy as np

from .problem import Array, Problem

LEAST_SLOPE = 0.1  # of a unit whose loss hardly depends on its bits


def solve(problem: Problem) -> Array:
    """The rounded closed form, within the limit."""
    lowest, highest = problem.lowest, problem.highest
    slope, height = np.full(len(lowest), LEAST_SLOPE), np.full(len(lowest), -np.inf)  # theta and log2 c
    for u, (first, last) in enumerate(zip(lowest, highest, strict=True)):
        at = np.arange(first, last + 1)[problem.single[first : last + 1] > 0]
        if len(at) > 1:
            fitted, height[u] = np.polyfit(problem.bits[at], np.log2(problem.single[at]), 1)
            slope[u] = max(-fitted, LEAST_SLOPE)
        elif len(at):
            slope[u] = 2.0  # the theory's
            height[u] = np.log2(problem.single[at[0]]) + slope[u] * problem.bits[at[0]]
    span = np.maximum(problem.bits[highest] - problem.bits[lowest], 1)
    a_bit = np.maximum(problem.bytes[highest] - problem.bytes[lowest], 1) / span

    def rounded(price: float) -> Array:
        """The closed form at log2 lambda, rounded down to choices."""
        rate = (height + np.log2(slope * np.log(2) / a_bit) - price) / slope
        fits = problem.bits <= np.maximum(rate, problem.bits[lowest])[problem.unit]
        return lowest + np.bincount(problem.unit, fits, len(lowest)).astype(np.int64) - 1

    dear, cheap = 200.0, -400.0
    for _ in range(80):
        middle = (dear + cheap) / 2
        dear, cheap = (middle, cheap) if problem.size(rounded(middle)) <= problem.limit else (dear, middle)
    return fill_single(problem, rounded(dear))


def fill_single(problem: Problem, x: Array) -> Array:
    """The allocation raised as far as bytes reach, by what single layers save for their bytes."""
    x = x.copy()
    while True:
        own = x[problem.unit]
        size = problem.bytes - problem.bytes[own]
        saved = problem.single[own] - problem.single
        possible = (size > 0) & (size <= problem.limit - problem.size(x)) & (saved > 0)
        if not possible.any():
            return x
        best = int(np.where(possible, saved / np.maximum(size, 1), -np.inf).argmax())
        x[problem.unit[best]] = best
