"""Every kernel is put through the same tests."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_errors import promise_of

from bitstrata.kernels import registry

# those for GPUs have the same tests in test_triton_kernels.py
ON_CPU = sorted(name for name, kernel in registry._KERNELS.items() if getattr(kernel, "device", "cpu") == "cpu")


@pytest.fixture(params=ON_CPU)
def kernel(request, monkeypatch):
    """The name of a registered kernel, forced for the test."""
    monkeypatch.setenv(registry.ENVIRONMENT, request.param)
    return request.param


@pytest.fixture
def promise(kernel, runs):
    """promise(weight, bits) -> check(y, x, label): the forced kernel's result is as near to float64 as it says.

    Skips what it cannot run on any weight, such as the instructions of another processor.
    """
    runs(torch.float32, "affine")
    return partial(promise_of, registry._KERNELS[kernel])


@pytest.fixture
def poisoned():
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def runs(kernel):
    """Skip problems that the forced kernel says it cannot run."""

    def check(dtype: torch.dtype, scales: str, rows: int = 1, device: str = "cpu") -> None:
        reason = registry._KERNELS[kernel].can_run(registry.Problem(device, dtype, rows, scales))
        if reason is not None:
            pytest.skip(f"{kernel}: {reason}")

    return check
