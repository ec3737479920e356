"""BlockedWeight: a PlaneWeight re-laid for the CPU kernels (native/generic/layout.h).

The same bits and the same fp16 numbers in another order, padded to blocks of 16 rows and units of
128 columns; `unpack` gives the original back, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from ..registry import check_pages
from .extension import native

BLOCK_ROWS = 16
LAYOUT = "blocked"
ALIGNMENT = 64  # a vector
STAGGER = 320  # planes are read side by side: at a distance of a power of two they would meet in the same banks
STAGGERED = 1 << 18  # bytes from which a plane of its own memory is kept apart from the others so
SKEW = 4096 + STAGGER


@dataclass(frozen=True)
class BlockedWeight:
    """A weight [N, K] whose planes and scales lie as the CPU kernels read them.

    planes, scales[bits]: uint8, flat; kind: that of the PlaneWeight.
    """

    planes: tuple[Tensor, ...]
    scales: Mapping[int, Tensor]
    out_features: int
    in_features: int
    group_size: int
    kind: str
    handle: Any = field(init=False, repr=False, compare=False)
    layout = LAYOUT

    def __post_init__(self) -> None:
        assert native is not None
        handle = native.Weight(self.out_features, self.in_features, self.group_size, *_flags(self.kind))
        for index, plane in enumerate(self.planes):
            _expect(f"plane {index}", plane, handle.plane_bytes)
            handle.set_plane(index, plane.data_ptr())
        for bits, scales in self.scales.items():
            if not 1 <= bits <= len(self.planes):
                raise ValueError(f"scales for {bits} bits needs as many planes, got {len(self.planes)}")
            _expect(f"scales for {bits} bits", scales, handle.scales_bytes(bits))
            handle.set_scales(bits, scales.data_ptr())
        object.__setattr__(self, "handle", handle)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockedWeight:
        return self._with(copy.deepcopy(self.planes, memo), copy.deepcopy(dict(self.scales), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockedWeight.pack, (
            self.unpack(),
        )  # the tensors share one piece of memory, which pickle knows not to split

    def _with(self, planes: tuple[Tensor, ...], scales: Mapping[int, Tensor]) -> BlockedWeight:
        return BlockedWeight(planes, scales, self.out_features, self.in_features, self.group_size, self.kind)

    @property
    def bits(self) -> tuple[int, ...]:
        """The supported bits, ascending."""
        return tuple(sorted(self.scales))

    def bytes_read(self, bits: int) -> int:
        """Bytes that a product at `bits` reads, padding included."""
        return sum(plane.nbytes for plane in self.planes[:bits]) + self.scales[bits].nbytes

    @classmethod
    def pack(cls, weight: PlaneWeight) -> BlockedWeight:
        """Re-lay `weight`, whose tensors must be on the CPU; it is not changed.

        Raises ValueError if scales of both kinds are mixed, or a tensor is elsewhere.
        """
        assert native is not None
        kind = weight.kind
        if len({scales.kind == "codebook" for scales in weight.scales.values()}) > 1:
            raise ValueError("a weight with affine and codebook scales cannot be packed")
        threads = torch.get_num_threads()
        layout = native.Weight(weight.out_features, weight.in_features, weight.group_size, *_flags(kind))
        sizes = [layout.plane_bytes] * len(weight.planes)
        sizes += [layout.scales_bytes(bits) for bits in weight.scales]
        room = _allocate(sizes)
        planes = room[: len(weight.planes)]
        for plane, packed in zip(weight.planes, planes, strict=True):
            _pack_plane(layout, plane, packed, threads)
        packed_scales = {}
        for (bits, scales), packed in zip(weight.scales.items(), room[len(planes) :], strict=True):
            _pack_scales(layout, bits, scales, packed)
            packed_scales[bits] = packed
        return cls(tuple(planes), packed_scales, weight.out_features, weight.in_features, weight.group_size, kind)

    def with_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> BlockedWeight:
        """See PreparedWeight. Each tensor has memory of its own, so that dropping it gives its memory back."""
        check_pages(self, bits, planes, scales)
        kept, threads = self.planes[:bits], torch.get_num_threads()
        added = []
        for index, plane in enumerate(planes, len(kept)):
            packed = _allocate_page(self.handle.plane_bytes, index)
            _pack_plane(self.handle, plane, packed, threads)
            added.append(packed)
        packed = _allocate_page(self.handle.scales_bytes(bits), MAX_BITS)
        _pack_scales(self.handle, bits, scales, packed)
        return self._with((*kept, *added), {bits: packed})

    def unpack(self) -> PlaneWeight:
        """The weight as stored, in tensors of its own."""
        words = words_per_row(self.in_features)
        threads = torch.get_num_threads()
        planes = []
        for packed in self.planes:
            plane = torch.empty(self.out_features, words, dtype=torch.int32, device="cpu")
            self.handle.unpack_plane(packed.data_ptr(), plane.data_ptr(), threads)
            planes.append(plane)
        return PlaneWeight(
            tuple(planes), {bits: self._scales(bits) for bits in self.bits}, self.in_features, self.group_size
        )

    def _scales(self, bits: int) -> Scales:
        shapes = scales_shapes(self.kind, bits, self.out_features, self.in_features, self.group_size)
        tensors = {name: torch.empty(shape, dtype=dtype, device="cpu") for name, (dtype, shape) in shapes.items()}
        if self.kind == "codebook":
            table = tensors[f"table_{bits}"]
            table.flatten()[:] = self.scales[bits].view(SCALE_DTYPE)[: table.numel()]
        else:
            self.handle.unpack_scales(bits, *_addresses(list(tensors.values())))
        return make_scales(self.kind, bits, tensors)


def _pack_plane(layout: Any, plane: Tensor, packed: Tensor, threads: int) -> None:
    plane = plane.contiguous()  # kept until it is read
    layout.pack_plane(_address(plane), _address(packed), threads)


def _pack_scales(layout: Any, bits: int, scales: Scales, packed: Tensor) -> None:
    if isinstance(scales, Codebook):
        packed.view(SCALE_DTYPE).zero_()[: scales.table.numel()] = scales.table.flatten()
    else:
        tensors = [tensor.contiguous() for tensor in scales_tensors(scales, bits).values()]
        layout.pack_scales(bits, *_addresses(tensors), _address(packed))


def _flags(kind: str) -> tuple[bool, bool]:
    """What the extension calls a kind: codebook, bytes."""
    return kind == "codebook", kind == "affine8"


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, int, int]:
    """Of scale, offset and unit, which may be absent."""
    scale, offset, *unit = map(_address, tensors)
    return scale, offset, unit[0] if unit else 0


def _address(tensor: Tensor) -> int:
    if tensor.device.type != "cpu":
        raise ValueError(f"a weight for the CPU's kernels must be on the CPU, got a tensor on {tensor.device}")
    return tensor.data_ptr()


def _allocate(sizes: Sequence[int]) -> list[Tensor]:
    """Uninitialised uint8 tensors of `sizes` bytes in one piece of memory, in large pages where the system has them."""
    assert native is not None
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT + (SKEW if size >= HUGE_PAGE // 4 else 0)
    room = end + (HUGE_PAGE if end >= HUGE_PAGE else ALIGNMENT)
    whole = torch.empty(room, dtype=torch.uint8, device="cpu")  # whatever torch's default device is
    skip = -whole.data_ptr() % (HUGE_PAGE if end >= HUGE_PAGE else ALIGNMENT)
    huge = end // HUGE_PAGE * HUGE_PAGE
    if huge:
        native.advise_huge(whole.data_ptr() + skip, huge)
    return [whole[skip + start : skip + start + size] for start, size in zip(starts, sizes, strict=True)]


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
