"""Which kernel a weight is packed for, and why.

A kernel declares a name, a priority and `can_run`, which returns None or the reason why not. The one with the highest
priority that can run is taken; those with a negative priority only run when they are forced. `BITSTRATA_KERNEL=<name>`
forces one and is an error if that one cannot run: a forced kernel is never replaced silently.

All of this is asked when a weight is packed (weight.py), never when it is multiplied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import KernelError

ENVIRONMENT = "BITSTRATA_KERNEL"


@dataclass(frozen=True)
class Kernel:
    """One machine's implementation of the operation.

    Args:
        layout: of the weights that it reads.
        activations: "exact", or "int8" if they are quantized; the kernel then states its own error bound.
        steady_rows: calls of up to so many rows compute in `activations`, longer ones exactly and in another order of
            sums, so that a row's result depends on which side its call falls; None if it never does. Whoever batches
            the rows of several users must heed it.
        steady_dtypes: of activations for which that holds; None for all. The others never do.
        runs: (device type, dtype of activations, forced) -> None if it can run there, else the reason in one clause.
        forced: somebody asked for this one by name.
    """

    name: str
    layout: str
    priority: int
    activations: str
    steady_rows: int | None
    runs: Callable[[str, torch.dtype, bool], str | None] = field(repr=False)
    forced: bool = False
    steady_dtypes: frozenset[torch.dtype] | None = None

    def steady(self, dtype: torch.dtype) -> int | None:
        """`steady_rows` for activations of `dtype`."""
        return self.steady_rows if self.steady_dtypes is None or dtype in self.steady_dtypes else None

    def arithmetic(self, rows: int, dtype: torch.dtype = torch.float32) -> str:
        """What a call of so many rows of `dtype` makes of the activations: "exact", or "int8"."""
        limit = self.steady(dtype)
        return "exact" if limit is not None and rows > limit else self.activations

    def can_run(self, device: str, dtype: torch.dtype) -> str | None:
        """None if it can run with tensors on a device of this type and such activations, else the reason."""
        return self.runs(device, dtype, self.forced)


@dataclass(frozen=True)
class KernelReport:
    """One line of `bitstrata env`: a kernel and the reason why it cannot run (None if it can)."""

    name: str
    priority: int
    reason: str | None


_KERNELS: dict[str, Kernel] = {}
LACKING: dict[str, str] = {}  # device type -> why it has no kernels but the reference


def register(kernel: Kernel) -> None:
    """Add a kernel; names are unique."""
    if kernel.name in _KERNELS:
        raise ValueError(f"kernel {kernel.name!r} is registered twice")
    _KERNELS[kernel.name] = kernel


def _best_first() -> list[Kernel]:
    return sorted(_KERNELS.values(), key=lambda kernel: -kernel.priority)


def describe(device: str, dtype: torch.dtype) -> Sequence[KernelReport]:
    """Every kernel, best first, with the reason why it cannot run there."""
    forced = os.environ.get(ENVIRONMENT)
    kernels = [replace(kernel, forced=kernel.name == forced) for kernel in _best_first()]
    return [KernelReport(kernel.name, kernel.priority, kernel.can_run(device, dtype)) for kernel in kernels]


def select(device: str, dtype: torch.dtype, name: str | None = None) -> Kernel:
    """The kernel for tensors on a device of this type and activations of `dtype`.

    Args:
        name: of one that is forced; that in BITSTRATA_KERNEL by default.

    Raises KernelError if no kernel can run, or not the forced one.
    """
    said = f"kernel {name}" if name else f"{ENVIRONMENT}={os.environ.get(ENVIRONMENT)}"
    name = name or os.environ.get(ENVIRONMENT)
    if name:
        if name not in _KERNELS:
            raise KernelError(f"{said} is not a kernel", hint=f"kernels: {', '.join(sorted(_KERNELS))}")
        kernel = replace(_KERNELS[name], forced=True)
        if (reason := kernel.can_run(device, dtype)) is not None:
            hint = f"unset {ENVIRONMENT} to let bitstrata choose"
            raise KernelError(f"{said} cannot run here: {reason}", hint=hint)
        return kernel
    for kernel in _best_first():
        if kernel.priority >= 0 and kernel.can_run(device, dtype) is None:
            return kernel
    raise KernelError(f"no kernel can run on {device} with activations in {dtype}")


def reference(dtype: torch.dtype) -> Kernel:
    """The kernel that runs where a layout's own cannot read activations of `dtype`; KernelError if it cannot either."""
    kernel = _KERNELS["reference"]
    if (reason := kernel.can_run("cpu", dtype)) is not None:
        raise KernelError(f"no kernel can run: {reason}")
    return kernel


def of_layout(layout: str, name: str, device: str) -> Kernel:
    """The kernel called `name` if it can run here, else the best that reads weights in `layout`: of recorded graphs.

    Raises KernelError if there is none.
    """
    named = [replace(kernel, forced=True) for kernel in _KERNELS.values() if kernel.name == name]
    for kernel in (*named, *_best_first()):
        if kernel.layout == layout and kernel.can_run(device, torch.float32) is None:
            return kernel
    raise KernelError(f"no kernel here reads weights in the layout {layout!r} on {device}")


def in_arithmetic(kernel: Kernel, arithmetic: str, rows: int, dtype: torch.dtype = torch.float32) -> Kernel:
    """`kernel` if it computes so many rows in this arithmetic, else its variant that does.

    Raises KernelError if there is none, or `kernel` was forced.
    """
    if kernel.arithmetic(rows, dtype) == arithmetic:
        return kernel
    if kernel.forced:
        raise KernelError(
            f"{ENVIRONMENT}={kernel.name} computes {rows} rows in {kernel.arithmetic(rows, dtype)} arithmetic, "
            f"not in {arithmetic}",
            hint=f"unset {ENVIRONMENT}",
        )
    variant = _KERNELS.get(f"{kernel.name}-{arithmetic}")
    if variant is None:
        raise KernelError(
            f"no kernel computes in {arithmetic} arithmetic here: {kernel.name} runs, which is {kernel.activations}",
            hint="`bitstrata env` lists the kernels, and why others cannot run",
        )
    return variant
