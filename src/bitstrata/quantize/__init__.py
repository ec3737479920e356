"""Weights -> planes: the methods, one file each, and the job that applies one to a whole model."""

from .anybcq import AnyBCQ, AnyBCQOptions
from .anyprecision import AnyPrecision, AnyPrecisionOptions
from .bcq import BCQ, BCQOptions
from .job import quantize
from .method import Method, methods
from .report import Report
from .rtn import RTN, RTNOptions

__all__ = [
    "BCQ",
    "RTN",
    "AnyBCQ",
    "AnyBCQOptions",
    "AnyPrecision",
    "AnyPrecisionOptions",
    "BCQOptions",
    "Method",
    "RTNOptions",
    "Report",
    "methods",
    "quantize",
]
