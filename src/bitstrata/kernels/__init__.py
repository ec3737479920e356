"""One operation on many machines: y = x @ W_bits^T, bits an int or one per row."""

from . import cpu, ops, reference, triton  # noqa: F401  (they register themselves)
from .plain import is_plain
from .registry import Kernel, KernelReport, describe, select
from .weight import Weight, linear_many, pack

__all__ = ["Kernel", "KernelReport", "Weight", "describe", "is_plain", "linear_many", "pack", "select"]
