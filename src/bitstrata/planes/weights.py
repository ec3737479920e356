"""PlaneWeight: one linear layer's weight as shared bit-planes and one set of scales per bits.

Planes are shared by all bits; scales belong to one bits value and never change a plane.
So the weight at `bits` depends on planes 0..bits-1 and on that one set of scales, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from .pack import words_per_row

MAX_BITS = 8
SCALE_DTYPE = torch.float16
Kind = Literal["affine", "affine8", "codebook"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # of a layer's scales; affine8 is affine above BYTE_BITS
BYTE_BITS = 4  # up to here coefficients may be bytes: finer precisions would feel their rounding


def whole_number(value: object) -> int | None:
    """`value` as an int if it is a whole number of Python, NumPy or torch (0-d, integer); None for anything else.

    Nothing is rounded or parsed: 3.0, "3" and True are not whole numbers.
    """
    if isinstance(value, Tensor):
        kind = value.dtype
        whole = value.dim() == 0 and not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
        return int(value) if whole else None
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; makes no temporary of its size."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def group_count(columns: int, group_size: int) -> int:
    """Groups of `group_size` columns in a row; the last one may be shorter."""
    return -(-columns // group_size)


@dataclass(frozen=True)
class AffineScales:
    """W[n, k] = offset[n, j] + sum_i scale[i, n, j] * B_i[n, k], j the group of column k.

    scale: fp16 [bits, N, J]; offset: fp16 [N, J].
    """

    scale: Tensor
    offset: Tensor
    kind: ClassVar = "affine"
    output_dims: ClassVar = {"scale": 1, "offset": 0}  # the dimension of each tensor that is N

    def affine(self) -> AffineScales:
        """Itself."""
        return self


@dataclass(frozen=True)
class ByteScales:
    """affine scales whose coefficients are bytes, times a unit that the groups of an output feature share.

        scale_i[n, j] = scale[i, n, j] * 2^-(7+i) * unit[n],    offset[n, j] = offset[n, j] * 2^-7 * unit[n]

    scale: int8 [bits, N, J]; offset: int8 [N, J]; unit: fp16 [N]. A unit has four significant bits and is a
    multiple of 2^-14, so every coefficient of up to `BYTE_BITS` planes is an fp16 number, exactly.
    """

    scale: Tensor
    offset: Tensor
    unit: Tensor
    kind: ClassVar = "affine8"
    output_dims: ClassVar = {"scale": 1, "offset": 0, "unit": 0}

    def affine(self) -> AffineScales:
        """The same coefficients in fp16."""
        step = byte_steps(self.unit, len(self.scale)).unsqueeze(-1)  # [bits + 1, N, 1]
        return AffineScales((self.scale * step[:-1]).to(SCALE_DTYPE), (self.offset * step[-1]).to(SCALE_DTYPE))


@dataclass(frozen=True)
class Codebook:
    """W[n, k] = table[n, code], code = the plane bits of (n, k), plane 0 the most significant.

    table: fp16 [N, 2**bits].
    """

    table: Tensor
    kind: ClassVar = "codebook"
    output_dims: ClassVar = {"table": 0}


Scales = AffineScales | ByteScales | Codebook


def scales_tensors(scales: Scales, bits: int) -> dict[str, Tensor]:
    """The tensors of a set of scales under the names they carry in a checkpoint."""
    return {f"{name}_{bits}": getattr(scales, name) for name in scales.output_dims}


def map_scales(scales: Scales, change: Callable[[Tensor, int], Tensor]) -> Scales:
    """The scales with every tensor replaced by `change(tensor, the dimension that is N)`."""
    return type(scales)(**{name: change(getattr(scales, name), dim) for name, dim in scales.output_dims.items()})


def join_scales(parts: Sequence[Scales]) -> Scales:
    """Scales of consecutive output features as one; all of one kind."""
    with torch.autocast("cpu", enabled=False):  # under it torch.cat takes no fp16
        dims = parts[0].output_dims.items()
        return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts], dim) for name, dim in dims})


def byte_steps(unit: Tensor, bits: int) -> Tensor:
    """The distance between neighbouring coefficients of planes 0..bits-1, and of the offset: fp32 [bits + 1, ...]."""
    exponent = torch.tensor([*range(bits), 0], device=unit.device) + 7
    return unit.float() * torch.exp2(-exponent.float()).view(-1, *[1] * unit.dim())


def is_byte_unit(unit: Tensor) -> Tensor:
    """Which entries can be units of a ByteScales: a bool each."""
    whole = unit.float() * 2**14
    return (whole >= 0) & (whole % 1 == 0) & (whole.frexp().mantissa * 16 % 1 == 0)


def byte_unit(largest: Tensor) -> Tensor:
    """The smallest unit whose bytes reach `largest` (finite, at least 0): fp16, of the same shape.

    Beyond fp16's range the largest unit there is.
    """
    wanted = (largest.double() * (128 / 127)).clamp(2.0**-14, 61440.0)
    exponent = wanted.frexp().exponent.clamp_min(4 - 14) - 4
    step = torch.exp2(exponent.double())
    return ((wanted / step).ceil() * step).clamp_max(61440.0).to(SCALE_DTYPE)


def scales_kind(kind: str, bits: int) -> str:
    """What the scales for `bits` are in a layer of `kind`: "affine", "affine8" or "codebook"."""
    return "affine" if kind == "affine8" and bits > BYTE_BITS else kind


def scales_shapes(
    kind: str, bits: int, out_features: int, in_features: int, group_size: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors of the scales for `bits` in a layer of `kind` (KINDS)."""
    groups = group_count(in_features, group_size)
    if kind == "affine8" and bits <= BYTE_BITS:
        return {
            f"scale_{bits}": (torch.int8, (bits, out_features, groups)),
            f"offset_{bits}": (torch.int8, (out_features, groups)),
            f"unit_{bits}": (SCALE_DTYPE, (out_features,)),
        }
    if kind in ("affine", "affine8"):
        return {
            f"scale_{bits}": (SCALE_DTYPE, (bits, out_features, groups)),
            f"offset_{bits}": (SCALE_DTYPE, (out_features, groups)),
        }
    if kind == "codebook":
        return {f"table_{bits}": (SCALE_DTYPE, (out_features, 2**bits))}
    raise ValueError(f"unknown scales {kind!r}; known: {', '.join(KINDS)}")


