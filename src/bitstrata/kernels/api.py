"""The operation as functions: y = x @ W_bits^T, and rows of W_bits, from stored and from prepared weights.

`prepared_linear` and the lookups go straight to the kernel when nothing but an ordinary eager call is going on, and
through the ops (ops.py) when anybody wants to see them: a model's decoding step calls them hundreds of times.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..planes.weights import PlaneWeight, scales_tensors
from . import cpu, ops, run
from .plain import is_plain
from .registry import PreparedWeight, Problem, select

INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _arguments(weight: PlaneWeight, scales_bits: Sequence[int]) -> tuple[object, ...]:
    tensors = [tensor for bits in scales_bits for tensor in scales_tensors(weight.scales[bits], bits).values()]
    return list(weight.planes[: max(scales_bits)]), tensors, weight.kind, list(scales_bits), weight.group_size


def _prepared_arguments(weight: PreparedWeight, scales_bits: Sequence[int]) -> tuple[object, ...]:
    planes, scales = list(weight.planes[: max(scales_bits)]), [weight.scales[bits] for bits in scales_bits]
    return planes, scales, list(scales_bits), weight.layout, weight.out_features, weight.group_size, weight.kind


def _check_x(x: Tensor, *weights: PlaneWeight | PreparedWeight) -> None:
    if not isinstance(x, Tensor):
        raise UsageError(f"x must be a tensor, got {type(x).__name__}")
    columns = x.shape[-1] if x.dim() else None
    for weight in weights:
        if columns != weight.in_features:
            raise UsageError(f"expected x [..., {weight.in_features}], got {list(x.shape)}")
    if x.layout != torch.strided:
        raise UsageError(f"x must be dense, got a tensor in the layout {x.layout}", hint="x.to_dense()")


def _integer(bits: Any) -> int:
    if type(bits) is int:
        return bits
    if isinstance(bits, (bool, Tensor)):
        raise UsageError(f"bits must be an int, got {bits!r}")
    try:
        return operator.index(bits)  # NumPy's integers, for one
    except TypeError:
        raise UsageError(f"bits must be an int, got {bits!r}") from None


def _checked_bits(bits: Any, weight: PlaneWeight | PreparedWeight) -> int:
    """`bits` as an int, if the weight has scales for them."""
    bits = _integer(bits)
    run.check_bits(bits, [weight])
    return bits


def _check_row_bits(row_bits: Any) -> None:
    if not isinstance(row_bits, Tensor):
        raise UsageError(f"row_bits must be an integer tensor, got {type(row_bits).__name__}")
    if row_bits.dtype not in INTEGERS:
        raise UsageError(f"row_bits must be an integer tensor, got {row_bits.dtype}")


def plane_linear(x: Tensor, weight: PlaneWeight, bits: int) -> Tensor:
    """y = x @ W_bits^T: x [..., K] -> [..., N] in x's dtype. Differentiable with respect to x, as if W were dense.

    The kernels of CPUs and GPUs re-lay the weight at every call: `prepare` it once where there are several.

    Raises UnsupportedBitsError if the weight has no scales for `bits`, UsageError if x is not a dense tensor K wide or
    `bits` not an integer.
    """
    _check_x(x, weight)
    bits = _checked_bits(bits, weight)
    y: Tensor = torch.ops.bitstrata.plane_linear(x, *_arguments(weight, [bits]), bits)
    return y


def plane_linear_rows(x: Tensor, weight: PlaneWeight, row_bits: Tensor) -> Tensor:
    """Row r of x at row_bits[r] bits: x [..., K], row_bits integer [rows] -> [..., N]. Otherwise as `plane_linear`.

    Raises UnsupportedBitsError if any row asks for bits without scales, UsageError if x is not a dense tensor K wide
    or row_bits are not integers, one entry a row.
    """
    _check_x(x, weight)
    _check_row_bits(row_bits)
    y: Tensor = torch.ops.bitstrata.plane_linear_rows(x, *_arguments(weight, weight.bits), row_bits)
    return y


def _check_lookup(index: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(index, Tensor) or index.dtype not in INTEGERS:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise UsageError(f"index must be an integer tensor, got {kind}")
    if not dtype.is_floating_point:
        raise UsageError(f"rows of a weight are floating point, not {dtype}")


def plane_lookup(index: Tensor, weight: PlaneWeight, bits: int, dtype: torch.dtype) -> Tensor:
    """Rows `index` (integers [...]) of the weight at `bits`: [..., K] in `dtype`, exactly as the reference decodes.

    Raises IndexError for an index that is not a row, UnsupportedBitsError for bits without scales, UsageError for an
    index that is not of integers and a dtype that is not floating point.
    """
    _check_lookup(index, dtype)
    bits = _checked_bits(bits, weight)
    if is_plain(index):
        ops.check_constant(scales_tensors(weight.scales[bits], bits).values())
        return run.lookup(index, weight, bits, dtype)
    arguments = _arguments(weight, [bits])
    y: Tensor = torch.ops.bitstrata.plane_lookup(index, *arguments, bits, weight.in_features, dtype)
    return y


def prepared_lookup(index: Tensor, weight: PreparedWeight, bits: int, dtype: torch.dtype) -> Tensor:
    """`plane_lookup` from a prepared weight."""
    _check_lookup(index, dtype)
    bits = _checked_bits(bits, weight)
    if is_plain(index) and index.device == weight.planes[0].device:
        return run.lookup(index, weight, bits, dtype)
    arguments = _prepared_arguments(weight, [bits])
    y: Tensor = torch.ops.bitstrata.prepared_lookup(index, *arguments, bits, weight.in_features, dtype)
    return y


def prepared_linear(x: Tensor, weights: Sequence[PreparedWeight], bits: int | Tensor) -> list[Tensor]:
    """y_i = x @ W_i^T at `bits`, or row r at bits[r]: x [..., K] -> [..., N_i] each, in x's dtype. Differentiable in x.

    The weights share K and groups. Raises as `plane_linear` and `plane_linear_rows` do.
    """
    _check_x(x, *weights)
    if isinstance(bits, Tensor):
        _check_row_bits(bits)
        if is_plain(x, bits) and x.device == weights[0].planes[0].device:
            return run.linear(x, weights, bits)
        rows = torch.ops.bitstrata.prepared_linear_rows
        return [rows(x, *_prepared_arguments(weight, weight.bits), bits) for weight in weights]
    bits = _integer(bits)
    if is_plain(x) and x.device == weights[0].planes[0].device:
        return run.linear(x, weights, bits)
    run.check_bits(bits, weights)
    uniform = torch.ops.bitstrata.prepared_linear
    return [uniform(x, *_prepared_arguments(weight, [bits]), bits) for weight in weights]


def prepare(weight: PlaneWeight, dtype: torch.dtype) -> PreparedWeight | None:
    """`weight` in the layout of the kernel that runs one row of `dtype` on its device; None to keep it as it is.

    Raises UsageError if its scales require gradients, which their copies would not have.
    """
    for bits, scales in weight.scales.items():
        ops.check_constant(scales_tensors(scales, bits).values())
    device = weight.planes[0].device.type
    _warn_without_kernels(device)
    return select(Problem(device, dtype, 1, weight.kind)).prepare(weight)


def without_pages(
    kind: str, out_features: int, in_features: int, group_size: int, device: str, dtype: torch.dtype
) -> PreparedWeight | None:
    """A weight [N, K] without planes and scales, in the layout that `prepare` would choose; None for the stored one.

    Args:
        kind: of its scales; device, dtype: where it will run, and that of the activations.
    """
    _warn_without_kernels(device)
    layout = select(Problem(device, dtype, 1, kind)).layout
    if layout is None:
        return None
    return run.prepared_weight(in_features, (), (), (), layout, out_features, group_size, kind)


def _warn_without_kernels(device: str) -> None:
    if device == "cpu" and cpu.missing:
        warnings.warn(
            f"CPU kernels cannot be used: {cpu.missing}. The reference kernel is many times slower; install "
            "bitstrata again where there is a C++17 compiler (GCC or Clang).",
            stacklevel=3,
        )


@torch.no_grad()
def linear_in(arithmetic: str, x: Tensor, weight: PlaneWeight | PreparedWeight, bits: int | Tensor) -> Tensor:
    """x @ W^T at `bits`, one value or one a row, in "exact" or "int8" arithmetic whichever would run: for measuring.

    x [..., K] -> [..., N] in x's dtype, in eager mode and without a gradient. Raises KernelError if no kernel here
    computes in this arithmetic, else as `plane_linear` and `plane_linear_rows` do.
    """
    _check_x(x, weight)
    if isinstance(bits, Tensor):
        _check_row_bits(bits)
    else:
        bits = _checked_bits(bits, weight)
    return run.linear(x, [weight], bits, arithmetic)[0]
