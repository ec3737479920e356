"""A policy by load in vLLM: at what bits requests start, where they leave a choice.

A request that has `min_bits` follows the policy's level while it waits. When it starts, its bits are fixed: prompt and
new tokens are computed at the same, so the keys and values of its prefix are those of these bits, and runners, which
hear of a request's parameters once, need to know no more. So the level acts on what comes, not on what runs: requests
that started low stay low.

The policies are our own engine's (runtime/policy.py). What they see of the engine is the same: requests that wait, and
the mean time between two tokens of a running request over the recent past.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ...runtime import LoadPolicy, Policy
from ...runtime.batching.stats import Pace
from ...runtime.policy import LoadView, RequestView
from .offered import Asked, Choice, Offered


class Admission:
    """The level of one engine.

    Args:
        policy: for this engine alone.
        clock: seconds, never going back.
    """

    def __init__(self, offered: Offered, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        self.offered, self.policy, self._clock = offered, policy, clock
        self._of_request = policy.start()
        self._pace = Pace()
        self._last: float | None = None  # when the last step ended, if requests have been running since

    @property
    def level(self) -> int:
        """Steps that requests are lowered by when they start now, as far as they may be."""
        return self.policy.steps if isinstance(self.policy, LoadPolicy) else 0

    def step_ended(self, makes_tokens: bool) -> None:
        """A step came back; `makes_tokens` if some request waited for its next token meanwhile."""
        now = self._clock()
        if makes_tokens and self._last is not None:
            self._pace.add(now - self._last)
        self._last = now

    def idle(self) -> None:
        """Nothing runs before the next step: how long the steps before took says nothing of it."""
        self._last = None
        self._pace.clear()
        self.observe(waiting=0, steps=0)

    def observe(self, waiting: int, steps: int) -> None:
        """Called once a step: how many requests found no place in it, and the most `steps` of any request."""
        self.policy.observe(LoadView(self._clock(), waiting, self._pace.mean, steps))

    def steps(self, asked: Asked) -> int:
        """How many steps down a request may go at most."""
        return 0 if isinstance(asked.choice, str) else len(self._view(asked, asked.choice).ladder) - 1

    def choice(self, asked: Asked) -> Choice:
        """At what a request starts that begins now."""
        if isinstance(asked.choice, str):
            return asked.choice
        view = self._view(asked, asked.choice)
        return view.lowered(self._of_request(view))

    def _view(self, asked: Asked, bits: int) -> RequestView:
        return RequestView(bits, asked.min_bits, self.offered.bits, new_tokens=1)  # past its prompt: see above
