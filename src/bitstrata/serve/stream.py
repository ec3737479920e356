"""Server-sent events, and noticing that a client has gone away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from .failures import ApiError, translate
from .replies import dump

T = TypeVar("T")


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """The result of `work`; None, and `work` cancelled, if the client goes away before.

    The request's body must have been read. What `work` raises is raised here.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """`chunks` as server-sent events, then `[DONE]`. An error on the way is an event of its own before that.

    end: called when all was sent or the client has gone away.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[BaseModel], end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._end = chunks, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._write(send), receive)
        finally:
            self._end()

    async def _write(self, send: Send) -> None:
        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await event(dump(chunk))
        except ApiError as error:
            await event(json.dumps(error.body()))
        except Exception as error:
            await event(json.dumps(translate(error).body()))
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
