"""TiledWeight: a PlaneWeight re-laid so that a warp's loads are wide and its registers need no shuffling.

The unit of everything is a tile of 16 rows by 256 columns of one plane, 512 contiguous bytes, which a warp reads
with one 128-bit load a lane. A lane's four words then hold exactly the weights that the tensor cores' 16-row operand
wants in that lane, so that decoding is shifts and masks on registers:

    tile     [8 g, 4 t, 2 h, 2 v] words: rows 8 h + g; lane 4 g + t; v the 128-column half
    word     bit 4 c + e // 2 + 16 (e % 2) is column 128 v + 32 c + 8 t + e of the tile (c in 0..3, e in 0..7)

Two neighbouring columns are 16 bits apart: one mask turns a shifted word into a pair of 16-bit numbers. Columns are
padded so that a group starts at a multiple of its unit, the largest of 32, 64, 128 that a group fills: a unit has
one scale. A group of 64 or 128 has no padding, one of 43 becomes 64.

    planes[i]        int32, flat: [blocks of 16 rows, chunks of 256 columns, 128 words]
    scales[bits]   affine: fp16 or int8, flat: [blocks, groups, bits + 1, 8 g, 2 h], the offset last;
                     affine8 up to BYTE_BITS: int8 as above, then the rows' units, fp16 [blocks, 8 g, 2 h], as bytes;
                     codebook: fp16, flat: [rows, 2^bits], in the stored order

Padding is zeros: rows without weights and columns that only meet activations that are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...planes.pack import pack_bits, unpack_bits
from ...planes.weights import (
    BYTE_BITS,
    SCALE_DTYPE,
    AffineScales,
    ByteScales,
    Codebook,
    PlaneWeight,
    Scales,
    group_count,
)
from ..registry import Kernel
from ..weight import Weight

FEW_ROWS = 16  # up to here rows are multiplied plane by plane, from the planes
DENSE_ROWS = 512  # from here on a whole decoded weight pays for being written and read again
BLOCK_ROWS = 16
CHUNK = 256  # columns of a tile
HALF = 128
TILE_WORDS = BLOCK_ROWS * CHUNK // 32
STEP = 1 << 24  # weights re-laid at a time: bounds the temporaries, which take a byte a weight


class TiledWeight(Weight):
    """A weight [N, K] in the order of the Triton kernels; see the head of this file.

    rows <= FEW_ROWS         plane by plane on the tensor cores (few_rows.py); also any number of rows at their own bits
    rows <  DENSE_ROWS       weights decoded in registers, tile by tile (decoding.py)
    more, or float32         the whole weight decoded to memory, then the platform's matrix product
    """

    layout = "tiled"
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})

    def _attach(self) -> None:
        for index, plane in enumerate(self.planes):
            _expect(f"plane {index}", plane, torch.int32, self.blocks * self.chunks * TILE_WORDS)
        for bits, packed in self.scales.items():
            _expect(f"scales for {bits} bits", packed, *self._scales_size(bits))

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return -(-self.out_features // BLOCK_ROWS)

    @property
    def group(self) -> int:
        """Columns that share coefficients: all of them in a codebook."""
        return self.in_features if self.kind == "codebook" else min(self.group_size, self.in_features)

    @property
    def groups(self) -> int:
        return group_count(self.in_features, self.group)

    @property
    def unit(self) -> int:
        """Columns, after padding, that one step multiplies by one scale: 32, 64 or 128."""
        return next((size for size in (32, 64) if self.group <= size), HALF)

    @property
    def group_units(self) -> int:
        """Units of a group, padding included."""
        return -(-self.group // self.unit)

    @property
    def chunks(self) -> int:
        """Tiles side by side."""
        return -(-self.groups * self.group_units * self.unit // CHUNK)

    @property
    def padded(self) -> bool:
        """Whether there is padding between groups: columns are not where they were."""
        return self.groups > 1 and self.group % self.unit != 0

    def units_of(self, bits: int) -> Tensor | None:
        """The rows' units of scales of bytes, fp16 [blocks * 16] in the order of its coefficients; else None."""
        if self.kind != "affine8" or bits > BYTE_BITS:
            return None
        units: Tensor = self.scales[bits][self._coefficients(bits) :].view(SCALE_DTYPE)
        return units

    def spread(self, x: Tensor) -> Tensor:
        """Columns [..., K] moved to where the tiles have them, zeros between: [..., chunks * 256]."""
        width = self.group_units * self.unit
        x = pad(x, (0, self.groups * self.group - self.in_features)).unflatten(-1, (self.groups, self.group))
        x = pad(x, (0, width - self.group)).flatten(-2)
        return pad(x, (0, self.chunks * CHUNK - self.groups * width))

    @classmethod
    def pack(cls, weight: PlaneWeight, kernel: Kernel, *, apart: bool = False) -> Self:
        """`weight` re-laid on the device where it is."""
        shape = weight.out_features, weight.in_features, weight.group_size, weight.kind
        order = cls((), {}, *shape, kernel)
        planes = tuple(map(order._pack_plane, weight.planes))
        scales = {bits: order._pack_scales(found) for bits, found in weight.scales.items()}
        return cls(planes, scales, *shape, kernel)

    def with_pages(self, bits: int, planes: Sequence[Tensor], scales: Scales) -> Self:
        self.check_pages(bits, planes, scales)
        held = (*self.planes[:bits], *map(self._pack_plane, planes))
        shape = self.out_features, self.in_features, self.group_size, self.kind_with(scales)
        return type(self)(held, {bits: self._pack_scales(scales)}, *shape, self.kernel)

    @classmethod
    def multiply(cls, x: Tensor, weights: Sequence[Any], bits: int | Tensor, kernel: Kernel) -> list[Tensor]:
        leading, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
        if len(flat) == 0:
            return [x.new_empty(*leading, weight.out_features) for weight in weights]
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        with _current(x.device):
            ys = [weight._product(flat, bits) for weight in weights]
        return ys if x.dim() == 2 else [y.view(*leading, y.shape[1]) for y in ys]

    def _product(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """x [rows, K] -> [rows, N]."""
        launch, rows = _launch(), len(x)
        if isinstance(bits, Tensor) or rows <= FEW_ROWS:
            y: Tensor = launch.few_rows(x, self, bits)
        elif rows < DENSE_ROWS and x.dtype != torch.float32:
            y = launch.tiles(x, self, bits)
        else:
            y = torch.nn.functional.linear(x, launch.decode(self, bits, x.dtype))
        return y

    def decode(self, bits: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.rows(torch.arange(first, last, device=self.device), bits, dtype)

    def rows(self, index: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """An index on a device that is out of range gives the nearest row."""
        with _current(index.device):
            found: Tensor = _launch().decode(self, bits, dtype, index)
        return found

    def stored(self) -> PlaneWeight:
        """The weight as the checkpoint has it, in tensors of its own."""
        per_block = self.chunks * TILE_WORDS
        planes = tuple(
            torch.cat(
                [
                    self._untile(plane[start // BLOCK_ROWS * per_block : -(-stop // BLOCK_ROWS) * per_block])[
                        : stop - start
                    ]
                    for start, stop in self._steps()
                ]
            )
            for plane in self.planes
        )
        scales = {bits: self._unpack_scales(bits) for bits in self.scales}
        return PlaneWeight(planes, scales, self.in_features, self.group_size)

    def _steps(self) -> Iterator[tuple[int, int]]:
        step = max(1, STEP // (self.chunks * CHUNK) // BLOCK_ROWS) * BLOCK_ROWS
        for start in range(0, self.out_features, step):
            yield start, min(start + step, self.out_features)

    def _pack_plane(self, plane: Tensor) -> Tensor:
        """A stored plane -> flat tiles."""
        return torch.cat([self._tile(plane[start:stop]) for start, stop in self._steps()])

    def _tile(self, plane: Tensor) -> Tensor:
        """Stored words of consecutive rows, starting at a multiple of 16 -> flat tiles."""
        bits = self.spread(unpack_bits(plane, self.in_features))
        bits = pad(bits, (0, 0, 0, -len(bits) % BLOCK_ROWS))
        # n = (block, h, g); column = (chunk, v, c, t, e // 2, e % 2)
        bits = bits.view(-1, 2, 8, self.chunks, 2, 4, 4, 4, 2).permute(0, 3, 2, 6, 1, 4, 8, 5, 7)
        return pack_bits(bits.flatten(-3)).flatten()

    def _untile(self, tiles: Tensor) -> Tensor:
        """Flat tiles of whole blocks -> stored words [rows, ceil(K/32)]."""
        bits = unpack_bits(tiles.view(-1, 1), 32)
        bits = bits.view(-1, self.chunks, 8, 4, 2, 2, 2, 4, 4).permute(0, 4, 2, 1, 5, 7, 3, 8, 6)
        width = self.group_units * self.unit
        bits = bits.reshape(-1, self.chunks * CHUNK)[:, : self.groups * width]
        bits = bits.unflatten(1, (self.groups, width))[..., : self.group].flatten(1)
        return pack_bits(bits[:, : self.in_features])

    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]  # there torch.cat takes no fp16
    def _pack_scales(self, scales: Scales) -> Tensor:
        if isinstance(scales, Codebook):
            return scales.table.contiguous().flatten()
        extra = self.blocks * BLOCK_ROWS - self.out_features
        values = pad(torch.cat([scales.scale, scales.offset.unsqueeze(0)]), (0, 0, 0, extra))  # [bits + 1, rows, J]
        values = values.view(len(values), self.blocks, 2, 8, self.groups).permute(1, 4, 0, 3, 2).flatten()
        if isinstance(scales, AffineScales):
            return values.contiguous()
        units = pad(scales.unit, (0, extra)).view(self.blocks, 2, 8).transpose(1, 2).flatten()
        return torch.cat([values, units.view(torch.int8)])

    def _unpack_scales(self, bits: int) -> Scales:
        stored, rows = self.scales[bits], self.out_features
        if self.kind == "codebook":
            return Codebook(stored.view(rows, 2**bits).clone())
        values = stored[: self._coefficients(bits)].view(self.blocks, self.groups, bits + 1, 8, 2)
        values = values.permute(2, 0, 4, 3, 1).reshape(bits + 1, -1, self.groups)[:, :rows]
        scale, offset = values[:-1].clone(), values[-1].clone()
        units = self.units_of(bits)
        if units is None:
            return AffineScales(scale, offset)
        unit = units.view(self.blocks, 8, 2).transpose(1, 2).flatten()[:rows]
        return ByteScales(scale, offset, unit.clone())

    def _coefficients(self, bits: int) -> int:
        return self.blocks * self.groups * (bits + 1) * BLOCK_ROWS

    def _scales_size(self, bits: int) -> tuple[torch.dtype, int]:
        """Dtype and entries of scales's tensor."""
        if self.kind == "codebook":
            return SCALE_DTYPE, self.out_features * 2**bits
        if self.kind == "affine8" and bits <= BYTE_BITS:
            return torch.int8, self._coefficients(bits) + 2 * self.blocks * BLOCK_ROWS
        return SCALE_DTYPE, self._coefficients(bits)


def _launch() -> ModuleType:
    """The module that imports triton: most machines do not have it."""
    from . import launch

    return launch


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are: make it `device`."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    """The kernels trust the addresses they get: everything about them is checked here."""
    if tensor.dtype != dtype or tensor.numel() != count or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected {count} contiguous entries of {dtype}, got {tensor.dtype} {list(tensor.shape)}"
        )
