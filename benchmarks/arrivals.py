"""When requests come: open-loop arrivals whose rate switches between calm and burst.

A Poisson process whose rate is `calm` and `burst` requests a second in turn; the stretches of either have exponential
lengths with the given means (a Markov-modulated Poisson process of two states). It begins calm.
"""

from __future__ import annotations

import random


def bursts(
    *, seconds: float, calm: float, burst: float, calm_seconds: float, burst_seconds: float, seed: int
) -> list[float]:
    """Times of arrival in [0, seconds), ascending."""
    chance = random.Random(seed)
    times: list[float] = []
    now, is_burst = 0.0, False
    while now < seconds:
        end = min(seconds, now + chance.expovariate(1 / (burst_seconds if is_burst else calm_seconds)))
        at = now + chance.expovariate(burst if is_burst else calm)
        while at < end:
            times.append(at)
            at += chance.expovariate(burst if is_burst else calm)
        now, is_burst = end, not is_burst
    return times


def lengths(count: int, least: int, most: int, *, seed: int) -> list[int]:
    """`count` whole numbers from least to most, all equally likely."""
    chance = random.Random(seed + 1)
    return [chance.randint(least, most) for _ in range(count)]
