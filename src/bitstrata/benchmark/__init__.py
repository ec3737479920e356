"""Measuring: verify a kernel, then time it beside the bandwidth of memory and torch's dense product."""

from .run import Bench, bench

__all__ = ["Bench", "bench"]
