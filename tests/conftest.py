"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import zlib

import pytest
from randomness import TEST_SEED

# Tensors are tiny here: waking a second thread costs more than it saves, tenfold on a busy machine.
# Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what this run left out, and its seed."""
    from instruction_sets import SETS

    absent = [f"{name} (needs {needs})" for name, runs, needs in SETS if not runs]
    terminalreporter.write_line(f"chosen: -m {config.option.markexpr!r}; the other markers: pytest --markers")
    terminalreporter.write_line(
        f"instruction sets not tested here: {', '.join(absent) or 'none'}" if SETS else "the native kernels: not built"
    )
    if TEST_SEED is not None:
        terminalreporter.write_line(f"TEST_SEED={TEST_SEED} repeats this run")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `random` what another seed would test otherwise."""
    for item in items:
        if "seed" in getattr(item, "fixturenames", ()) or hasattr(getattr(item, "obj", None), "hypothesis"):
            item.add_marker("random")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number of the test's own, the same at every run; other ones come from TEST_SEED (make fuzz)."""
    return zlib.crc32(f"{TEST_SEED or ''}{request.node.nodeid}".encode()) % 2**31
