"""From the engine's thread to the event loop: the engine requests of one HTTP request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from ..runtime import Engine, Event, Finished, Handle, Request


@dataclass(frozen=True)
class Arrival:
    """An event of the request `index`. time: when the engine's thread had it (perf_counter, seconds)."""

    index: int
    event: Event
    time: float


class Flight:
    """Submits all of `requests` or none, and gives their events in the order in which they come.

    To be made in a running event loop; the engine's thread only ever leaves events there.
    Raises what `Engine.submit` raises.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._handles: list[Handle] = []
        self._open = len(requests)
        try:
            for index, request in enumerate(requests):
                self._handles.append(engine.submit(request, lambda event, index=index: self._leave(index, event)))  # type: ignore[misc]
        except BaseException:
            self.cancel()
            raise

    def _leave(self, index: int, event: Event) -> None:
        """In the engine's thread. Once the loop is closed nobody listens, and the engine drops the request."""
        self._loop.call_soon_threadsafe(self._arrivals.put_nowait, Arrival(index, event, time.perf_counter()))

    async def arrivals(self) -> AsyncIterator[Arrival]:
        """Until every request is finished."""
        while self._open:
            arrival = await self._arrivals.get()
            self._open -= isinstance(arrival.event, Finished)
            yield arrival

    def cancel(self, index: int | None = None) -> None:
        """End one request, or all; no-op for those that have ended."""
        for handle in self._handles if index is None else [self._handles[index]]:
            handle.cancel()
