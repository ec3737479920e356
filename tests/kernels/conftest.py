"""Every kernel whose code differs is put through the same tests."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from instruction_sets import DISTINCT
from kernel_errors import promise_of

from bitstrata.kernels import registry


@pytest.fixture(params=DISTINCT)
def kernel(request, monkeypatch):
    """The name of a registered kernel, forced for the test; those for GPUs are in test_triton_kernels.py."""
    monkeypatch.setenv(registry.ENVIRONMENT, request.param)
    return request.param


@pytest.fixture
def promise(kernel):
    """promise(weight, bits) -> check(y, x, label): the forced kernel's result is as near to float64 as it says."""
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
