"""The Triton kernels as the registry knows them.

    rows <= FEW_ROWS         plane by plane on the tensor cores (few_rows.py); also any number of rows at their own bits
    rows <  DENSE_ROWS       weights decoded in registers, tile by tile (decoding.py)
    more, or float32         the whole weight decoded to memory, then the platform's matrix product

For CUDA devices. On the CPU they run in Triton's interpreter, for tests: TRITON_INTERPRET=1 and
BITSTRATA_KERNEL=triton. Nothing imports triton before it is needed: most machines do not have it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from ...planes.decode import decode
from ...planes.weights import PlaneWeight
from ..registry import ENVIRONMENT, Problem, register
from .config import DENSE_ROWS, FEW_ROWS
from .tiled import LAYOUT, TiledWeight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _launch() -> ModuleType:
    """The module that imports triton."""
    from . import launch

    return launch


class TritonKernel:
    """All Triton kernels behind one name: `rows` decides which one runs."""

    name = "triton"
    priority = 50
    layout = LAYOUT
    activations = "exact"
    device = "cuda"
    steady_rows = FEW_ROWS

    def arithmetic(self, rows: int) -> str:
        return "exact"

    def can_run(self, problem: Problem) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if problem.device != "cuda":
            if problem.device != "cpu" or not interpreted:
                return f"tensors are on {problem.device}"
            if os.environ.get(ENVIRONMENT) != self.name:
                return "the interpreter is for tests: it only runs if it is forced"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'bitstrata[triton]')"
        if problem.dtype not in DTYPES:
            return f"activations are {problem.dtype}; float16, bfloat16 and float32 can be used"
        return None

    def prepare(self, weight: PlaneWeight) -> TiledWeight:
        return TiledWeight.pack(weight)

    def linear(self, x: Tensor, weight: PlaneWeight | TiledWeight, bits: int) -> Tensor:
        return self.linear_many(x, [_tiled(weight)], bits)[0]

    def linear_rows(self, x: Tensor, weight: PlaneWeight | TiledWeight, row_bits: Tensor) -> Tensor:
        return self.linear_many(x, [_tiled(weight)], row_bits)[0]

    def linear_many(self, x: Tensor, weights: Sequence[TiledWeight], bits: int | Tensor) -> list[Tensor]:
        """x [rows, K] times each of `weights`, which share K: [rows, N_i] each, in x's dtype.

        row_bits are on x's device; a row whose bits have no scales becomes NaN there.
        """
        if any(weight.in_features != x.shape[1] for weight in weights):
            raise ValueError(f"expected x [rows, {weights[0].in_features}], got {list(x.shape)}")
        if len(x) == 0:
            return [x.new_empty(0, weight.out_features) for weight in weights]
        if x.stride(1) != 1:
            x = x.contiguous()
        with _current(x.device):
            return [self._one(x, weight, bits) for weight in weights]

    def _one(self, x: Tensor, weight: TiledWeight, bits: int | Tensor) -> Tensor:
        launch, rows = _launch(), len(x)
        if isinstance(bits, Tensor) or rows <= FEW_ROWS:
            y: Tensor = launch.few_rows(x, weight, bits)
        elif rows < DENSE_ROWS and x.dtype != torch.float32:
            y = launch.tiles(x, weight, bits)
        else:
            y = torch.nn.functional.linear(x, launch.decode(weight, bits, x.dtype))
        return y

    def decode(self, weight: PlaneWeight | TiledWeight, bits: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, PlaneWeight):
            return decode(weight.outputs(first, last), bits, dtype)
        return self.lookup(torch.arange(first, last, device=weight.planes[0].device), weight, bits, dtype)

    def lookup(self, index: Tensor, weight: PlaneWeight | TiledWeight, bits: int, dtype: torch.dtype) -> Tensor:
        """Rows `index` of the weight; an index on a device that is out of range gives the nearest row."""
        if isinstance(weight, PlaneWeight):
            weight, index = TiledWeight.pack(weight.take(index)), torch.arange(len(index), device=index.device)
        with _current(index.device):
            rows: Tensor = _launch().decode(weight, bits, dtype, index)
        return rows


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever the tensors are: make it `device`."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _tiled(weight: PlaneWeight | TiledWeight) -> TiledWeight:
    return weight if isinstance(weight, TiledWeight) else TiledWeight.pack(weight)


KERNEL = TritonKernel()
register(KERNEL)
