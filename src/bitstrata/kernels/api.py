"""The operation as `torch.library` ops, so that compilers see one opaque node.

    bitstrata::plane_linear       every row at the same bits
    bitstrata::plane_linear_rows  one bits value a row

Both take the layer's tensors as lists, because a dispatcher schema has no structures: planes;
then either scales and offsets, or tables, one entry for each value of `decoder_bits`. They are
defined through `torch.library.Library` rather than `custom_op`, which costs several times more
per call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnsupportedBitsError
from ..planes.weights import AffineDecoder, CodebookDecoder, PlaneWeight
from . import reference as _reference  # noqa: F401  (registers itself)
from .registry import Problem, select

_LIBRARY = torch.library.Library("bitstrata", "DEF")
_WEIGHT = "Tensor[] planes, Tensor[] scales, Tensor[] offsets, Tensor[] tables, int[] decoder_bits, int group_size"
_LIBRARY.define(f"plane_linear(Tensor x, {_WEIGHT}, int bits) -> Tensor")
_LIBRARY.define(f"plane_linear_rows(Tensor x, {_WEIGHT}, Tensor row_bits) -> Tensor")


def _weight(
    x: Tensor,
    planes: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    tables: Sequence[Tensor],
    decoder_bits: Sequence[int],
    group_size: int,
) -> PlaneWeight:
    decoders = (
        {bits: CodebookDecoder(table) for bits, table in zip(decoder_bits, tables, strict=True)}
        if tables
        else {
            bits: AffineDecoder(scale, offset)
            for bits, scale, offset in zip(decoder_bits, scales, offsets, strict=True)
        }
    )
    return PlaneWeight(tuple(planes), decoders, x.shape[-1], group_size)


def _problem(x: Tensor, weight: PlaneWeight) -> Problem:
    rows = x.numel() // max(1, x.shape[-1])
    return Problem(x.device.type, x.dtype, rows, weight.decoder_kind(weight.bits[0]))


def _plane_linear(x: Tensor, *weight_args: object) -> Tensor:
    *parts, bits = weight_args
    weight = _weight(x, *parts)  # type: ignore[arg-type]
    if bits not in weight.decoders:
        raise UnsupportedBitsError(bits, weight.bits, where="this layer")
    kernel = select(_problem(x, weight))
    with torch.autocast(x.device.type, enabled=False):  # the result has x's dtype, as the fake says
        y = kernel.linear(x.reshape(-1, x.shape[-1]), weight, bits)  # type: ignore[arg-type]
    return y.reshape(*x.shape[:-1], weight.out_features)


def _plane_linear_rows(x: Tensor, *weight_args: object) -> Tensor:
    *parts, row_bits = weight_args
    assert isinstance(row_bits, Tensor)
    weight = _weight(x, *parts)  # type: ignore[arg-type]
    rows = x.reshape(-1, x.shape[-1])
    if row_bits.shape != rows.shape[:1]:
        raise ValueError(f"row_bits must have shape {[rows.shape[0]]}, one entry a row, got {list(row_bits.shape)}")
    unknown = set(torch.unique(row_bits).tolist()) - set(weight.bits)
    if unknown:
        raise UnsupportedBitsError(sorted(unknown), weight.bits, where="this layer")
    kernel = select(_problem(x, weight))
    with torch.autocast(x.device.type, enabled=False):
        y = kernel.linear_rows(rows, weight, row_bits)
    return y.reshape(*x.shape[:-1], weight.out_features)


def _fake(x: Tensor, planes: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], planes[0].shape[0])


for _name, _function in (("plane_linear", _plane_linear), ("plane_linear_rows", _plane_linear_rows)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitstrata::{_name}", _fake, lib=_LIBRARY)


def _arguments(weight: PlaneWeight, decoder_bits: Sequence[int]) -> tuple[list[Tensor], ...]:
    chosen = [weight.decoders[bits] for bits in decoder_bits]
    return (
        list(weight.planes[: max(decoder_bits)]),
        [decoder.scale for decoder in chosen if isinstance(decoder, AffineDecoder)],
        [decoder.offset for decoder in chosen if isinstance(decoder, AffineDecoder)],
        [decoder.table for decoder in chosen if isinstance(decoder, CodebookDecoder)],
    )


def _check_columns(x: Tensor, weight: PlaneWeight) -> None:
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
