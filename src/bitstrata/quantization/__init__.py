"""The job that applies a method (solvers/) to a whole model: checked first, resumable, measured."""

from .job import quantize
from .report import Report

__all__ = ["Report", "quantize"]
