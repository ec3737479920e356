"""One operation on many machines: y = x @ W_bits^T, bits an int or one per row."""

from .api import plane_linear, plane_linear_rows, plane_lookup, prepare, prepared_linear, prepared_lookup, without_pages
from .plain import is_plain
from .registry import KernelReport, PreparedWeight, Problem, describe, select

__all__ = [
    "KernelReport",
    "PreparedWeight",
    "Problem",
    "describe",
    "is_plain",
    "plane_linear",
    "plane_linear_rows",
    "plane_lookup",
    "prepare",
    "prepared_linear",
    "prepared_lookup",
    "select",
    "without_pages",
]
