"""Products and lookups with real tensors: the kernel is chosen, then given the weight in a layout it can read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedBitsError, UsageError
from ..planes.weights import PlaneWeight, Scales, make_scales, scales_shapes
from . import cpu, reference  # noqa: F401  (they register themselves)
from .reference import REFERENCE
from .registry import ENVIRONMENT, Kernel, PreparedWeight, Problem, select, select_in
from .triton import TiledWeight

# layout name -> class of the prepared weights in it
LAYOUTS: dict[str, Any] = {kind.layout: kind for kind in (cpu.BlockedWeight, TiledWeight)}
AnyWeight = PlaneWeight | PreparedWeight
TILE_WEIGHTS = 1 << 22  # decoded at a time for exact products: 16 MB
TILE_ROWS = 16  # of which a tile has a multiple: what the layouts keep together


def stored_weight(
    columns: int,
    planes: Sequence[Tensor],
    scales: Sequence[Tensor],
    kind: str,
    scales_bits: Sequence[int],
    group_size: int,
) -> PlaneWeight:
    """The weight [N, columns] whose scales' tensors stand one after the other in `scales`."""
    left = iter(scales)
    made: dict[int, Scales] = {}
    for bits in scales_bits:
        names = scales_shapes(kind, bits, 0, 0, 1)
        made[bits] = make_scales(kind, bits, dict(zip(names, left, strict=False)))
    return PlaneWeight(tuple(planes), made, columns, group_size)


def prepared_weight(
    columns: int,
    planes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scales_bits: Sequence[int],
    layout: str,
    out_features: int,
    group_size: int,
    kind: str,
) -> PreparedWeight:
    """The weight [out_features, columns] in `layout` that holds these tensors."""
    by_bits = dict(zip(scales_bits, scales, strict=True))
    weight: PreparedWeight = LAYOUTS[layout](tuple(planes), by_bits, out_features, columns, group_size, kind)
    return weight


def linear(x: Tensor, weights: Sequence[AnyWeight], bits: int | Tensor, arithmetic: str | None = None) -> list[Tensor]:
    """x [..., K] times each weight, all of one layout, K and groups: [..., N_i] in x's dtype.

    Every row at `bits`, or row r at bits[r]; in `arithmetic`, or as the best kernel does.
    Raises UnsupportedBitsError for bits without scales, KernelError if nothing computes in `arithmetic`.
    """
    first = weights[0]
    leading = x.shape[:-1]
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if isinstance(bits, Tensor):
        for weight in weights:
            check_row_bits(bits, flat.shape[0], weight.bits)
    else:
        check_bits(bits, weights)
    device = x.device.type
    problem = Problem(device, x.dtype, flat.shape[0], first.kind)
    kernel = select(problem) if arithmetic is None else select_in(problem, arithmetic)
    if torch.is_autocast_enabled(device):  # entering the context costs as much as the rest of this function
        with torch.autocast(device, enabled=False):  # the result has x's dtype, as the fake says
            ys = _with(kernel, flat, weights, bits)
    else:
        ys = _with(kernel, flat, weights, bits)
    return ys if x is flat else [y.view(*leading, y.shape[1]) for y in ys]


def _with(kernel: Kernel, x: Tensor, weights: Sequence[AnyWeight], bits: int | Tensor) -> list[Tensor]:
    first = weights[0]
    if not isinstance(first, PlaneWeight) and kernel.layout == first.layout:
        return kernel.linear_many(x, weights, bits)
    readable: list[Any] = [_readable(weight, kernel, x.dtype) for weight in weights]
    if isinstance(bits, Tensor):
        return [kernel.linear_rows(x, weight, bits) for weight in readable]
    return [kernel.linear(x, weight, bits) for weight in readable]


