"""How long torch's threads spin for more work, on the cores on which our kernels compute next.

torch's operations on a CPU run on OpenMP's threads, our products on a team of their own. GNU's OpenMP threads spin for
milliseconds after each loop, and a step goes from the ones to the others and back in each layer. Spinning for a tenth
of a millisecond still bridges the operations between two products, and leaves them the cores (docs/log.md).
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
SHORT = "10000"  # rounds; the library's own number is 300,000


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """In processes that will be started from here, unless somebody has said how their threads wait."""
    if SPIN not in environment and POLICY not in environment:
        environment[SPIN] = SHORT
