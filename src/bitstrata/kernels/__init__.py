"""One operation on many machines: y = x @ W_bits^T, bits an int or one per row."""

from .api import plane_linear, plane_linear_rows
from .registry import KernelReport, Problem, describe, select

__all__ = ["KernelReport", "Problem", "describe", "plane_linear", "plane_linear_rows", "select"]