def product(x: Tensor, weight: AnyWeight, bits: int, row_bits: Tensor | None, transposed: bool) -> Tensor:
    """x [..., K] @ W^T, or x [..., N] @ W if `transposed`, with W exactly as the reference decodes it: gradients.

    Every row at `bits`, or row r at row_bits[r]. Computed in float32, or float64 if x is, from a tile of W at a time;
    the result has x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    width = weight.in_features if transposed else weight.out_features
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        if row_bits is None:
            y = _exact(flat.to(dtype), weight, bits, transposed)
        else:
            check_row_bits(row_bits, len(flat), weight.bits)
            y = flat.new_full((len(flat), width), torch.nan, dtype=dtype)  # what a device makes of unknown bits
            for value in weight.bits:
                chosen = (row_bits == value).nonzero().flatten()
                if len(chosen):
                    y[chosen] = _exact(flat[chosen].to(dtype), weight, value, transposed)
    return y.to(x.dtype).view(*x.shape[:-1], width)


def _exact(x: Tensor, weight: AnyWeight, bits: int, transposed: bool) -> Tensor:
    kernel = select(Problem(x.device.type, x.dtype, len(x), weight.kind))
    readable = _readable(weight, kernel, x.dtype)
    rows, columns = weight.out_features, weight.in_features
    y = x.new_zeros(len(x), columns if transposed else rows)
    step = max(1, TILE_WEIGHTS // columns // TILE_ROWS) * TILE_ROWS
    for first in range(0, rows, step):
        last = min(rows, first + step)
        tile = kernel.decode(readable, bits, first, last, x.dtype)  # [last - first, K]
        if transposed:
            y.addmm_(x[:, first:last], tile)
        else:
            torch.mm(x, tile.T, out=y[:, first:last])
    return y


def lookup(index: Tensor, weight: AnyWeight, bits: int, dtype: torch.dtype) -> Tensor:
    """Rows `index` (integers [...]) of the weight at `bits`: [..., K] in `dtype`. IndexError for what is not a row."""
    flat = index.reshape(-1).long()
    if flat.numel() and flat.device.type == "cpu":
        low, high = (int(bound) for bound in flat.aminmax())
        if low < 0 or high >= weight.out_features:
            wrong = low if low < 0 else high
            raise IndexError(f"token {wrong} is out of range: the embedding has {weight.out_features} rows")
    if isinstance(weight, PlaneWeight):
        rows = REFERENCE.lookup(flat, weight, bits, dtype)
    else:
        kernel = select(Problem(index.device.type, dtype, flat.numel(), weight.kind))
        rows = kernel.lookup(flat, _readable(weight, kernel, dtype), bits, dtype)
    return rows.view(*index.shape, weight.in_features)


def check_bits(bits: int, weights: Sequence[AnyWeight]) -> None:
    """Raise UnsupportedBitsError unless all of `weights` have scales for `bits`."""
    for weight in weights:
        if bits not in weight.scales:
            raise UnsupportedBitsError(bits, weight.bits, where="this layer")


def check_row_bits(row_bits: Tensor, rows: int, supported: tuple[int, ...]) -> None:
    """Raise UsageError unless there is one entry a row, UnsupportedBitsError for an entry without scales."""
    if row_bits.dim() != 1 or row_bits.shape[0] != rows:
        raise UsageError(f"row_bits must have shape {[rows]}, one entry a row, got {list(row_bits.shape)}")
    if row_bits.device.type != "cpu":
        return  # looking would wait for the device; its kernel makes NaN of rows whose bits have no scales
    unknown = set(row_bits.tolist()) - set(supported)
    if unknown:
        raise UnsupportedBitsError(sorted(unknown), supported, where="this layer")


def _readable(weight: AnyWeight, kernel: Kernel, dtype: torch.dtype) -> AnyWeight:
    """`weight` in a layout that `kernel` can read; said once, because it costs many times the product."""
    if isinstance(weight, PlaneWeight) or kernel.layout == weight.layout:
        return weight
    forced = os.environ.get(ENVIRONMENT)
    why = f"{ENVIRONMENT}={forced}" if forced else f"activations in {dtype}"
    advice = f"Unset {ENVIRONMENT}" if forced else "Convert them to float32, bfloat16 or float16"
    warnings.warn(
        f"{why}: kernel {kernel.name!r} runs, which cannot read weights prepared in the layout {weight.layout!r}. "
        f"They are unpacked at every call, which is slow. {advice} to avoid that.",
        stacklevel=1,  # this line: once, not once for each caller
    )
    return weight.unpack()
