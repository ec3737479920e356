"""BlockedWeight: planes and scales re-laid for the CPU kernels (native/generic/layout.h), and the products by them.

The same bits and the same fp16 numbers in another order, padded to blocks of 16 rows and units of
128 columns; `stored` gives the original back, bit for bit.

    int8    any number of rows in native code: from the planes, or from blocks decoded to bytes while many rows pass by
    exact   up to FEW_ROWS rows in native code, more through tiles of the decoded weight and torch's matrix product

With int8 activations a row's result is the same, number for number, in a call of any size. How int8 activations and
byte levels work, and the error they may make, is in native/generic/activations.h and tables.h:

    |y - x W^T| <= sum over chunks of x_scale/2 * sum|W| + step/2 * sum|x|
    with x_scale = max|x| / 127 of a chunk (a quarter of a group, at most 32 columns), and
    step = (largest - smallest weight that the group's scales can make) / level_max, level_max 252
    or more (120 or more without a byte dot product that takes unsigned levels to 255: avx2)

From 7 bits on activations have a second byte, so that they cost less than the weights: x_scale/256, not x_scale/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ...memory import HUGE_PAGE, allocate
from ...planes.pack import words_per_row
from ...planes.weights import (
    MAX_BITS,
    SCALE_DTYPE,
    Codebook,
    PlaneWeight,
    Scales,
    make_scales,
    scales_shapes,
    scales_tensors,
)
from ..registry import Kernel
from ..weight import Weight, check_row_bits
from .extension import native

BLOCK_ROWS = 16
FEW_ROWS = 16
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TILE_WEIGHTS = 1 << 22  # decoded at a time for many rows: 8 MB in bf16
# For 16-bit matrix products torch's oneDNN compiles a kernel for each number of rows that it meets, and keeps it: a
# server's memory would grow with every new length of a prompt (benchmarks/serving.py --soak). So rows come in steps.
ROW_STEP = 32
ALIGNMENT = 64  # a vector
STAGGER = 320  # planes are read side by side: at a distance of a power of two they would meet in the same banks
STAGGERED = 1 << 18  # bytes from which a plane of its own memory is kept apart from the others so
SKEW = 4096 + STAGGER


class BlockedWeight(Weight):
    """planes, scales[bits]: uint8, flat."""

    layout = "blocked"
    dtypes = frozenset(TYPES)

    def _attach(self) -> None:
        self.handle = _handle(self.out_features, self.in_features, self.group_size, self.kind)
        for index, plane in enumerate(self.planes):
            _expect(f"plane {index}", plane, self.handle.plane_bytes)
            self.handle.set_plane(index, plane.data_ptr())
        for bits, packed in self.scales.items():
            _expect(f"scales for {bits} bits", packed, self.handle.scales_bytes(bits))
            self.handle.set_scales(bits, packed.data_ptr())

    @classmethod
    def pack(cls, weight: PlaneWeight, kernel: Kernel, *, apart: bool = False) -> Self:
        """`weight`, whose tensors must be on the CPU, re-laid. Raises ValueError if one is elsewhere."""
        shape = weight.out_features, weight.in_features, weight.group_size, weight.kind
        handle = _handle(*shape)
        sizes = [handle.plane_bytes] * len(weight.planes) + [handle.scales_bytes(bits) for bits in weight.scales]
        places = [*range(len(weight.planes)), *[MAX_BITS] * len(weight.scales)]
        room = iter(list(map(_allocate_page, sizes, places)) if apart else _allocate_together(sizes))
        planes = tuple(_pack_plane(handle, plane, next(room)) for plane in weight.planes)
        scales = {bits: _pack_scales(handle, bits, found, next(room)) for bits, found in weight.scales.items()}
        return cls(planes, scales, *shape, kernel)

    def with_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> Self:
        """See Weight. Each tensor has memory of its own, so that dropping it gives its memory back."""
        self.check_pages(bits, planes, scales)
        shape = self.out_features, self.in_features, self.group_size, self.kind_with(scales)
        handle, held = type(self)((), {}, *shape, self.kernel).handle, list(self.planes[:bits])
        for plane in planes:
            held.append(_pack_plane(handle, plane, _allocate_page(handle.plane_bytes, len(held))))
        packed = {bits: _pack_scales(handle, bits, scales, _allocate_page(handle.scales_bytes(bits), MAX_BITS))}
        return type(self)(tuple(held), packed, *shape, self.kernel)

    def stored(self) -> PlaneWeight:
        """The weight as the checkpoint has it, in tensors of its own."""
        planes, words = [], words_per_row(self.in_features)
        for packed in self.planes:
            plane = torch.empty(self.out_features, words, dtype=torch.int32, device="cpu")
            self.handle.unpack_plane(packed.data_ptr(), plane.data_ptr(), torch.get_num_threads())
            planes.append(plane)
        scales = {bits: self._stored_scales(bits) for bits in self.bits}
        return PlaneWeight(tuple(planes), scales, self.in_features, self.group_size)

    def _stored_scales(self, bits: int) -> Scales:
        shapes = scales_shapes(self.kind, bits, self.out_features, self.in_features, self.group_size)
        tensors = {name: torch.empty(shape, dtype=dtype, device="cpu") for name, (dtype, shape) in shapes.items()}
        if self.kind == "codebook":
            table = tensors[f"table_{bits}"]
            table.flatten()[:] = self.scales[bits].view(SCALE_DTYPE)[: table.numel()]
        else:
            self.handle.unpack_scales(bits, *_addresses(list(tensors.values())))
        return make_scales(self.kind, bits, tensors)

    @classmethod
    def multiply(cls, x: Tensor, weights: Sequence[Any], bits: int | Tensor, kernel: Kernel) -> list[Tensor]:
        rows = x.shape[:-1].numel()
        if rows == 0:
            return [x.new_empty(*x.shape[:-1], weight.out_features) for weight in weights]
        limit = kernel.steady(x.dtype)
        if limit is None or rows <= limit:
            return _from_planes(x, rows, weights, bits, kernel)
        flat = x.reshape(rows, x.shape[-1])
        ys = [weight._from_tiles(flat, bits, kernel) for weight in weights]
        return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]

    def _from_tiles(self, x: Tensor, bits: int | Tensor, kernel: Kernel) -> Tensor:
        """x [rows, K] -> [rows, N] by the decoded weight."""
        if isinstance(bits, Tensor):
            y = x.new_empty(x.shape[0], self.out_features)
            check_row_bits(bits, self)
            for value in set(bits.tolist()):
                chosen = bits == value
                (y[chosen],) = self.multiply(x[chosen], [self], value, kernel)
            return y
        out_features, columns = self.out_features, self.in_features
        step = max(1, TILE_WEIGHTS // columns // BLOCK_ROWS) * BLOCK_ROWS
        tile = x.new_empty(min(step, out_features), columns)
        rows = x.shape[0]
        if x.dtype != torch.float32:
            x = torch.nn.functional.pad(x, (0, 0, 0, -rows % ROW_STEP))
        y = x.new_empty(x.shape[0], out_features)
        for first in range(0, out_features, step):
            last = min(out_features, first + step)
            self._decode(bits, first, last, tile)
            y[:, first:last] = torch.nn.functional.linear(x, tile[: last - first])
        return y[:rows]

    def _decode(self, bits: int, first: int, last: int, out: Tensor) -> None:
        """Rows first..last-1 into the first ones of `out` [n, K]."""
        isa = isa_of(self.kernel)
        self.handle.decode(isa, bits, first, last, out.data_ptr(), TYPES[out.dtype], torch.get_num_threads())

    def decode(self, bits: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        tile = torch.empty(last - first, self.in_features, dtype=dtype, device="cpu")
        self._decode(bits, first, last, tile)
        return tile

    def rows(self, index: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        index, isa = index.contiguous(), isa_of(self.kernel)
        result = torch.empty(len(index), self.in_features, dtype=dtype, device="cpu")
        where, threads = (index.data_ptr(), len(index), result.data_ptr()), torch.get_num_threads()
        self.handle.decode_rows(isa, bits, *where, TYPES[dtype], threads)
        return result


def isa_of(kernel: Kernel) -> str:
    """The instruction set of a CPU kernel: avx512 of avx512-exact."""
    return kernel.name.partition("-")[0]


def _from_planes(
    x: Tensor, rows: int, weights: Sequence[BlockedWeight], bits: int | Tensor, kernel: Kernel
) -> list[Tensor]:
    """The native product: x [..., K] of `rows` rows."""
    assert native is not None
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    leading = x.shape[:-1]
    ys = [x.new_empty(*leading, weight.out_features) for weight in weights]
    each = bits.contiguous() if isinstance(bits, Tensor) else None
    try:
        native.linear(
            isa_of(kernel),
            [weight.handle for weight in weights],
            x.data_ptr(),
            TYPES[x.dtype],
            x.stride(0) if x.dim() == 2 else x.shape[-1],
            rows,
            bits if each is None else 0,
            0 if each is None else each.data_ptr(),
            [y.data_ptr() for y in ys],
            torch.get_num_threads(),
            kernel.activations == "exact",
        )
    except ValueError:
        if each is not None:  # said in the words of this package
            for weight in weights:
                check_row_bits(each, weight)
        raise
    return ys


def _handle(out_features: int, in_features: int, group_size: int, kind: str) -> Any:
    """The extension's side of a weight."""
    assert native is not None
    return native.Weight(out_features, in_features, group_size, kind == "codebook", kind == "affine8")


