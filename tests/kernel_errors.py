"""How far a kernel's result may be from float64: what each kernel promises, as a check.

Kernels whose activations stay exact promise at most twice the error of F.linear. With int8 activations and byte levels
the promise is the bound in src/bitstrata/kernels/cpu/kernel.py, computed here from the decoded weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import assert_linear_close
from torch import Tensor

from bitstrata.planes import Codebook, PlaneWeight, decode, group_count

Check = Callable[[Tensor, Tensor, str], None]


def int8_rows(kernel: Any, dtype: torch.dtype) -> float:
    """Up to how many rows of `dtype` `kernel` makes activations int8."""
    limit = kernel.steady(dtype)
    return 0 if kernel.activations == "exact" else float("inf") if limit is None else limit


def fewest_levels(kernel: Any) -> int:
    """The smallest level_max among the byte tables of `kernel`."""
    return 120 if kernel.name.startswith("avx2") else 252


def promise_of(kernel: Any, weight: PlaneWeight, bits: int) -> Check:
    """check(y, x, label): y, what `kernel` made of x and `weight`, is as near to float64 as it promises."""
    W = decode(weight, bits, torch.float64)

    def check(y: Tensor, x: Tensor, label: str) -> None:
        rows = x.shape[:-1].numel()
        label = f"{label} bits={bits} rows={rows}"
        if 0 < rows <= int8_rows(kernel, x.dtype):
            assert_int8_close(y, x, weight, bits, fewest_levels(kernel), label)
        else:
            assert_linear_close(y, x, W, label)

    return check


def chunks_of(weight: PlaneWeight, bits: int) -> Tensor:
    """For each column the chunk of activations, of one scale, that it belongs to: int64 [K]

    A chunk is a quarter of a group, or of 128 columns of a wider one: four of every sixteen columns. A codebook has
    no groups, so that the whole row is one.
    """
    K = weight.in_features
    size = min(weight.group_size, K) if weight.scales[bits].kind != "codebook" else K
    group, within = torch.arange(K) // size, torch.arange(K) % size
    return (group * group_count(size, 128) + within // 128) * 4 + within % 16 // 4


def level_steps(weight: PlaneWeight, bits: int, level_max: int) -> Tensor:
    """What one byte level of each weight is worth, tables of planes 0-3 and 4-7 added up: float64 [N, K]."""
    scales = weight.scales[bits]
    if isinstance(scales, Codebook):
        low, high = scales.table.double().aminmax(dim=1, keepdim=True)
        return ((high - low) / level_max).expand(-1, weight.in_features)
    group = torch.arange(weight.in_features) // weight.group_size
    stored = scales.affine().scale
    tables = [stored[first : min(bits, first + 4)].double().abs() for first in range(0, bits, 4)]
    # the two values of a table of one plane fall on levels, whatever they are
    spans = [2 * scales.sum(0) for scales in tables if len(scales) > 1]  # [N, J] each
    return (sum(spans, torch.zeros(weight.out_features, int(group[-1]) + 1).double()) / level_max)[:, group]


FINE_BITS = 7  # from which activations have a second byte

# A level is the nearest to a weight but for the table's arithmetic: five numbers rounded to 1/256 of a level and
# a reciprocal good to 2**-13 of 255 levels.
LEVEL_ERROR = 0.5 + 5 / 512 + 255 * 2**-13


def int8_errors(x: Tensor, weight: PlaneWeight, bits: int, level_max: int) -> tuple[Tensor, Tensor]:
    """What int8 activations and byte levels may do to x @ W^T: float64 [rows, N], the worst case and the expected RMS.

    The worst case is that of src/bitstrata/kernels/cpu/kernel.py, with the product of both errors and the rounding
    of sums and results to float. The other takes every rounding for an independent uniform one.
    """
    W, chunk, a = decode(weight, bits, torch.float64).abs(), chunks_of(weight, bits), x.double().abs()
    count = int(chunk.max()) + 1
    largest = torch.zeros(len(x), count).double()
    largest = largest.scatter_reduce(1, chunk.expand(len(x), -1), a, "amax")[:, chunk]  # [rows, K]
    off = torch.where(largest > 1e-30, largest / 254 * (1 + 1e-4), largest)  # of an activation, at most
    if bits >= FINE_BITS:
        off = torch.where(largest > 1e-30, largest / 127 / 256 * (1 + 1e-2), largest)
    step = level_steps(weight, bits, level_max)
    level_off = LEVEL_ERROR * step
    worst = off @ W.T + a @ level_off.T + off @ level_off.T
    terms = 2 * count + 8  # that a result adds up in float32
    worst += terms * torch.finfo(torch.float32).eps * 3 * a.sum(1, keepdim=True) * W.amax(1)
    kind = torch.finfo(x.dtype)
    worst += kind.eps / 2 * (a @ W.T + worst) + kind.smallest_normal * kind.eps
    expected = (off**2 @ (W**2).T / 3 + a**2 @ (step**2).T / 12).sqrt()
    return worst, expected


def assert_int8_close(y: Tensor, x: Tensor, weight: PlaneWeight, bits: int, level_max: int, message: str) -> None:
    """y = x @ W^T within the worst case of `int8_errors`, for each entry on its own."""
    assert y.dtype == x.dtype, message
    assert y.shape == (*x.shape[:-1], weight.out_features), message
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, weight.out_features)
    if not len(x):
        return
    worst, _ = int8_errors(x, weight, bits, level_max)
    error = (y.double() - x.double() @ decode(weight, bits, torch.float64).T).abs().nan_to_num(nan=torch.inf)
    at = (error / worst).argmax()
    assert bool((error <= worst).all()), f"{message}: error {error.flatten()[at]:.3g} > {worst.flatten()[at]:.3g}"


def assert_int8_typical(y: Tensor, x: Tensor, weight: PlaneWeight, bits: int, level_max: int, message: str) -> None:
    """y = x @ W^T with an RMS error as expected of independent roundings, and without a wrong factor.

    For Gaussian x and thousands of results; both limits are several standard deviations away.
    """
    exact = x.double() @ decode(weight, bits, torch.float64).T
    expected = int8_errors(x, weight, bits, level_max)[1].square().mean().sqrt()
    error = (y.double() - exact).square().mean().sqrt()
    assert error <= 1.15 * expected, f"{message}: RMS error {error:.3g}, expected {expected:.3g}"
    factor = ((y.double() * exact).sum() / exact.square().sum()).item()
    assert abs(factor - 1) < 0.003, f"{message}: off by a factor {factor:.5f}"
