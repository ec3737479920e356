"""How long a call takes.

On a CPU, by the host's clock, call by call. On a GPU all calls of a round are one CUDA graph, as in serving, so that
what is measured is the device and not Python; the device's own events time it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..runtime.batching import captured

ROUND_SECONDS = 0.01  # a round on the CPU
GRAPH_CALLS = 20  # at least so many in a graph


def timer(call: Callable[[int], object], copies: int, device: torch.device) -> Callable[[], float]:
    """Warm `call` up; what is returned runs a round, in which copies take turns, and gives the seconds of one call."""
    return _graph_timer(call, copies) if device.type == "cuda" else _host_timer(call, copies)


def _host_timer(call: Callable[[int], object], copies: int) -> Callable[[], float]:
    started = time.perf_counter()
    around = max(3, copies)
    for turn in range(around):
        call(turn % copies)
    each = (time.perf_counter() - started) / around
    count = max(3, min(1000, int(ROUND_SECONDS / max(each, 1e-7))))
    position = 0

    def one_round() -> float:
        nonlocal position
        samples = []
        for _ in range(count):
            started = time.perf_counter()
            call(position)
            samples.append(time.perf_counter() - started)
            position = (position + 1) % copies
        return statistics.median(samples)

    return one_round


def _graph_timer(call: Callable[[int], object], copies: int) -> Callable[[], float]:
    around = -(-GRAPH_CALLS // copies)

    def work() -> None:
        for _ in range(around):
            for index in range(copies):
                call(index)

    run, _ = captured(work)
    return lambda: device_seconds(run) / (around * copies)


def device_seconds(run: Callable[[], object]) -> float:
    """Seconds of `run` on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def current(device: torch.device) -> AbstractContextManager[object]:
    """`device` as the one whose streams and graphs are meant."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def wait(device: torch.device) -> None:
    """Until everything asked of the device is done; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
