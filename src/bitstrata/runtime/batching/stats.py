"""What an engine counts: EngineStats, and the time per token."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

WINDOW = 0.5  # seconds: how far back a mean of the recent past looks


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing and has done.

    cache_tokens, cache_used_tokens: of the cache, and reserved now; cache_kept_tokens: of what is not reserved, those
    that hold ended requests' tokens until their place is needed; cache_bytes: of all layers' tensors.
    time_per_token: seconds between two tokens of a request, a mean over the recent past; None if none were made
    since the engine was last without work.
    prompt_tokens, new_tokens, batches: since the start; reused_tokens: of prompts, those that the cache had already.
    set_back: times that a request had to leave the cache to an older one, and to begin anew.
    tokens_by_bits: new tokens by the bits that computed them, those of requests on a plan under "plan".
    finished: requests by reason.
    """

    running: int
    waiting: int
    cache_tokens: int
    cache_used_tokens: int
    cache_kept_tokens: int
    cache_bytes: int
    time_per_token: float | None
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    tokens_by_bits: dict[str, int]
    batches: int
    set_back: int
    finished: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Pace:
    """The mean duration of rounds; a round loses weight as the time since it grows, by e every WINDOW."""

    def __init__(self) -> None:
        self._seconds = self._rounds = 0.0

    def add(self, seconds: float) -> None:
        kept = math.exp(-seconds / WINDOW)
        self._seconds, self._rounds = kept * self._seconds + seconds, kept * self._rounds + 1

    def clear(self) -> None:
        self._seconds = self._rounds = 0.0

    @property
    def mean(self) -> float | None:
        """Seconds; None after `clear`."""
        return self._seconds / self._rounds if self._rounds else None
