"""Which kernel runs, and why.

A kernel declares a name, a priority and `can_run(problem)`, which returns None or the reason why
not. The one with the highest priority that can run is taken; those with a negative priority only
run when they are forced. `BITSTRATA_KERNEL=<name>` forces one and is an error if that one cannot
run: a forced kernel is never replaced silently.

A kernel may want weights in a layout of its own. `prepare` makes it from the stored one, once, when
a model is loaded; the kernel then gets that instead of the PlaneWeight.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import KernelError
from ..planes.pack import words_per_row
from ..planes.weights import PlaneWeight, Scales, scales_kind, scales_shapes, scales_tensors

ENVIRONMENT = "BITSTRATA_KERNEL"


class Problem(NamedTuple):
    """What a kernel is asked to do: device type, activation dtype, rows and the scales's kind."""

    device: str
    dtype: torch.dtype
    rows: int
    kind: str


class PreparedWeight(Protocol):
    """A weight in a kernel's own layout: the same bits and numbers as a PlaneWeight in another order."""

    @property
    def layout(self) -> str: ...  # its name
    @property
    def planes(self) -> tuple[Tensor, ...]: ...
    @property
    def scales(self) -> Mapping[int, Tensor]: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def kind(self) -> str: ...  # of the scales, "affine" or "codebook"
    @property
    def bits(self) -> tuple[int, ...]: ...

    def unpack(self) -> PlaneWeight:
        """The stored layout again, bit for bit."""
        ...

    def with_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> PreparedWeight:
        """A weight at `bits` alone: this one's planes 0..bits-1 as far as it has them, shared, then `planes`.

        Planes and scales come in the stored order, on the weight's device. This weight stays as it is. Raises
        ValueError if the planes are not as many as are missing, or their shapes or those of the scales do not fit.
        """
        ...


def check_pages(weight: PreparedWeight, bits: int, planes: Sequence[Tensor], scales: Scales) -> None:
    """Raise ValueError unless `weight.with_pages` can use these: kernels trust the addresses they get."""
    missing = max(0, bits - len(weight.planes))
    if len(planes) != missing:
        raise ValueError(f"{bits} bits need {missing} planes more than there are, got {len(planes)}")
    rows, columns = weight.out_features, weight.in_features
    for plane in planes:
        _check_tensor("plane", plane, {"plane": (torch.int32, (rows, words_per_row(columns)))})
    if scales.kind != scales_kind(weight.kind, bits):
        raise ValueError(f"{bits} bits of a weight with {weight.kind} scales cannot have one of {scales.kind}")
    expected = scales_shapes(weight.kind, bits, rows, columns, weight.group_size)
    for name, tensor in scales_tensors(scales, bits).items():
        _check_tensor(name, tensor, expected)


def _check_tensor(name: str, tensor: Tensor, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    dtype, shape = expected[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


class Kernel(Protocol):
    """A machine's implementation of the operation. Autograd does not see into it: run and ops are how it is called.

    layout: of prepared weights it can take; None if it has no layout of its own.
    activations: "exact", or "int8" if they are quantized; the kernel then states its own error bound.
    steady_rows: calls of up to so many rows use one arithmetic and longer ones another, so that a row's result depends
        on which side its call falls; None if it never does. Whoever batches strangers' rows must heed it.
    """

    name: str
    priority: int
    activations: str

    @property
    def steady_rows(self) -> int | None: ...
    @property
    def layout(self) -> str | None: ...

    def arithmetic(self, rows: int) -> str:
        """What a call of so many rows makes of the activations: "exact", or "int8"."""
        ...

    def can_run(self, problem: Problem) -> str | None:
        """None if it can run `problem`, else the reason in one clause."""
        ...

    def prepare(self, weight: PlaneWeight) -> PreparedWeight | None:
        """`weight`, left alone, in the kernel's layout; None if it has none."""
        ...

    def linear(self, x: Tensor, weight: PlaneWeight, bits: int) -> Tensor:
        """x [rows, K] -> [rows, N] in x's dtype, every row at `bits`."""
        ...

    def linear_rows(self, x: Tensor, weight: PlaneWeight, row_bits: Tensor) -> Tensor:
        """x [rows, K] -> [rows, N], row r at row_bits[r] (integers [rows], all of them supported)."""
        ...

    def linear_many(self, x: Tensor, weights: Sequence[Any], bits: int | Tensor) -> list[Tensor]:
        """x [rows, K] times prepared weights of equal K and groups, [rows, N_i] each; bits as above."""
        ...

    def decode(self, weight: Any, bits: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first..last-1 of the weight at `bits`: [last - first, K], as the reference decodes. `first` is a
        multiple of 16, and `last` too if it is not N. `weight` as for `lookup`.
        """
        ...

    def lookup(self, index: Tensor, weight: Any, bits: int, dtype: torch.dtype) -> Tensor:
        """Rows `index` (int64 [n], all of them in 0..N-1) of the weight at `bits`: [n, K], as the reference decodes.

        `weight` is a PlaneWeight, or a prepared one in the kernel's own layout.
        """
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
    return _select(problem, os.environ.get(ENVIRONMENT) or None, tuple(_KERNELS.values()))


def select_in(problem: Problem, arithmetic: str) -> Kernel:
    """The kernel for `problem` in this arithmetic: the ordinary one if it computes so many rows in it, else another
    that can, of the same layout if there is one.

    Raises KernelError if none can, or not the forced one.
    """
    return _select_in(problem, arithmetic, os.environ.get(ENVIRONMENT) or None, tuple(_KERNELS.values()))


@lru_cache(maxsize=256)
def _select_in(problem: Problem, arithmetic: str, forced: str | None, kernels: tuple[Kernel, ...]) -> Kernel:
    first = _select(problem, forced, kernels)
    if first.arithmetic(problem.rows) == arithmetic:
        return first
    if forced:
        raise KernelError(
            f"{ENVIRONMENT}={forced} computes {problem.rows} rows in {first.arithmetic(problem.rows)} arithmetic, "
            f"not in {arithmetic}",
            hint=f"unset {ENVIRONMENT}",
        )
    for kernel in sorted(kernels, key=lambda kernel: kernel.layout != first.layout):
        if kernel.arithmetic(problem.rows) == arithmetic and kernel.can_run(problem) is None:
            return kernel
    raise KernelError(
        f"no kernel computes in {arithmetic} arithmetic here: on {problem.device} with activations in {problem.dtype} "
        f"{first.name} runs, which is {first.arithmetic(problem.rows)}",
        hint="`bitstrata env` lists the kernels, and why others cannot run",
    )


@lru_cache(maxsize=256)
def _select(problem: Problem, forced: str | None, kernels: tuple[Kernel, ...]) -> Kernel:
    """`select` is asked at every call of every layer; what a kernel can run does not change."""
    if forced:
        named = {kernel.name: kernel for kernel in kernels}
        if forced not in named:
            raise KernelError(f"{ENVIRONMENT}={forced} is not a kernel", hint=f"kernels: {', '.join(sorted(named))}")
        reason = named[forced].can_run(problem)
        if reason is not None:
            raise KernelError(
                f"{ENVIRONMENT}={forced} cannot run here: {reason}", hint=f"unset {ENVIRONMENT} to let bitstrata choose"
            )
        return named[forced]
    for kernel in sorted(kernels, key=lambda kernel: -kernel.priority):
        if kernel.priority >= 0 and kernel.can_run(problem) is None:
            return kernel
    raise KernelError(f"no kernel can run {problem}")