def _pack_plane(handle: Any, plane: Tensor, room: Tensor) -> Tensor:
    plane = plane.contiguous()  # kept until it is read
    handle.pack_plane(_address(plane), _address(room), torch.get_num_threads())
    return room


def _pack_scales(handle: Any, bits: int, scales: Scales, room: Tensor) -> Tensor:
    if isinstance(scales, Codebook):
        room.view(SCALE_DTYPE).zero_()[: scales.table.numel()] = scales.table.flatten()
    else:
        tensors = [tensor.contiguous() for tensor in scales_tensors(scales, bits).values()]
        handle.pack_scales(bits, *_addresses(tensors), _address(room))
    return room


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, int, int]:
    """Of scale, offset and unit, which may be absent."""
    scale, offset, *unit = map(_address, tensors)
    return scale, offset, unit[0] if unit else 0


def _address(tensor: Tensor) -> int:
    if tensor.device.type != "cpu":
        raise ValueError(f"a weight for the CPU's kernels must be on the CPU, got a tensor on {tensor.device}")
    return tensor.data_ptr()


def _allocate_together(sizes: Sequence[int]) -> list[Tensor]:
    """Tensors of `sizes` bytes in one piece of memory, so that large pages serve small planes too."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT + (SKEW if size >= HUGE_PAGE // 4 else 0)
    whole = allocate(end)
    return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _allocate_page(size: int, place: int) -> Tensor:
    """Memory of its own for the plane `place`, or for scales: MAX_BITS.

    Lying at another distance from a page's start than its neighbours costs a page; small ones do without.
    """
    return allocate(size, STAGGER * place if size >= STAGGERED else 0)


def _expect(name: str, tensor: Tensor, count: int) -> None:
    """The kernels trust the addresses they get: everything about them is checked here."""
    dtype, device = tensor.dtype, tensor.device
    if dtype != torch.uint8 or tensor.numel() != count or not tensor.is_contiguous() or device.type != "cpu":
        raise ValueError(
            f"{name}: expected {count} contiguous entries of {torch.uint8} on the CPU, "
            f"got {dtype} {list(tensor.shape)} on {device}"
        )
