"""The original itself, for a check of the comparison (its divergence is 0) and as the size without quantization."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .made import ORIGINAL_BYTES, Job, Made, Options, one_by_one


def missing() -> str | None:
    return None


def versions() -> dict[str, str]:
    return {}


def make(job: Job, options: Options) -> Iterator[Made]:
    def quantized(name: str, weight: Tensor) -> tuple[Tensor, int]:
        return weight.clone(), ORIGINAL_BYTES * weight.numel()

    weights, size = one_by_one(job, quantized)
    yield Made(8 * ORIGINAL_BYTES, weights, size)
