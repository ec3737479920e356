"""An engine in virtual time: what a policy does to requests whose arrivals were recorded.

A round takes BASE seconds, and for every running request what a token costs at its bits, or, in its first round, what
its prompt costs. The policy is asked as the Engine asks it; nothing here is random or measured.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from bitstrata.runtime.batching.stats import Pace
from bitstrata.runtime.policy import LoadView, Policy, RequestPolicy, RequestView

SUPPORTED = (2, 3, 4)
BASE = 0.005
ROW = {2: 0.003, 3: 0.004, 4: 0.005, 5: 0.006, 6: 0.007, 7: 0.008, 8: 0.009}  # seconds a token, by bits
PROMPT = 0.012


@dataclass
class Simulated:
    """A request: when it came, what it asked, at which bits each token was made and when."""

    arrival: float
    new_tokens: int
    bits: int = 4
    min_bits: int | None = 2
    used: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def latency(self) -> float:
        return self.times[-1] - self.arrival


@dataclass
class Round:
    now: float
    steps: int  # of a LoadPolicy
    behind: bool  # whether somebody waited


def simulate(
    policy: Policy, requests: list[Simulated], *, places: int = 8, supported: tuple[int, ...] = SUPPORTED
) -> list[Round]:
    """Run `requests`, in order of arrival, to their ends; fills in `used` and `times` and returns the rounds."""
    coming, waiting = deque(requests), deque[Simulated]()
    running: list[tuple[Simulated, RequestPolicy]] = []
    rounds, pace, now = [], Pace(), 0.0
    while coming or waiting or running:
        if not (waiting or running):
            pace.clear()
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            waiting.append(coming.popleft())
        while waiting and len(running) < places:
            running.append((waiting.popleft(), policy.start()))
        views = [RequestView(item.bits, item.min_bits, supported, len(item.used)) for item, _ in running]
        most = max(len(view.ladder) - 1 for view in views)
        policy.observe(LoadView(now, len(waiting), pace.mean, most))
        rounds.append(Round(now, getattr(policy, "steps", 0), bool(waiting)))
        bits = [view.lowered(steps(view)) for (_, steps), view in zip(running, views, strict=True)]
        decoding = any(item.used for item, _ in running)
        seconds = BASE + sum(
            ROW[value] if item.used else PROMPT for (item, _), value in zip(running, bits, strict=True)
        )
        now += seconds
        for (item, _), value in zip(running, bits, strict=True):
            item.used.append(value)
            item.times.append(now)
        if decoding:
            pace.add(seconds)
        running = [(item, steps) for item, steps in running if len(item.used) < item.new_tokens]
    return rounds