def scales_bytes(kind: str, bits: int, out_features: int, in_features: int, group_size: int) -> int:
    """Bytes of those tensors."""
    shapes = scales_shapes(kind, bits, out_features, in_features, group_size).values()
    return sum(prod(shape) * dtype.itemsize for dtype, shape in shapes)


def make_scales(kind: str, bits: int, tensors: Mapping[str, Tensor]) -> Scales:
    """The scales for `bits` in a layer of `kind` from tensors named as in `scales_shapes`."""
    if kind == "codebook":
        return Codebook(tensors[f"table_{bits}"])
    scale, offset = tensors[f"scale_{bits}"], tensors[f"offset_{bits}"]
    if kind == "affine8" and bits <= BYTE_BITS:
        return ByteScales(scale, offset, tensors[f"unit_{bits}"])
    return AffineScales(scale, offset)


@dataclass(frozen=True)
class PlaneWeight:
    """A weight [N, K]: `planes[i]` int32 [N, ceil(K/32)] and `scales[bits]` for each supported bits.

    Raises ValueError at construction if a shape or dtype does not fit, naming what is wrong.
    """

    planes: tuple[Tensor, ...]
    scales: Mapping[int, Scales]
    in_features: int
    group_size: int

    def __post_init__(self) -> None:
        if not self.planes or not self.scales:
            raise ValueError("a PlaneWeight needs at least one plane and one set of scales")
        if self.group_size < 1 or self.in_features < 1:
            raise ValueError(f"group_size {self.group_size} and in_features {self.in_features} must be positive")
        if not all(1 <= bits <= MAX_BITS for bits in self.scales) or len(self.planes) > MAX_BITS:
            raise ValueError(f"bits must lie in 1..{MAX_BITS}, got {sorted(self.scales)}")
        if max(self.scales) > len(self.planes):
            raise ValueError(f"bits {max(self.scales)} needs as many planes, got {len(self.planes)}")
        expected = (self.out_features, words_per_row(self.in_features))
        for index, plane in enumerate(self.planes):
            if plane.dtype != torch.int32 or tuple(plane.shape) != expected:
                raise ValueError(f"plane_{index}: expected int32 {expected}, got {plane.dtype} {tuple(plane.shape)}")
        byte_bits = [bits for bits, scales in self.scales.items() if isinstance(scales, ByteScales)]
        if byte_bits and sorted(byte_bits) != [bits for bits in self.bits if bits <= BYTE_BITS]:
            raise ValueError(f"scales of up to {BYTE_BITS} bits, and no others, have bytes: got {byte_bits}")
        for bits, scales in self.scales.items():
            shapes = scales_shapes(scales.kind, bits, self.out_features, self.in_features, self.group_size)
            for name, tensor in scales_tensors(scales, bits).items():
                dtype, shape = shapes[name]
                if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                    raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")

    @property
    def out_features(self) -> int:
        return self.planes[0].shape[0]

    @property
    def bits(self) -> tuple[int, ...]:
        """The supported bits, ascending."""
        return tuple(sorted(self.scales))

    @property
    def kind(self) -> str:
        """The kind of the layer's scales (KINDS): that of the lowest bits."""
        return self.scales[self.bits[0]].kind

    def prefix(self, max_bits: int) -> PlaneWeight:
        """The same weight without the planes and scales above `max_bits`; ValueError if no scales are left."""
        scales = {bits: scales for bits, scales in self.scales.items() if bits <= max_bits}
        if not scales:
            raise ValueError(f"no scales at or below {max_bits} bits; there are {list(self.bits)}")
        return PlaneWeight(self.planes[: max(scales)], scales, self.in_features, self.group_size)

    def outputs(self, start: int, stop: int) -> PlaneWeight:
        """Output features start..stop-1 as a weight of their own; nothing is copied."""
        stop = min(stop, self.out_features)
        scales = {
            bits: map_scales(scales, lambda tensor, dim: tensor.narrow(dim, start, stop - start))
            for bits, scales in self.scales.items()
        }
        return PlaneWeight(tuple(plane[start:stop] for plane in self.planes), scales, self.in_features, self.group_size)

    def take(self, index: Tensor) -> PlaneWeight:
        """Output features `index` (int64 [n]) as a weight of their own, copied."""
        scales = {
            bits: map_scales(scales, lambda tensor, dim: tensor.index_select(dim, index))
            for bits, scales in self.scales.items()
        }
        planes = tuple(plane.index_select(0, index) for plane in self.planes)
        return PlaneWeight(planes, scales, self.in_features, self.group_size)

    def bytes_read(self, bits: int) -> int:
        """Bytes a matrix product at `bits` has to read: planes 0..bits-1 and those scales."""
        return sum(plane.nbytes for plane in self.planes[:bits]) + sum(
            tensor.nbytes for tensor in scales_tensors(self.scales[bits], bits).values()
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under the name it carries in a checkpoint, without the layer's prefix."""
        named = {f"plane_{index}": plane for index, plane in enumerate(self.planes)}
        for bits in self.bits:
            named.update(scales_tensors(self.scales[bits], bits))
        return named
