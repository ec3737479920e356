"""Which kernel runs, and why.

A kernel declares a name, a priority and `can_run(problem)`, which returns None or the reason why
not. The one with the highest priority that can run is taken. `BITSTRATA_KERNEL=<name>` forces one
and is an error if that one cannot run: a forced kernel is never replaced silently.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import KernelError
from ..planes.weights import PlaneWeight

ENVIRONMENT = "BITSTRATA_KERNEL"


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked to do: device type, activation dtype, rows and the decoder's kind."""

    device: str
    dtype: torch.dtype
    rows: int
    decoder: str


class Kernel(Protocol):
    """A machine's implementation of the operation."""

    name: str
    priority: int

    def can_run(self, problem: Problem) -> str | None:
        """None if it can run `problem`, else the reason in one clause."""
        ...

    def linear(self, x: Tensor, weight: PlaneWeight, bits: int) -> Tensor:
        """x [rows, K] -> [rows, N] in x's dtype, every row at `bits`."""
        ...

    def linear_rows(self, x: Tensor, weight: PlaneWeight, row_bits: Tensor) -> Tensor:
        """x [rows, K] -> [rows, N], row r at row_bits[r] (int8 [rows], all of them supported)."""
        ...


@dataclass(frozen=True)
class KernelReport:
    """One line of `bitstrata env`: a kernel and the reason why it cannot run (None if it can)."""

    name: str
    priority: int
    reason: str | None


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Add a kernel; names are unique."""
    if kernel.name in _KERNELS:
        raise ValueError(f"kernel {kernel.name!r} is registered twice")
    _KERNELS[kernel.name] = kernel


def describe(problem: Problem) -> Sequence[KernelReport]:
    """Every kernel, best first, with the reason why it cannot run `problem`."""
    ordered = sorted(_KERNELS.values(), key=lambda kernel: -kernel.priority)
    return [KernelReport(kernel.name, kernel.priority, kernel.can_run(problem)) for kernel in ordered]


def select(problem: Problem) -> Kernel:
    """The kernel for `problem`. Raises KernelError if none, or not the forced one, can run it."""
    forced = os.environ.get(ENVIRONMENT)
    if forced:
        if forced not in _KERNELS:
            raise KernelError(f"{ENVIRONMENT}={forced} is not a kernel", hint=f"kernels: {', '.join(sorted(_KERNELS))}")
        reason = _KERNELS[forced].can_run(problem)
        if reason is not None:
            raise KernelError(
                f"{ENVIRONMENT}={forced} cannot run here: {reason}", hint=f"unset {ENVIRONMENT} to let bitstrata choose"
            )
        return _KERNELS[forced]
    for report in describe(problem):
        if report.reason is None:
            return _KERNELS[report.name]
    raise KernelError(f"no kernel can run {problem}")
