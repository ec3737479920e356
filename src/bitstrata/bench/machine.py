"""What a benchmark ran on, and how fast memory is there."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

from ..kernels import cpu
from ..version import __version__

BANDWIDTH_BYTES = 1 << 29  # beyond any last-level cache share a process gets


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(threads: int) -> dict[str, str | int]:
    """Processor, versions and threads, for the head of a report."""
    return {
        "processor": processor_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "bitstrata": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


class Bandwidth:
    """Streaming reads of a large buffer with all threads; sampled along with what it is compared to."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.samples: list[float] = []
        self._buffer = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)

    def sample(self) -> None:
        started = time.perf_counter()
        cpu.read_all(self._buffer, self.threads)
        self.samples.append(self._buffer.nbytes / (time.perf_counter() - started))

    @property
    def bytes_per_second(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)
