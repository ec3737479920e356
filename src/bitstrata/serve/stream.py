"""From the engine's thread to the event loop, and on to the client as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..runtime import Engine, Event, Finished, Handle, Request
from .errors import translate
from .spelling import Spelling

PING_SECONDS = 10
T = TypeVar("T")


@dataclass(frozen=True)
class Arrival:
    """An event of the request `index`. time: when the engine's thread had it (perf_counter, seconds)."""

    index: int
    event: Event
    time: float


class Submission:
    """The engine requests of one HTTP request: all of `requests` or none, and their events in the order they come.

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
        """In the engine's thread. Raises once the loop is closed, and the engine then drops the request."""
        self._loop.call_soon_threadsafe(self._arrivals.put_nowait, Arrival(index, event, time.perf_counter()))

    async def arrivals(self) -> AsyncIterator[Arrival]:
        """Until every request is finished."""
        while self._open:
            arrival = await self._arrivals.get()
            self._open -= isinstance(arrival.event, Finished)
            yield arrival

    @property
    def reused_tokens(self) -> list[int]:
        """Of each request, how many tokens of its prompt the cache had already; known once it has a new token."""
        return [handle.reused_tokens for handle in self._handles]

    def cancel(self, index: int | None = None) -> None:
        """End one request, or all; no-op for those that have ended."""
        for handle in self._handles if index is None else [self._handles[index]]:
            handle.cancel()


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """The result of `work`; None, and `work` cancelled, if the client goes away before.

    The request's body must have been read. What `work` raises is raised here.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


class EventStream(StreamingResponse):
    """`chunks` as server-sent events, spelled as an API spells them. An error on the way is an event of its own.

    While there is nothing to send, a comment goes out every PING_SECONDS: proxies close connections that are silent.

    end: called when all was sent or the client has gone away. Starlette's own response notices that only by the next
    thing it sends, if the server speaks the newer ASGI.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[BaseModel],
        end: Callable[[], None],
        spelling: Spelling,
        headers: Mapping[str, str],
    ) -> None:
        fixed = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(chunks, spelling), headers={**fixed, **headers})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self.stream_response(send), receive)
        finally:
            self._end()


async def _events(chunks: AsyncIterator[BaseModel], spelling: Spelling) -> AsyncIterator[str]:
    try:
        async for chunk in _or_silence(chunks):
            yield ": ping\n\n" if chunk is None else spelling.event(chunk)
    except Exception as error:
        yield spelling.error(translate(error))
    yield spelling.last


async def _or_silence(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[BaseModel | None]:
    """`chunks`, and None whenever none came for PING_SECONDS."""
    coming: asyncio.Future[BaseModel] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(chunks))
            done, _ = await asyncio.wait([coming], timeout=PING_SECONDS)
            if not done:
                yield None
                continue
            try:
                chunk = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield chunk
    finally:
        if coming is not None:
            coming.cancel()
