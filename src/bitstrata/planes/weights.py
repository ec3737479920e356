"""PlaneWeight: one linear layer's weight as shared bit-planes and one decoder per bits.

Planes are shared by all bits; a decoder belongs to one bits value and never touches a plane.
So the weight at `bits` depends on planes 0..bits-1 and on that one decoder, on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .pack import words_per_row

MAX_BITS = 8
SCALE_DTYPE = torch.float16


def group_count(columns: int, group_size: int) -> int:
    """Groups of `group_size` columns in a row; the last one may be shorter."""
    return -(-columns // group_size)


@dataclass(frozen=True)
class AffineDecoder:
    """W[n, k] = offset[n, j] + sum_i scale[i, n, j] * B_i[n, k], j the group of column k.

    scale: fp16 [bits, N, J]; offset: fp16 [N, J].
    """

    scale: Tensor
    offset: Tensor

    @property
    def nbytes(self) -> int:
        return self.scale.nbytes + self.offset.nbytes

    def tensors(self, bits: int) -> dict[str, Tensor]:
        """The decoder's tensors under the names they carry in a checkpoint."""
        return {f"scale_{bits}": self.scale, f"offset_{bits}": self.offset}


@dataclass(frozen=True)
class CodebookDecoder:
    """W[n, k] = table[n, code], code = the plane bits of (n, k), plane 0 the most significant.

    table: fp16 [N, 2**bits].
    """

    table: Tensor

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    def tensors(self, bits: int) -> dict[str, Tensor]:
        """The decoder's tensors under the names they carry in a checkpoint."""
        return {f"table_{bits}": self.table}


Decoder = AffineDecoder | CodebookDecoder


def decoder_shapes(kind: str, bits: int, rows: int, columns: int, group_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the fp16 tensors of a decoder of `kind` ("affine" or "codebook")."""
    if kind == "affine":
        groups = group_count(columns, group_size)
        return {f"scale_{bits}": (bits, rows, groups), f"offset_{bits}": (rows, groups)}
    if kind == "codebook":
        return {f"table_{bits}": (rows, 2**bits)}
    raise ValueError(f"unknown decoder {kind!r}; known: affine, codebook")


def make_decoder(kind: str, bits: int, tensors: Mapping[str, Tensor]) -> Decoder:
    """A decoder of `kind` from tensors named as in `decoder_shapes`."""
    if kind == "affine":
        return AffineDecoder(tensors[f"scale_{bits}"], tensors[f"offset_{bits}"])
    return CodebookDecoder(tensors[f"table_{bits}"])


@dataclass(frozen=True)
class PlaneWeight:
    """A weight [N, K]: `planes[i]` int32 [N, ceil(K/32)] and `decoders[bits]` for each supported bits.

    Raises ValueError at construction if a shape or dtype does not fit, naming what is wrong.
    """

    planes: tuple[Tensor, ...]
    decoders: Mapping[int, Decoder]
    in_features: int
    group_size: int

    def __post_init__(self) -> None:
        if not self.planes or not self.decoders:
            raise ValueError("a PlaneWeight needs at least one plane and one decoder")
        if self.group_size < 1 or self.in_features < 1:
            raise ValueError(f"group_size {self.group_size} and in_features {self.in_features} must be positive")
        if not all(1 <= bits <= MAX_BITS for bits in self.decoders) or len(self.planes) > MAX_BITS:
            raise ValueError(f"bits must lie in 1..{MAX_BITS}, got {sorted(self.decoders)}")
        if max(self.decoders) > len(self.planes):
            raise ValueError(f"bits {max(self.decoders)} needs as many planes, got {len(self.planes)}")
        expected = (self.out_features, words_per_row(self.in_features))
        for index, plane in enumerate(self.planes):
            if plane.dtype != torch.int32 or tuple(plane.shape) != expected:
                raise ValueError(f"plane_{index}: expected int32 {expected}, got {plane.dtype} {tuple(plane.shape)}")
        for bits, decoder in self.decoders.items():
            shapes = decoder_shapes(self.decoder_kind(bits), bits, self.out_features, self.in_features, self.group_size)
            for name, tensor in decoder.tensors(bits).items():
                if tensor.dtype != SCALE_DTYPE or tuple(tensor.shape) != shapes[name]:
                    raise ValueError(
                        f"{name}: expected {SCALE_DTYPE} {shapes[name]}, got {tensor.dtype} {tuple(tensor.shape)}"
                    )

    @property
    def out_features(self) -> int:
        return self.planes[0].shape[0]

    @property
    def bits(self) -> tuple[int, ...]:
        """The supported bits, ascending."""
        return tuple(sorted(self.decoders))

    def decoder_kind(self, bits: int) -> str:
        return "affine" if isinstance(self.decoders[bits], AffineDecoder) else "codebook"

    def prefix(self, max_bits: int) -> PlaneWeight:
        """The same weight without the planes and decoders above `max_bits`; ValueError if no decoder is left."""
        decoders = {bits: decoder for bits, decoder in self.decoders.items() if bits <= max_bits}
        if not decoders:
            raise ValueError(f"no decoder at or below {max_bits} bits; there are {list(self.bits)}")
        return PlaneWeight(self.planes[: max(decoders)], decoders, self.in_features, self.group_size)

    def rows(self, start: int, stop: int) -> PlaneWeight:
        """Rows start..stop-1 as a weight of their own; nothing is copied."""
        decoders: dict[int, Decoder] = {}
        for bits, decoder in self.decoders.items():
            if isinstance(decoder, AffineDecoder):
                decoders[bits] = AffineDecoder(decoder.scale[:, start:stop], decoder.offset[start:stop])
            else:
                decoders[bits] = CodebookDecoder(decoder.table[start:stop])
        return PlaneWeight(
            tuple(plane[start:stop] for plane in self.planes), decoders, self.in_features, self.group_size
        )

    def take(self, index: Tensor) -> PlaneWeight:
        """Rows `index` (int64 [n]) as a weight of their own, copied."""
        decoders: dict[int, Decoder] = {}
        for bits, decoder in self.decoders.items():
            if isinstance(decoder, AffineDecoder):
                scale, offset = decoder.scale.index_select(1, index), decoder.offset.index_select(0, index)
                decoders[bits] = AffineDecoder(scale, offset)
            else:
                decoders[bits] = CodebookDecoder(decoder.table.index_select(0, index))
        planes = tuple(plane.index_select(0, index) for plane in self.planes)
        return PlaneWeight(planes, decoders, self.in_features, self.group_size)

    def bytes_read(self, bits: int) -> int:
        """Bytes a matrix product at `bits` has to read: planes 0..bits-1 and that decoder."""
        return sum(plane.nbytes for plane in self.planes[:bits]) + self.decoders[bits].nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under the name it carries in a checkpoint, without the layer's prefix."""
        named = {f"plane_{index}": plane for index, plane in enumerate(self.planes)}
        for bits in self.bits:
            named.update(self.decoders[bits].tensors(bits))
        return named
