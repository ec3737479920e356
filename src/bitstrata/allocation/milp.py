"""`milp`: the multiple-choice knapsack, solved exactly by HiGHS.

    minimise  sum_j cost_j x_j    so that  one choice of each unit,  sum_j bytes_j x_j <= limit,   x_j in {0, 1}

cost_j is what the choice costs while all other layers are at the base (AdaQuant's integer program, arXiv
2006.10518). Exact for the sum; how layers interact it cannot see, which `paired` then mends.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..errors import CheckError
from .problem import Array, Problem

GAP = 1e-6  # of the best sum of costs, in parts of it: closer than costs are measured


def solve(problem: Problem) -> Array:
    """The allocation with the least sum of single costs within the limit."""
    limit = problem.limit
    while True:  # HiGHS keeps constraints to a relative tolerance; bytes are kept exactly
        chosen = _knapsack(problem, limit)
        excess = problem.size(chosen) - problem.limit
        if excess <= 0:
            return chosen
        limit -= excess


def _knapsack(problem: Problem, limit: int) -> Array:
    count = len(problem.unit)
    one_each = csr_array((np.ones(count), (problem.unit, np.arange(count))), shape=(len(problem.units), count))
    unit_of_bytes = int(np.gcd.reduce(problem.bytes))
    with stdout_to_stderr():
        result = milp(
            problem.single / max(float(problem.single.max()), 1e-30),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(problem.bytes[None] / unit_of_bytes), -np.inf, limit // unit_of_bytes),
            ],
            options={"mip_rel_gap": GAP},
        )
    if result.x is None:
        raise CheckError(f"HiGHS found no allocation: {result.message}")
    chosen: Array = problem.lowest + np.array([part.argmax() for part in np.split(result.x, problem.lowest[1:])])
    return chosen


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what C code prints to stderr: HiGHS leaves a debugging line now and then, and stdout is for results."""
    if os.name != "posix":
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C's own buffer, while it still goes to stderr
        os.dup2(kept, 1)
        os.close(kept)
