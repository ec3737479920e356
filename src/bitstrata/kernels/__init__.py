"""One operation on many machines: y = x @ W_bits^T, bits an int or one per row."""

from .api import (
    linear_in,
    plane_linear,
    plane_linear_rows,
    plane_lookup,
    prepare,
    prepared_linear,
    prepared_lookup,
    without_pages,
)
from .registry import KernelReport, PreparedWeight, Problem, describe, select, select_in

__all__ = [
    "KernelReport",
    "PreparedWeight",
    "Problem",
    "describe",
    "linear_in",
    "plane_linear",
    "plane_linear_rows",
    "plane_lookup",
    "prepare",
    "prepared_linear",
    "prepared_lookup",
    "select",
    "select_in",
    "without_pages",
]
