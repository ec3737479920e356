"""The native extension, if it is there.

It is built when the package is installed. Without a compiler the package installs all the same; the
reference kernel then runs, and says so once.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

native: ModuleType | None
try:
    from . import _native as _extension
except ImportError as error:
    native, missing = None, f"the native extension is not there ({error})"
else:
    native, missing = _extension, ""


def read_all(buffer: Tensor, threads: int) -> None:
    """Read every byte of a contiguous CPU tensor once: the yardstick for kernels that are bound by memory."""
    if native is None:
        buffer.sum()
    else:
        native.read_all(buffer.data_ptr(), buffer.nbytes, threads)
