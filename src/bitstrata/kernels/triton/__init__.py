"""The operation on NVIDIA GPUs, in Triton: weights re-laid in tiles of 16 rows by 256 columns.

This package does not import triton; the modules with device code (few_rows, decoding, launch) do.
"""

from . import config
from .kernel import KERNEL
from .tiled import TiledWeight

__all__ = ["KERNEL", "TiledWeight", "config"]
