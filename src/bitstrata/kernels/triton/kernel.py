"""The Triton kernels as the registry knows them, all behind one name: the number of rows decides which one runs.

For CUDA devices. On the CPU they run in Triton's interpreter, for tests: TRITON_INTERPRET=1 and the kernel forced.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ..registry import Kernel, register
from .tiled import FEW_ROWS, TiledWeight


def _reason(device: str, dtype: torch.dtype, forced: bool) -> str | None:
    if device != "cuda":
        if device != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
            return f"tensors are on {device}"
        if not forced:
            return "the interpreter is for tests: it only runs if it is forced"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'bitstrata[triton]')"
    if dtype not in TiledWeight.dtypes:
        return f"activations are {dtype}; float16, bfloat16 and float32 can be used"
    return None


KERNEL = Kernel("triton", TiledWeight.layout, 50, "exact", FEW_ROWS, _reason)
register(KERNEL)
