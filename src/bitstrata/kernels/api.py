"""The operation as `torch.library` ops, so that compilers see one opaque node.

    bitstrata::plane_linear          every row at the same bits
    bitstrata::plane_linear_rows     one bits value a row
    bitstrata::prepared_linear       the same two from a weight in a kernel's own layout
    bitstrata::prepared_linear_rows
    bitstrata::plane_lookup          rows of the weight, chosen by index
    bitstrata::prepared_lookup       the same from a prepared weight

They take the layer's tensors as lists, because a dispatcher schema has no structures: planes; then
the tensors of the decoders for `decoder_bits`, one after the other; or the tensors and the
shape of a prepared weight. They are defined through `torch.library.Library` rather than
`custom_op`, which costs several times more per call.

`prepared_linear` here, the function, goes straight to the kernel when nothing but an ordinary eager
call is going on: a model's decoding step calls it hundreds of times.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..errors import UnsupportedBitsError
from ..planes.weights import Decoder, PlaneWeight, decoder_shapes, decoder_tensors, make_decoder
from . import cpu, reference  # noqa: F401  (they register themselves)
from .reference import REFERENCE
from .registry import Kernel, PreparedWeight, Problem, select, select_in
from .triton import TiledWeight

# layout name -> class of the prepared weights in it
LAYOUTS: dict[str, Any] = {kind.layout: kind for kind in (cpu.BlockedWeight, TiledWeight)}

_LIBRARY = torch.library.Library("bitstrata", "DEF")
_WEIGHT = "Tensor[] planes, Tensor[] decoders, str kind, int[] decoder_bits, int group_size"
_LIBRARY.define(f"plane_linear(Tensor x, {_WEIGHT}, int bits) -> Tensor")
_LIBRARY.define(f"plane_linear_rows(Tensor x, {_WEIGHT}, Tensor row_bits) -> Tensor")
_PREPARED = (
    "Tensor[] planes, Tensor[] decoders, int[] decoder_bits, str layout, int out_features, int group_size, str kind"
)
_LIBRARY.define(f"prepared_linear(Tensor x, {_PREPARED}, int bits) -> Tensor")
_LIBRARY.define(f"prepared_linear_rows(Tensor x, {_PREPARED}, Tensor row_bits) -> Tensor")
_ROWS = "int bits, int columns, ScalarType dtype"
_LIBRARY.define(f"plane_lookup(Tensor index, {_WEIGHT}, {_ROWS}) -> Tensor")
_LIBRARY.define(f"prepared_lookup(Tensor index, {_PREPARED}, {_ROWS}) -> Tensor")


def _weight(
    columns: int,
    planes: Sequence[Tensor],
    decoders: Sequence[Tensor],
    kind: str,
    decoder_bits: Sequence[int],
    group_size: int,
) -> PlaneWeight:
    left = iter(decoders)
    made: dict[int, Decoder] = {}
    for bits in decoder_bits:
        names = decoder_shapes(kind, bits, 0, 0, 1)
        made[bits] = make_decoder(kind, bits, dict(zip(names, left, strict=False)))
    return PlaneWeight(tuple(planes), made, columns, group_size)


def _problem(x: Tensor, weight: PlaneWeight) -> Problem:
    rows = x.numel() // max(1, x.shape[-1])
    return Problem(x.device.type, x.dtype, rows, weight.kind)


def _plane_linear(x: Tensor, *weight_args: object) -> Tensor:
    *parts, bits = weight_args
    weight = _weight(x.shape[-1], *parts)  # type: ignore[arg-type]
    if bits not in weight.decoders:
        raise UnsupportedBitsError(bits, weight.bits, where="this layer")
    kernel = select(_problem(x, weight))
    with torch.autocast(x.device.type, enabled=False):  # the result has x's dtype, as the fake says
        y = kernel.linear(x.reshape(-1, x.shape[-1]), weight, bits)  # type: ignore[arg-type]
    return y.reshape(*x.shape[:-1], weight.out_features)


def _plane_linear_rows(x: Tensor, *weight_args: object) -> Tensor:
    *parts, row_bits = weight_args
    assert isinstance(row_bits, Tensor)
    weight = _weight(x.shape[-1], *parts)  # type: ignore[arg-type]
    rows = x.reshape(-1, x.shape[-1])
    _check_row_bits(row_bits, rows.shape[0], weight.bits)
    kernel = select(_problem(x, weight))
    with torch.autocast(x.device.type, enabled=False):
        y = kernel.linear_rows(rows, weight, row_bits)
    return y.reshape(*x.shape[:-1], weight.out_features)


def _check_row_bits(row_bits: Tensor, rows: int, supported: tuple[int, ...]) -> None:
    if row_bits.dim() != 1 or row_bits.shape[0] != rows:
        raise ValueError(f"row_bits must have shape {[rows]}, one entry a row, got {list(row_bits.shape)}")
    if row_bits.device.type != "cpu":
        return  # looking would wait for the device; its kernel makes NaN of rows whose bits have no decoder
    unknown = set(row_bits.tolist()) - set(supported)
    if unknown:
        raise UnsupportedBitsError(sorted(unknown), supported, where="this layer")


def _run_prepared(x: Tensor, weights: Sequence[PreparedWeight], bits: int | Tensor) -> list[Tensor]:
    first = weights[0]
    leading = x.shape[:-1]
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if isinstance(bits, Tensor):
        for weight in weights:
            _check_row_bits(bits, flat.shape[0], weight.bits)
    elif any(bits not in weight.decoders for weight in weights):
        raise UnsupportedBitsError(bits, first.bits, where="this layer")
    device = x.device.type
    kernel = select(Problem(device, x.dtype, flat.shape[0], first.kind))
    if torch.is_autocast_enabled(device):  # entering the context costs as much as the rest of this function
        with torch.autocast(device, enabled=False):  # the result has x's dtype, as the fake says
            ys = _with(kernel, flat, weights, bits)
    else:
        ys = _with(kernel, flat, weights, bits)
    return ys if x is flat else [y.view(*leading, y.shape[1]) for y in ys]


def _with(kernel: Kernel, x: Tensor, weights: Sequence[PreparedWeight], bits: int | Tensor) -> list[Tensor]:
    if kernel.layout == weights[0].layout:
        return kernel.linear_many(x, weights, bits)
    if isinstance(bits, Tensor):  # another kernel is forced
        return [kernel.linear_rows(x, weight.unpack(), bits) for weight in weights]
    return [kernel.linear(x, weight.unpack(), bits) for weight in weights]


def _prepared_linear(
    x: Tensor,
    planes: Sequence[Tensor],
    decoders: Sequence[Tensor],
    decoder_bits: Sequence[int],
    layout: str,
    out_features: int,
    group_size: int,
    kind: str,
    bits: int | Tensor,
) -> Tensor:
    by_bits = dict(zip(decoder_bits, decoders, strict=True))
    weight = LAYOUTS[layout](tuple(planes), by_bits, out_features, x.shape[-1], group_size, kind)
    return _run_prepared(x, [weight], bits)[0]


def _run_lookup(index: Tensor, weight: PlaneWeight | PreparedWeight, bits: int, dtype: torch.dtype) -> Tensor:
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
        own = kernel.layout == weight.layout
        rows = kernel.lookup(flat, weight if own else weight.unpack(), bits, dtype)
    return rows.view(*index.shape, weight.in_features)


def _plane_lookup(index: Tensor, *arguments: Any) -> Tensor:
    *parts, bits, columns, dtype = arguments
    return _run_lookup(index, _weight(columns, *parts), bits, dtype)


def _prepared_lookup(index: Tensor, *arguments: Any) -> Tensor:
    planes, decoders, decoder_bits, layout, out_features, group_size, kind, bits, columns, dtype = arguments
    by_bits = dict(zip(decoder_bits, decoders, strict=True))
    weight = LAYOUTS[layout](tuple(planes), by_bits, out_features, columns, group_size, kind)
    return _run_lookup(index, weight, bits, dtype)


def _fake_lookup(index: Tensor, *arguments: Any) -> Tensor:
    *_, columns, dtype = arguments
    return index.new_empty(*index.shape, columns, dtype=dtype)


def _fake(x: Tensor, planes: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], planes[0].shape[0])


def _fake_prepared(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], arguments[4])


for _name, _function, _shape in (
    ("plane_linear", _plane_linear, _fake),
    ("plane_linear_rows", _plane_linear_rows, _fake),
    ("prepared_linear", _prepared_linear, _fake_prepared),
    ("prepared_linear_rows", _prepared_linear, _fake_prepared),
    ("plane_lookup", _plane_lookup, _fake_lookup),
    ("prepared_lookup", _prepared_lookup, _fake_lookup),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitstrata::{_name}", _shape, lib=_LIBRARY)


def _arguments(weight: PlaneWeight, decoder_bits: Sequence[int]) -> tuple[object, ...]:
    tensors = [tensor for bits in decoder_bits for tensor in decoder_tensors(weight.decoders[bits], bits).values()]
    return list(weight.planes[: max(decoder_bits)]), tensors, weight.kind


def _check_columns(x: Tensor, weight: PlaneWeight | PreparedWeight) -> None:
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"expected x [..., {weight.in_features}], got {list(x.shape)}")


def plane_linear(x: Tensor, weight: PlaneWeight, bits: int) -> Tensor:
    """y = x @ W_bits^T: x [..., K] -> [..., N] in x's dtype.

    Raises UnsupportedBitsError if the weight has no decoder for `bits`, ValueError if x is not K wide.
    """
    _check_columns(x, weight)
    if bits not in weight.decoders:
        raise UnsupportedBitsError(bits, weight.bits, where="this layer")
    y: Tensor = torch.ops.bitstrata.plane_linear(x, *_arguments(weight, [bits]), [bits], weight.group_size, bits)
    return y


def plane_linear_rows(x: Tensor, weight: PlaneWeight, row_bits: Tensor) -> Tensor:
    """Row r of x at row_bits[r] bits: x [..., K], row_bits integer [rows] -> [..., N] in x's dtype.

    Raises UnsupportedBitsError if any row asks for bits without a decoder, ValueError if x is not
    K wide or row_bits has not one entry a row.
    """
    _check_columns(x, weight)
    arguments = _arguments(weight, weight.bits)
    y: Tensor = torch.ops.bitstrata.plane_linear_rows(x, *arguments, list(weight.bits), weight.group_size, row_bits)
    return y


def plane_lookup(index: Tensor, weight: PlaneWeight, bits: int, dtype: torch.dtype) -> Tensor:
    """Rows `index` (integers [...]) of the weight at `bits`: [..., K] in `dtype`, exactly as the reference decodes.

    Raises IndexError for an index that is not a row.
    """
    if _is_plain(index):
        return _run_lookup(index, weight, bits, dtype)
    arguments = _arguments(weight, [bits])
    y: Tensor = torch.ops.bitstrata.plane_lookup(
        index, *arguments, [bits], weight.group_size, bits, weight.in_features, dtype
    )
    return y


def prepared_lookup(index: Tensor, weight: PreparedWeight, bits: int, dtype: torch.dtype) -> Tensor:
    """`plane_lookup` from a prepared weight."""
    if _is_plain(index) and index.device == weight.planes[0].device:
        return _run_lookup(index, weight, bits, dtype)
    y: Tensor = torch.ops.bitstrata.prepared_lookup(
        index,
        list(weight.planes[:bits]),
        [weight.decoders[bits]],
        [bits],
        weight.layout,
        weight.out_features,
        weight.group_size,
        weight.kind,
        bits,
        weight.in_features,
        dtype,
    )
    return y


def prepare(weight: PlaneWeight, dtype: torch.dtype) -> PreparedWeight | None:
    """`weight` in the layout of the kernel that runs one row of `dtype` on its device; None to keep it as it is."""
    device = weight.planes[0].device.type
    _warn_without_kernels(device)
    return select(Problem(device, dtype, 1, weight.kind)).prepare(weight)


def without_pages(
    kind: str, out_features: int, in_features: int, group_size: int, device: str, dtype: torch.dtype
) -> PreparedWeight | None:
    """A weight [N, K] without planes and decoders, in the layout that `prepare` would choose; None for the stored one.

    Args:
        kind: of its decoders; device, dtype: where it will run, and that of the activations.
    """
    _warn_without_kernels(device)
    layout = select(Problem(device, dtype, 1, kind)).layout
    if layout is None:
        return None
    empty: PreparedWeight = LAYOUTS[layout]((), {}, out_features, in_features, group_size, kind)
    return empty


def _warn_without_kernels(device: str) -> None:
    if device == "cpu" and cpu.missing:
        warnings.warn(
            f"CPU kernels cannot be used: {cpu.missing}. The reference kernel is many times slower; install "
            "bitstrata again where there is a C++17 compiler (GCC or Clang).",
            stacklevel=3,
        )


def _is_plain(x: Tensor) -> bool:
    """Whether nobody wants to see the op: no subclass of Tensor, compiler, tracer or gradient."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def prepared_linear(x: Tensor, weights: Sequence[PreparedWeight], bits: int | Tensor) -> list[Tensor]:
    """y_i = x @ W_i^T at `bits`, or row r at bits[r]: x [..., K] -> [..., N_i] each, in x's dtype.

    The weights share K and groups. Raises as `plane_linear` and `plane_linear_rows` do.
    """
    for weight in weights:
        _check_columns(x, weight)
    if _is_plain(x) and x.device == weights[0].planes[0].device:
        return _run_prepared(x, weights, bits)
    ys = []
    for weight in weights:
        op = (
            torch.ops.bitstrata.prepared_linear_rows
            if isinstance(bits, Tensor)
            else torch.ops.bitstrata.prepared_linear
        )
        chosen = weight.bits if isinstance(bits, Tensor) else (bits,)
        if any(value not in weight.decoders for value in chosen):
            raise UnsupportedBitsError(bits, weight.bits, where="this layer")
        ys.append(
            op(
                x,
                list(weight.planes[: max(chosen)]),
                [weight.decoders[value] for value in chosen],
                list(chosen),
                weight.layout,
                weight.out_features,
                weight.group_size,
                weight.kind,
                bits,
            )
        )
    return ys


@torch.no_grad()
def linear_in(arithmetic: str, x: Tensor, weight: PlaneWeight | PreparedWeight, bits: int | Tensor) -> Tensor:
    """x @ W^T at `bits`, one value or one a row, in "exact" or "int8" arithmetic whichever would run: for measuring.

    x [..., K] -> [..., N] in x's dtype, in eager mode and without a gradient. Raises KernelError if no kernel here
    computes in this arithmetic, else as `plane_linear` and `plane_linear_rows` do.
    """
    _check_columns(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(bits, Tensor):
        _check_row_bits(bits, flat.shape[0], weight.bits)
    elif bits not in weight.decoders:
        raise UnsupportedBitsError(bits, weight.bits, where="this layer")
    kernel = select_in(Problem(x.device.type, x.dtype, flat.shape[0], weight.kind), arithmetic)
    with torch.autocast(x.device.type, enabled=False):
        if not isinstance(weight, PlaneWeight):
            (y,) = _with(kernel, flat, [weight], bits)
        elif isinstance(bits, Tensor):
            y = kernel.linear_rows(flat, weight, bits)
        else:
            y = kernel.linear(flat, weight, bits)
    return y.reshape(*x.shape[:-1], weight.out_features)
