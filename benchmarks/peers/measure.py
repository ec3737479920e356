"""Contenders taking turns: what the machine does meanwhile meets all of them alike.

A round times each contender once, in an order shuffled anew: a few calls that are not counted, then calls for `burst`
seconds, of which the median counts. Ratios are taken within a round and their median over rounds is reported.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from .contender import Contender

REGIMES = ("cache", "memory")
CALLS_BEFORE = {"cache": 3, "memory": 1}  # bring the matrix back into the cache, and threads awake
SETTLE = 0.02  # seconds until other libraries' idle threads have stopped to spin
FEWEST_CALLS = 3
OTHERS_LIMIT = 0.1  # cores used by other processes from which on times are doubtful


class OtherProcesses:
    """How many cores the rest of the machine kept busy while we measured: libraries that spin suffer most from it."""

    def __init__(self) -> None:
        self._started = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        everyone, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = everyone.idle + getattr(everyone, "iowait", 0.0)
        guests = getattr(everyone, "guest", 0.0) + getattr(everyone, "guest_nice", 0.0)  # part of user and nice
        return time.monotonic(), sum(everyone) - guests - idle - own.user - own.system

    def cores(self) -> float:
        (before, theirs_before), (after, theirs) = self._started, self._now()
        return max(0.0, (theirs - theirs_before) / (after - before))

    @staticmethod
    def warning(cores: float) -> str | None:
        if cores < OTHERS_LIMIT:
            return None
        return f"warning: other processes kept {cores:.1f} cores busy meanwhile; measure again on an idle machine"


@dataclass(frozen=True)
class Timing:
    """Seconds a product or a token, one for each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    def times_faster_than(self, other: Timing) -> float:
        """The other's time over this one's."""
        return statistics.median(theirs / mine for theirs, mine in zip(other.rounds, self.rounds, strict=True))


def race(
    contenders: Sequence[Contender],
    regime: str,
    *,
    rounds: int,
    burst: float,
    threads: int,
    seed: int,
    before_round: Callable[[], object],
) -> list[Timing]:
    """Times of each contender: with its first matrix again and again (cache), or with all in turn (memory)."""
    order = list(range(len(contenders)))
    shuffle = random.Random(seed).shuffle
    positions = [0] * len(contenders)
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        before_round()
        shuffle(order)
        for index in order:
            calls = contenders[index].calls if regime == "memory" else contenders[index].calls[:1]
            if threads > 1:
                time.sleep(SETTLE)
            times[index].append(_burst(calls, positions, index, CALLS_BEFORE[regime], burst))
    return [Timing(tuple(samples)) for samples in times]


def _burst(
    calls: Sequence[Callable[[], object]], positions: list[int], index: int, uncounted: int, seconds: float
) -> float:
    samples: list[float] = []
    position, end = positions[index], time.perf_counter() + seconds
    while len(samples) < FEWEST_CALLS + uncounted or time.perf_counter() < end:
        call = calls[position]
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
        position = (position + 1) % len(calls)
    positions[index] = position
    return statistics.median(samples[uncounted:])
