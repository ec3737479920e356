"""The original itself, for a check of the comparison (its divergence is 0) and as the size without quantization."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .made import Job, Made, Options, one_by_one


def missing() -> str | None:
    return None


def versions() -> dict[str, str]:
    return {}


def make(job: Job, options: Options) -> Iterator[Made]:
    width = job.loaded(torch.bfloat16).dtype.itemsize

    def quantized(name: str, weight: Tensor) -> tuple[Tensor, int]:
        return weight.clone(), width * weight.numel()

    weights, size = one_by_one(job, quantized)
    yield Made(8 * width, weights, size)
