"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import settings

# Tensors are tiny here: waking a second thread costs more than it saves, tenfold on a busy machine.
# Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("bitstrata", deadline=None, print_blob=True)
settings.load_profile("bitstrata")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed, shown when the test fails; TEST_SEED=<n> repeats the run."""
    value = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))
    request.node.add_report_section("call", "seed", f"TEST_SEED={value}")
    return value
