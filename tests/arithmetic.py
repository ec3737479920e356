"""Models whose layers compute with what they are given, not with int8 activations: what they make can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bitstrata.kernels import describe, registry


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, models are loaded with the fastest kernel that computes exactly."""
    reports = describe("cpu", torch.float32)
    names = [report.name for report in reports if report.name.endswith("-exact") and report.reason is None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(registry.ENVIRONMENT, names[0] if names else "reference")
        yield
