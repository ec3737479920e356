"""Weights -> planes: the methods, one file each, and the job that applies one to a whole model."""

from .anybcq import AnyBCQ, AnyBCQOptions
from .anyprecision import AnyPrecision, AnyPrecisionOptions
from .bcq import BCQ, BCQOptions
from .bpdq import BPDQ, BPDQOptions
from .gptq import GPTQ, GPTQOptions
from .job import quantize
from .method import Method, methods
from .nested import Nested, NestedOptions
from .report import Report
from .rtn import RTN, RTNOptions

__all__ = [
    "BCQ",
    "BPDQ",
    "GPTQ",
    "RTN",
    "AnyBCQ",
    "AnyBCQOptions",
    "AnyPrecision",
    "AnyPrecisionOptions",
    "BCQOptions",
    "BPDQOptions",
    "GPTQOptions",
    "Method",
    "Nested",
    "NestedOptions",
    "RTNOptions",
    "Report",
    "methods",
    "quantize",
]
