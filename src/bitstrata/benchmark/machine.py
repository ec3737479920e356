"""What a benchmark ran on, and how fast memory is there."""

from __future__ import annotations

import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers

from ..kernels import cpu
from ..version import __version__
from .clock import timer

CPU = torch.device("cpu")
BANDWIDTH_BYTES = 1 << 29  # beyond any last-level cache share a process gets
COPY_BYTES = 1 << 31  # on a GPU, whose caches and launches take longer to outweigh


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(threads: int, device: torch.device = CPU) -> dict[str, str | int]:
    """Processor, versions and threads, for the head of a report; of a GPU its name, CUDA and triton too."""
    machine: dict[str, str | int] = {
        "processor": processor_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "bitstrata": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "triton": installed("triton")}
        machine = {**{key: value or "none" for key, value in gpu.items()}, **machine}
    return machine


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Bandwidth:
    """How fast memory is; sampled along with what is compared to it.

    CPU: streaming reads of a large buffer with all threads. GPU: a large copy, what it reads and what it writes.
    """

    def __init__(self, threads: int, device: torch.device = CPU) -> None:
        self.threads, self.device = threads, device
        self.samples: list[float] = []
        if device.type != "cuda":
            self._buffer = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64, device=device)
            return
        size = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(self._buffer)
        self._copy = timer(lambda _: target.copy_(self._buffer), 1, device)

    def sample(self) -> None:
        if self.device.type == "cuda":
            self.samples.append(2 * self._buffer.nbytes / self._copy())
            return
        started = time.perf_counter()
        cpu.read_all(self._buffer, self.threads)
        self.samples.append(self._buffer.nbytes / (time.perf_counter() - started))

    @property
    def bytes_per_second(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)
