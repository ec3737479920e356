"""Tensors of a source that are stored in few bits or in another form, read as the numbers they stand for.

    fp8 with block scales     weight fp8 [..., N, K] and weight_scale_inv [..., ceil(N / n), ceil(K / k)], a scale for
                              each block of n x k (128 x 128 as a rule), each row, or the whole tensor
    MXFP4                     <name>_blocks uint8 [E, N, G, 16], two numbers a byte, the low half first, and
                              <name>_scales uint8 [E, N, G]: 32 numbers share 2^(scale - 127). As transformers has it,
                              <name> is [E, 32 G, N], the other way round

    weight = number x scale, in fp32: exact where the scale is a power of two, else rounded once

    in another form           what transformers merges, splits or turns when it loads it: transformers does it here too,
                              in the dtype that is stored

A scale may be any floating dtype, or a byte that is an exponent (E8M0). A stretch of rows is read at a time. Every
other layout of few bits is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, first_line
from .compat import Conversion

METHODS = ("fp8", "mxfp4")  # quant_method of configs whose weights are read here
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SCALES = ("_scale_inv", "_scale")  # after the weight's name
BESIDE = ("activation_scale", "input_scale", "k_scale", "v_scale")  # of activations: the weights do without
BLOCK = (128, 128)
# sign, two bits of exponent, one of fraction
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

Spec = tuple[str, tuple[int, ...]]  # dtype as safetensors calls it, shape
Held = tuple[torch.dtype, tuple[int, ...]]  # dtype, shape
Rows = Callable[[str, int, int], Tensor]  # a stored tensor's name, first row, last row + 1


@dataclass(frozen=True)
class BlockScaled:
    """fp8 numbers [..., N, K] times a scale a block of `block`; `shape` is theirs, `grid` that of the scales."""

    name: str
    scale: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    block: tuple[int, int]
    dtype = torch.float32

    @property
    def parts(self) -> tuple[str, ...]:
        return self.name, self.scale

    def rows(self, start: int, stop: int, stored: Rows) -> Tensor:
        """Rows start..stop-1 along the first dimension, fp32."""
        numbers = stored(self.name, start, stop).float()
        if len(self.shape) == 2:  # the first dimension is that of the blocks' rows
            first = start // self.block[0] if self.grid else 0
            last = -(-stop // self.block[0])
            scales = _scales(stored(self.scale, first, last)) if self.grid else _scales(stored(self.scale, 0, 1))
            return numbers * self._spread(scales, start - first * self.block[0], stop - start)
        scales = _scales(stored(self.scale, start, stop))
        return numbers * self._spread(scales, 0, self.shape[-2])

    def _spread(self, scales: Tensor, skip: int, count: int) -> Tensor:
        """A scale for each of `count` rows after the first `skip`, and for each column."""
        if not self.grid:
            return scales.reshape(())
        rows = scales.repeat_interleave(self.block[0], -2).narrow(-2, skip, count)
        return rows.repeat_interleave(self.block[1], -1)[..., : self.shape[-1]]


@dataclass(frozen=True)
class MicroScaled:
    """4-bit numbers, 32 of which share an exponent; `shape` is what transformers makes of them: [E, K, N]."""

    name: str
    shape: tuple[int, ...]
    dtype = torch.float32

    @property
    def parts(self) -> tuple[str, ...]:
        return f"{self.name}_blocks", f"{self.name}_scales"

    def rows(self, start: int, stop: int, stored: Rows) -> Tensor:
        """Entries start..stop-1 along the first dimension, fp32."""
        blocks, exponents = (stored(part, start, stop) for part in self.parts)
        halves = torch.stack([blocks & 15, blocks >> 4], -1)  # [e, N, G, 16, 2]
        numbers = FP4[halves.int()].flatten(-2) * _scales(exponents).unsqueeze(-1)  # [e, N, G, 32]
        return numbers.flatten(-2).transpose(-1, -2)


@dataclass(frozen=True)
class Converted:
    """A tensor of the model that transformers makes of `parts` when it loads them, perhaps along with others.

    first: name of the first tensor made. rows_of: how many rows each part has.
    """

    name: str
    first: str
    parts: tuple[str, ...]
    rows_of: tuple[int, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    conversion: Conversion

    def rows(self, start: int, stop: int, stored: Rows) -> Tensor:
        """Rows start..stop-1. Reads the same rows of the parts if they are enough, else the whole parts."""
        if self.conversion.by_rows:
            return self._of([stored(part, start, stop) for part in self.parts])
        return self._of([stored(part, 0, rows) for part, rows in zip(self.parts, self.rows_of, strict=True)])[
            start:stop
        ].clone()

    def _of(self, tensors: list[Tensor]) -> Tensor:
        return self.conversion(self.first, tensors)[self.name]


def converted(first: str, parts: Sequence[str], specs: Sequence[Held], conversion: Conversion) -> dict[str, Converted]:
    """Name of every tensor that `conversion` makes of `parts` -> how; `first` is the name of the first.

    Args:
        specs: dtype and shape of each part.

    Raises ModelError, naming a part, for parts that it cannot be done with.
    """
    try:
        made = conversion(first, [torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in specs])
    except Exception as error:
        raise ModelError(
            f"{parts[0]} {list(specs[0][1])} cannot be made into {first}: {first_line(error)}",
            hint="config.json and the weights are of different models",
        ) from error
    rows = tuple(shape[0] if shape else 0 for _, shape in specs)
    return {
        name: Converted(name, first, tuple(parts), rows, tensor.dtype, tuple(tensor.shape), conversion)
        for name, tensor in made.items()
    }


FewBits = BlockScaled | MicroScaled
Packed = FewBits | Converted


def _scales(stored: Tensor) -> Tensor:
    """Scales as fp32; bytes are exponents."""
    return torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()


def find_packed(specs: Mapping[str, Spec], settings: Mapping[str, Any]) -> dict[str, FewBits]:
    """Name of every weight that is stored in few bits -> how.

    Args:
        specs: of all stored tensors.
        settings: the config's quantization_config.

    Raises ModelError, naming the tensor, for one without scales or with scales that do not fit it.
    """
    found: dict[str, FewBits] = {}
    for name, (dtype, shape) in specs.items():
        if dtype in FP8:
            found[name] = _block_scaled(name, shape, specs, settings)
        elif name.endswith("_blocks") and dtype == "U8":
            found[name.removesuffix("_blocks")] = _micro_scaled(name.removesuffix("_blocks"), shape, specs)
    return found


def _block_scaled(
    name: str, shape: tuple[int, ...], specs: Mapping[str, Spec], settings: Mapping[str, Any]
) -> BlockScaled:
    scale = next((name + end for end in SCALES if name + end in specs), None)
    if scale is None:
        raise ModelError(
            f"{name} is stored in fp8 without scales: there is no {name}{SCALES[0]}",
            hint="fp8 numbers mean nothing without their scales; download the model again, or use it in bf16",
        )
    grid = specs[scale][1]
    if torch.Size(grid).numel() == 1 and len(shape) == 2:
        return BlockScaled(name, scale, shape, (), shape[-2:])
    for block in _blocks(shape, grid, settings):
        if len(grid) == len(shape) >= 2 and grid == (
            *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
        ):  # fmt: skip
            return BlockScaled(name, scale, shape, grid, block)
    raise ModelError(
        f"{scale} {list(grid)} does not fit {name} {list(shape)}: no scale a block, a row or a tensor",
        hint="weight_block_size in the quantization_config of config.json says how large a block is",
    )


def _blocks(shape: tuple[int, ...], grid: tuple[int, ...], settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Sizes of a block that the scales may be for, the config's first."""
    said = settings.get("weight_block_size")
    named = [(said[0], said[1])] if isinstance(said, (list, tuple)) and len(said) == 2 and min(said) > 0 else [BLOCK]
    even = [(size // parts) for size, parts in zip(shape[-2:], grid[-2:], strict=False) if parts]
    return [*named, (even[0], even[1])] if len(even) == 2 and min(even) > 0 else named


def _micro_scaled(name: str, blocks: tuple[int, ...], specs: Mapping[str, Spec]) -> MicroScaled:
    dtype, scales = specs.get(f"{name}_scales", ("", ()))
    if dtype != "U8":
        raise ModelError(
            f"{name}_blocks is stored in MXFP4 without scales: there is no {name}_scales of bytes",
            hint="download the model again, or use it in bf16",
        )
    if len(blocks) != 4 or blocks[-1] != 16 or scales != blocks[:-1]:
        raise ModelError(
            f"{name}_blocks {list(blocks)} and {name}_scales {list(scales)} are not MXFP4: 16 bytes a scale",
            hint="download the model again, or use it in bf16",
        )
    experts, outputs, groups, _ = blocks
    return MicroScaled(name, (experts, 32 * groups, outputs))
