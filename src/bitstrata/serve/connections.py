"""Connections, before the application hears of them: how many are open, and how long they may be without a request.

A connection costs an open file from when it is accepted, and memory from the first byte of a request, which may never
become whole. So uvicorn's protocol does here what uvicorn has no option for:

* The header of a request must be there HEADER_SECONDS after the connection was made or the answer before was given.
  (The time for a body is the guard's matter: by then a client can be told.)
* No more than `most` connections are open at a time, which is less than the files that the process may open. For one
  more, the connection goes that has been without a whole request for longest; those that are being answered stay.
* What has come of requests that are not whole is at most `most_bytes` together; again the oldest goes.
* A client that takes nothing of its answer for SEND_SECONDS is cut off.
"""

from __future__ import annotations

import asyncio
import sys
from typing import ClassVar

import psutil
from uvicorn.protocols.http.h11_impl import H11Protocol

if sys.platform != "win32":
    import resource

HEADER_SECONDS = 20
SEND_SECONDS = 60
ACCEPTED = 8  # connections accepted in one round of the event loop; it makes their protocols two rounds later
SPARE_FILES = 48  # for what is accepted above `most` before another is closed, and for files of all kinds
SPARE_CONNECTIONS = 16  # beside twice the requests under way: what only asks for /health always gets in
UNFINISHED_BODIES = 64  # of the largest size: what unfinished requests may hold together


def most_requests(wanted: int) -> int:
    """How many of `wanted` requests the process may have under way: each takes open files.

    The process's limit of open files is raised as far as that needs it and the system allows it.
    """
    if sys.platform == "win32":
        return wanted
    others = psutil.Process().num_fds() + SPARE_FILES + SPARE_CONNECTIONS
    needed = others + 2 * wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, (soft - others) // 2))


class Door:
    """The open connections of one server.

    Args:
        most: connections open at a time.
        most_body: bytes of a request that are kept; what comes above that is refused and read to nowhere.
        most_bytes: of all requests that are not whole.
    """

    def __init__(self, most: int, most_body: int, most_bytes: int) -> None:
        self.most, self.most_body, self.most_bytes = most, most_body, most_bytes
        self.open: set[Connection] = set()
        self.unfinished: dict[Connection, int] = {}  # bytes of a body that came, the longest without a request first
        self.bytes = 0  # of `unfinished`

    def enter(self, connection: Connection) -> None:
        self.open.add(connection)
        self.wait_for(connection)
        if len(self.open) > self.most:
            self._drop_oldest()

    def wait_for(self, connection: Connection) -> None:
        """From now on a request is expected of `connection`."""
        self.is_whole(connection)
        self.unfinished[connection] = 0

    def take(self, connection: Connection, size: int) -> None:
        """So many more bytes of a body came."""
        if connection not in self.unfinished:  # was dropped
            return
        known = self.unfinished[connection]
        self.unfinished[connection] = min(known + size, self.most_body)
        self.bytes += self.unfinished[connection] - known
        while self.bytes > self.most_bytes:
            self._drop_oldest()

    def is_whole(self, connection: Connection) -> None:
        """Nothing more of a request is missing."""
        self.bytes -= self.unfinished.pop(connection, 0)

    def leave(self, connection: Connection) -> None:
        self.open.discard(connection)
        self.is_whole(connection)

    def _drop_oldest(self) -> None:
        """Of those that owe something; the newest of all at least is one when this is called."""
        oldest = next(iter(self.unfinished))
        self.leave(oldest)
        oldest.cut()


class Connection(H11Protocol):
    """uvicorn's protocol at a door."""

    door: ClassVar[Door]
    _due: asyncio.TimerHandle | None = None  # when the next header must be there
    _stalled: asyncio.TimerHandle | None = None  # until when the client must take something
    _unsent = 0  # bytes of the answer when that began

    def cut(self) -> None:
        """Close without waiting for a client that takes nothing."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.door.enter(self)
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self.door.leave(self)
        self._set_due(False)
        self._set_stalled(False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._settle(len(data))

    def on_response_complete(self) -> None:
        if self in self.door.open:
            self.door.wait_for(self)
        super().on_response_complete()  # begins the next request if it has come already
        self._settle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_stalled(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_stalled(False)

    def _settle(self, size: int = 0) -> None:
        """After `size` bytes came or an answer was given: what is expected of the client now."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and self.cycle.more_body:
            self.door.take(self, size)
        elif is_answering:
            self.door.is_whole(self)
        self._set_due(not is_answering)

    def _set_due(self, expected: bool) -> None:
        if self._due is not None and not expected:
            self._due.cancel()
            self._due = None
        elif self._due is None and expected:
            self._due = self.loop.call_later(HEADER_SECONDS, self._check_due)

    def _check_due(self) -> None:
        self._due = None
        if self.transport.get_write_buffer_size():  # it is still at the last answer
            self._set_stalled(True)
        else:
            self.cut()

    def _set_stalled(self, expected: bool) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        if expected:
            self._unsent = self.transport.get_write_buffer_size()
            self._stalled = self.loop.call_later(SEND_SECONDS, self._check_stalled)

    def _check_stalled(self) -> None:
        self._stalled = None
        unsent = self.transport.get_write_buffer_size()
        if unsent >= self._unsent:
            self.cut()
        elif unsent:
            self._set_stalled(True)
        else:
            self._settle()


def connection_class(most_requests: int, most_body: int) -> type[Connection]:
    """The protocol of one server that deals with so many requests at a time, of so many bytes."""
    most = 2 * most_requests + SPARE_CONNECTIONS

    class ServerConnection(Connection):
        door = Door(most, most_body, UNFINISHED_BODIES * most_body)

    return ServerConnection
