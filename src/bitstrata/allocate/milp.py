"""`milp`: the multiple-choice knapsack, solved exactly by HiGHS.

    minimise  sum_j cost_j x_j    so that  one choice of each unit,  sum_j bytes_j x_j <= limit,   x_j in {0, 1}

cost_j is what the choice costs while all other layers are at the base (AdaQuant's integer program, arXiv
2006.10518). Exact for the sum; how layers interact it cannot see, which `paired` then mends.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..errors import CheckError
from .problem import Array, Problem


def solve(problem: Problem) -> Array:
    """The allocation with the least sum of single costs within the limit."""
    count = len(problem.unit)
    cost = problem.single / max(float(problem.single.max()), 1e-30)
    one_each = csr_array((np.ones(count), (problem.unit, np.arange(count))), shape=(len(problem.units), count))
    scale = 1 / max(float(problem.limit), 1.0)
    result = milp(
        cost,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(problem.bytes[None] * scale), -np.inf, problem.limit * scale),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    if result.x is None:
        raise CheckError(f"HiGHS found no allocation: {result.message}")
    chosen = np.array([first + result.x[first : last + 1].argmax() for first, last in _ranges(problem)])
    if problem.size(chosen) > problem.limit:  # within HiGHS's tolerance of the limit, not within the limit
        raise CheckError(f"HiGHS exceeded the limit by {problem.size(chosen) - problem.limit} bytes")
    return chosen


def _ranges(problem: Problem) -> list[tuple[int, int]]:
    return list(zip(problem.lowest, problem.highest, strict=True))
