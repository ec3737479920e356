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

from ...planes.pack import words_per_row
from ...planes.weights import (
    SCALE_DTYPE,
    AffineDecoder,
    CodebookDecoder,
    Decoder,
    PlaneWeight,
    decoder_shapes,
    group_count,
)
from .extension import native

BLOCK_ROWS = 16
LAYOUT = "blocked"
HUGE_PAGE = 1 << 21
ALIGNMENT = 64  # a vector
SKEW = 4096 + 320  # planes are read side by side: at a distance of a power of two they would meet in the same banks


@dataclass(frozen=True)
class BlockedWeight:
    """A weight [N, K] whose planes and decoders lie as the CPU kernels read them.

    planes: uint8, flat; decoders[bits]: fp16, flat; kind: "affine" or "codebook".
    """

    planes: tuple[Tensor, ...]
    decoders: Mapping[int, Tensor]
    out_features: int
    in_features: int
    group_size: int
    kind: str
    handle: Any = field(init=False, repr=False, compare=False)
    layout = LAYOUT

    def __post_init__(self) -> None:
        assert native is not None
        codebook = self.kind == "codebook"
        handle = native.Weight(self.out_features, self.in_features, self.group_size, codebook)
        for index, plane in enumerate(self.planes):
            _expect(f"plane {index}", plane, torch.uint8, handle.plane_bytes)
            handle.set_plane(index, plane.data_ptr())
        for bits, decoder in self.decoders.items():
            if not 1 <= bits <= len(self.planes):
                raise ValueError(f"a decoder for {bits} bits needs as many planes, got {len(self.planes)}")
            _expect(f"decoder for {bits} bits", decoder, SCALE_DTYPE, handle.decoder_count(bits))
            handle.set_decoder(bits, decoder.data_ptr())
        object.__setattr__(self, "handle", handle)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockedWeight:
        return self._with(copy.deepcopy(self.planes, memo), copy.deepcopy(dict(self.decoders), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockedWeight.pack, (
            self.unpack(),
        )  # the tensors share one piece of memory, which pickle knows not to split

    def _with(self, planes: tuple[Tensor, ...], decoders: Mapping[int, Tensor]) -> BlockedWeight:
        return BlockedWeight(planes, decoders, self.out_features, self.in_features, self.group_size, self.kind)

    @property
    def bits(self) -> tuple[int, ...]:
        """The supported bits, ascending."""
        return tuple(sorted(self.decoders))

    def bytes_read(self, bits: int) -> int:
        """Bytes that a product at `bits` reads, padding included."""
        return sum(plane.nbytes for plane in self.planes[:bits]) + self.decoders[bits].nbytes

    @classmethod
    def pack(cls, weight: PlaneWeight) -> BlockedWeight:
        """Re-lay `weight`, whose tensors must be on the CPU; it is not changed.

        Raises ValueError if decoders of both kinds are mixed.
        """
        assert native is not None
        kinds = {weight.decoder_kind(bits) for bits in weight.bits}
        if len(kinds) > 1:
            raise ValueError("a weight with affine and codebook decoders cannot be packed")
        (kind,) = kinds
        threads = torch.get_num_threads()
        shape = (weight.out_features, weight.in_features, weight.group_size, kind == "codebook")
        layout = native.Weight(*shape)
        sizes = [layout.plane_bytes] * len(weight.planes)
        sizes += [SCALE_DTYPE.itemsize * layout.decoder_count(bits) for bits in weight.decoders]
        room = _allocate(sizes)
        planes = room[: len(weight.planes)]
        for plane, packed in zip(weight.planes, planes, strict=True):
            plane = plane.contiguous()  # kept until it is read
            layout.pack_plane(plane.data_ptr(), packed.data_ptr(), threads)
        decoders = {}
        for (bits, decoder), packed in zip(weight.decoders.items(), room[len(planes) :], strict=True):
            packed = packed.view(SCALE_DTYPE)
            if isinstance(decoder, AffineDecoder):
                scale, offset = decoder.scale.contiguous(), decoder.offset.contiguous()
                layout.pack_scales(scale.data_ptr(), offset.data_ptr(), bits, packed.data_ptr())
            else:
                packed.zero_()[: decoder.table.numel()] = decoder.table.flatten()
            decoders[bits] = packed
        return cls(tuple(planes), decoders, weight.out_features, weight.in_features, weight.group_size, kind)

    def unpack(self) -> PlaneWeight:
        """The weight as stored, in tensors of its own."""
        words = words_per_row(self.in_features)
        threads = torch.get_num_threads()
        planes = []
        for packed in self.planes:
            plane = torch.empty(self.out_features, words, dtype=torch.int32)
            self.handle.unpack_plane(packed.data_ptr(), plane.data_ptr(), threads)
            planes.append(plane)
        return PlaneWeight(
            tuple(planes), {bits: self._decoder(bits) for bits in self.bits}, self.in_features, self.group_size
        )

    def _decoder(self, bits: int) -> Decoder:
        packed = self.decoders[bits]
        if self.kind == "codebook":
            (shape,) = decoder_shapes(self.kind, bits, self.out_features, self.in_features, self.group_size).values()
            return CodebookDecoder(packed[: shape[0] * shape[1]].view(shape).clone())
        groups = group_count(self.in_features, self.group_size)
        scale = torch.empty(bits, self.out_features, groups, dtype=SCALE_DTYPE)
        offset = torch.empty(self.out_features, groups, dtype=SCALE_DTYPE)
        self.handle.unpack_scales(packed.data_ptr(), bits, scale.data_ptr(), offset.data_ptr())
        return AffineDecoder(scale, offset)


def _allocate(sizes: Sequence[int]) -> list[Tensor]:
    """Uninitialised uint8 tensors of `sizes` bytes in one piece of memory, in large pages where the system has them."""
    assert native is not None
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT + (SKEW if size >= HUGE_PAGE // 4 else 0)
    whole = torch.empty(end + (HUGE_PAGE if end >= HUGE_PAGE else ALIGNMENT), dtype=torch.uint8)
    skip = -whole.data_ptr() % (HUGE_PAGE if end >= HUGE_PAGE else ALIGNMENT)
    huge = end // HUGE_PAGE * HUGE_PAGE
    if huge:
        native.advise_huge(whole.data_ptr() + skip, huge)
    return [whole[skip + start : skip + start + size] for start, size in zip(starts, sizes, strict=True)]


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    """The kernels trust the addresses they get: everything about them is checked here."""
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected {count} contiguous entries of {dtype} on the CPU, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
