"""The CPU kernels as the registry knows them: one for each instruction set, in three variants.

    <isa>         up to FEW_ROWS rows from the planes, with int8 activations and byte levels;
                  more rows through tiles of the decoded weight and the platform's matrix product
    <isa>-int8    any number of rows from the planes: shows what int8 activations cost
    <isa>-exact   any number of rows from the planes with float32 activations and weights, for checking

The variants only run when they are forced. How int8 activations and byte levels work, and the
error they may make, is in native/generic/activations.h and tables.h:

    |y - x W^T| <= sum over chunks of x_scale/2 * sum|W| + step/2 * sum|x|
    with x_scale = max|x| / 127 of a chunk (a quarter of a group, at most 32 columns), and
    step = (largest - smallest weight that the group's scales can make) / level_max, level_max 252
    or more (120 or more without a byte dot product that takes unsigned levels to 255: avx2)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...planes.decode import decode
from ...planes.weights import PlaneWeight
from ..registry import PreparedWeight, Problem
from .blocked import BLOCK_ROWS, LAYOUT, BlockedWeight
from .extension import native

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FEW_ROWS = 16
TILE_WEIGHTS = 1 << 22  # decoded at a time for many rows: 8 MB in bf16
# For 16-bit matrix products torch's oneDNN compiles a kernel for each number of rows that it meets, and keeps it: a
# server's memory would grow with every new length of a prompt (benchmarks/serving.py --soak). So rows come in steps.
ROW_STEP = 32


class CpuKernel:
    """The kernels of one instruction set in one variant: "", "int8" or "exact"."""

    layout = LAYOUT

    def __init__(self, isa: str, priority: int, reason: str | None, variant: str = "") -> None:
        self.isa, self.variant = isa, variant
        self.name = f"{isa}-{variant}" if variant else isa
        self.priority = -1 if variant else priority
        self.activations = "exact" if variant == "exact" else "int8"
        self.steady_rows = None if variant else FEW_ROWS
        self._reason = reason

    def arithmetic(self, rows: int) -> str:
        return "exact" if not self.variant and rows > FEW_ROWS else self.activations

    def can_run(self, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return f"tensors are on {problem.device}"
        if self._reason is not None:
            return self._reason
        if problem.dtype not in TYPES:
            return f"activations are {problem.dtype}; float32, float16 and bfloat16 can be used"
        return None

    def prepare(self, weight: PlaneWeight) -> PreparedWeight:
        return BlockedWeight.pack(weight)

    def linear(self, x: Tensor, weight: PlaneWeight | BlockedWeight, bits: int) -> Tensor:
        return self.linear_many(x, [_blocked(weight)], bits)[0]

    def linear_rows(self, x: Tensor, weight: PlaneWeight | BlockedWeight, row_bits: Tensor) -> Tensor:
        return self.linear_many(x, [_blocked(weight)], row_bits)[0]

    def linear_many(self, x: Tensor, weights: Sequence[BlockedWeight], bits: int | Tensor) -> list[Tensor]:
        """x [rows, K] times each of `weights`, which share K and groups: [rows, N_i] each, in x's dtype."""
        rows, columns = x.shape
        if any(weight.in_features != columns for weight in weights):
            raise ValueError(f"expected x [rows, {weights[0].in_features}], got {list(x.shape)}")
        if rows == 0:
            return [x.new_empty(0, weight.out_features) for weight in weights]
        if self.variant or rows <= FEW_ROWS:
            return self._from_planes(x, weights, bits)
        if isinstance(bits, Tensor):
            return [self._tiles_of_rows(x, weight, bits) for weight in weights]
        return [self._from_tiles(x, weight, bits) for weight in weights]

    def _from_planes(self, x: Tensor, weights: Sequence[BlockedWeight], bits: int | Tensor) -> list[Tensor]:
        assert native is not None
        if x.stride(1) != 1:
            x = x.contiguous()
        ys = [x.new_empty(x.shape[0], weight.out_features) for weight in weights]
        row_bits = None
        if isinstance(bits, Tensor):
            row_bits = bits.to(device="cpu", dtype=torch.int8).contiguous()
            bits = 0
        native.linear(
            self.isa,
            [weight.handle for weight in weights],
            x.data_ptr(),
            TYPES[x.dtype],
            x.stride(0),
            x.shape[0],
            bits,
            0 if row_bits is None else row_bits.data_ptr(),
            [y.data_ptr() for y in ys],
            torch.get_num_threads(),
            self.activations == "exact",
        )
        return ys

    def _from_tiles(self, x: Tensor, weight: BlockedWeight, bits: int) -> Tensor:
        out_features, columns = weight.out_features, weight.in_features
        step = max(1, TILE_WEIGHTS // columns // BLOCK_ROWS) * BLOCK_ROWS
        tile = x.new_empty(min(step, out_features), columns)
        rows = x.shape[0]
        if x.dtype != torch.float32:
            x = torch.nn.functional.pad(x, (0, 0, 0, -rows % ROW_STEP))
        y = x.new_empty(x.shape[0], out_features)
        for first in range(0, out_features, step):
            last = min(out_features, first + step)
            weight.handle.decode(self.isa, bits, first, last, tile.data_ptr(), TYPES[x.dtype], torch.get_num_threads())
            y[:, first:last] = torch.nn.functional.linear(x, tile[: last - first])
        return y[:rows]

    def decode(
        self, weight: PlaneWeight | BlockedWeight, bits: int, first: int, last: int, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(weight, PlaneWeight):
            return decode(weight.outputs(first, last), bits, dtype)
        tile = torch.empty(last - first, weight.in_features, dtype=dtype, device="cpu")
        weight.handle.decode(self.isa, bits, first, last, tile.data_ptr(), TYPES[dtype], torch.get_num_threads())
        return tile

    def lookup(self, index: Tensor, weight: PlaneWeight | BlockedWeight, bits: int, dtype: torch.dtype) -> Tensor:
        """The blocks that hold the rows are decoded a tile at a time, each block once."""
        if isinstance(weight, PlaneWeight):
            return decode(weight.take(index), bits, dtype)
        columns, total = weight.in_features, weight.out_features
        result = torch.empty(len(index), columns, dtype=dtype, device="cpu")
        blocks, place = torch.unique(index // BLOCK_ROWS, return_inverse=True)
        row = place * BLOCK_ROWS + index % BLOCK_ROWS  # where a row lies among the decoded ones
        step = max(1, TILE_WEIGHTS // columns // BLOCK_ROWS)
        tile = torch.empty(min(step, len(blocks)) * BLOCK_ROWS, columns, dtype=dtype, device="cpu")
        threads = torch.get_num_threads()
        for start in range(0, len(blocks), step):
            for at, block in enumerate(blocks[start : start + step].tolist()):
                first = block * BLOCK_ROWS
                out = tile[at * BLOCK_ROWS :].data_ptr()
                last = min(first + BLOCK_ROWS, total)
                weight.handle.decode(self.isa, bits, first, last, out, TYPES[dtype], threads)
            here = (place >= start) & (place < start + step)
            result[here] = tile[row[here] - start * BLOCK_ROWS]
        return result

    def _tiles_of_rows(self, x: Tensor, weight: BlockedWeight, row_bits: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], weight.out_features)
        for bits in torch.unique(row_bits).tolist():
            chosen = row_bits == bits
            y[chosen] = self.linear(x[chosen], weight, bits)
        return y


def _blocked(weight: PlaneWeight | BlockedWeight) -> BlockedWeight:
    return weight if isinstance(weight, BlockedWeight) else BlockedWeight.pack(weight)


def cpu_kernels() -> list[CpuKernel]:
    """Every kernel of the native extension, whether this processor can run it or not."""
    if native is None:
        return []
    sets = native.instruction_sets()
    kernels = []
    for index, (isa, runs, needs) in enumerate(sets):
        reason = None if runs else f"this processor lacks {needs}"
        priority = 10 * (len(sets) - index)
        kernels += [CpuKernel(isa, priority, reason, variant) for variant in ("", "int8", "exact")]
    return kernels
