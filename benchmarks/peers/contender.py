"""What is compared: products y = x W^T of one shape, each with its own quantization of a random W.

A contender holds several matrices of its kind, equal in value and apart in memory: one of them used again and again
comes from cache, all of them in turn come from memory if they are together larger than the last cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitstrata.errors import CheckError

ERROR_LIMIT = 0.03  # relative RMS; int8 activations make about one percent
SAME_LIMIT = 1e-4  # between equal matrices: only the order of sums may differ
ROWS_AT_ONCE = 1024  # of a weight decoded to float64


@dataclass(frozen=True)
class Problem:
    """x [rows, K], W [N, K] float32.

    memory_bytes: how much the matrices of a contender hold together, at least; 0 for a single matrix. skipped: where
    peers say which of their products they leave out, and why.
    """

    x: Tensor
    weight: Tensor
    group_size: int
    memory_bytes: int
    threads: int
    seed: int = 0
    skipped: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def copies(self, matrix_bytes: int) -> int:
        """How many matrices a contender needs."""
        return max(2, -(-self.memory_bytes // matrix_bytes)) if self.memory_bytes else 1


@dataclass(frozen=True)
class Contender:
    """One library's product at one precision.

    bytes: of a matrix with its scales, all of which a product reads. inputs: x as the library gets it, rounded to its
    dtype. calls[i]: one product with matrix i. result(i): the same, and y [rows, N]. decoded(first, last): rows of the
    weight as its stored form means them, float64 [last - first, K]. bits: which of our precisions it is compared to.
    """

    peer: str
    name: str
    activations: str
    bytes: int
    inputs: Tensor
    calls: list[Callable[[], object]]
    result: Callable[[int], Tensor]
    decoded: Callable[[int, int], Tensor]
    bits: int | None = None


def check(contender: Contender, out_features: int) -> float:
    """The relative RMS error of y against float64 on the decoded weight. Raises CheckError if it is too large.

    Every other matrix has to give what the first one does.
    """
    y = contender.result(0).double()
    x = contender.inputs.double()
    expected = torch.cat(
        [
            x @ contender.decoded(first, min(first + ROWS_AT_ONCE, out_features)).T
            for first in range(0, out_features, ROWS_AT_ONCE)
        ],
        dim=1,
    )
    error = float((y - expected).norm() / expected.norm())
    if not error <= ERROR_LIMIT:
        raise CheckError(
            f"{contender.name}: relative error {error:.2g} against its own decoded weight, allowed {ERROR_LIMIT}",
            hint="it is not measured: a speed of wrong results means nothing",
        )
    for index in range(1, len(contender.calls)):
        other = contender.result(index).double()
        difference = float((other - y).norm() / y.norm())
        if not difference <= SAME_LIMIT:
            raise CheckError(f"{contender.name}: matrix {index} gives another result than its twin ({difference:.2g})")
    return error
