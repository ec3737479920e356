"""The reference kernel: decode the whole weight, then the platform's matrix product.

Correct on every device and dtype, and slow: it materialises [N, K] at each call. Every other
kernel is compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..planes.decode import decode
from ..planes.weights import PlaneWeight
from .registry import Problem, register


class ReferenceKernel:
    """Decode, then `torch.nn.functional.linear`."""

    name = "reference"
    priority = 0
    layout = None
    activations = "exact"
    steady_rows = None

    def arithmetic(self, rows: int) -> str:
        return "exact"

    def can_run(self, problem: Problem) -> str | None:
        return None if problem.dtype.is_floating_point else f"activations are {problem.dtype}, not floating point"

    def prepare(self, weight: PlaneWeight) -> None:
        return None

    def linear(self, x: Tensor, weight: PlaneWeight, bits: int) -> Tensor:
        return torch.nn.functional.linear(x, decode(weight, bits, x.dtype))

    def linear_rows(self, x: Tensor, weight: PlaneWeight, row_bits: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], weight.out_features)
        for bits in torch.unique(row_bits).tolist():
            chosen = row_bits == bits
            y[chosen] = self.linear(x[chosen], weight, bits)
        return y

    def linear_many(self, x: Tensor, weights: Sequence[Any], bits: int | Tensor) -> list[Tensor]:
        raise TypeError("the reference kernel has no layout of its own")

    def decode(self, weight: PlaneWeight, bits: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return decode(weight.outputs(first, last), bits, dtype)

    def lookup(self, index: Tensor, weight: PlaneWeight, bits: int, dtype: torch.dtype) -> Tensor:
        return decode(weight.take(index), bits, dtype)


REFERENCE = ReferenceKernel()
register(REFERENCE)
