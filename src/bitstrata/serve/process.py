"""The server as a process: its socket, its connections, its log, its signals, its end.

The socket is bound before the model is loaded, so that a port in use is told at once, and the port is known even if it
was asked for as 0. It does not listen before the model is there.

A connection costs an open file from when it is accepted, and memory from the first byte of a request, which may never
become whole. So uvicorn's protocol does here what uvicorn has no option for:

* The header of a request must be there HEADER_SECONDS after the connection was made or, on one that was used before,
  after it began. An idle one stays open as long as settings.keep_alive says. (The time for a body is the guard's
  matter: by then a client can be told.)
* No more than `most` connections are open at a time, which is less than the files that the process may open. For one
  more, the connection goes that has been without a whole request for longest; those that are being answered stay.
* What has come of requests that are not whole is at most `most_bytes` together; again the oldest goes.
* A client that takes nothing of its answer for SEND_SECONDS is cut off.

The first SIGINT or SIGTERM closes the door: /health and new requests get 503, those under way have `grace` seconds to
finish; then they are cancelled, which ends their streams with an error event. The second signal ends the process at
once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import ClassVar

import psutil
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UsageError
from .service import Service

if sys.platform != "win32":
    import resource

HEADER_SECONDS = 20
SEND_SECONDS = 60
BACKLOG = 2048  # connections that the system holds until they are accepted
ACCEPTED = 8  # connections accepted in one round of the event loop; it makes their protocols two rounds later
SPARE_FILES = 48  # for what is accepted above `most` before another is closed, and for files of all kinds
SPARE_CONNECTIONS = 16  # beside twice the requests under way: what only asks for /health always gets in
UNFINISHED_BODIES = 64  # of the largest size: what unfinished requests may hold together
LAST_SECONDS = 5  # for answers that are finished to reach slow clients
POLL_SECONDS = 0.02
CLIENTS_CAUSE = ("uvicorn.error", "asyncio", "bitstrata.serve.errors")  # loggers of what clients can cause
LOG_SECONDS = 60
LOG_KINDS = 256  # of lines that are told apart


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host`, on any free port if `port` is 0. Raises UsageError if that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot serve at {host}, port {port}: {error}", hint="127.0.0.1 is this machine") from error
    try:
        if os.name == "posix":  # a port that was in use a moment ago may be used again
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UsageError(
            f"cannot serve at {host}, port {port}: {error.strerror}",
            hint="choose another port with --port; 0 takes any that is free",
        ) from error
    return bound


def address(bound: socket.socket) -> str:
    """The URL at which a bound socket can be reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an IP address."""
    return ipaddress.ip_address(address).is_loopback


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


class Connections:
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

    def opened(self, connection: Connection) -> None:
        self.open.add(connection)
        self.expect(connection)
        if len(self.open) > self.most:
            self._drop_oldest()

    def closed(self, connection: Connection) -> None:
        self.open.discard(connection)
        self.complete(connection)

    def expect(self, connection: Connection) -> None:
        """From now on a request is expected of `connection`."""
        self.complete(connection)
        self.unfinished[connection] = 0

    def received(self, connection: Connection, size: int) -> None:
        """`size` more bytes of a body came."""
        if connection not in self.unfinished:  # was dropped
            return
        known = self.unfinished[connection]
        self.unfinished[connection] = min(known + size, self.most_body)
        self.bytes += self.unfinished[connection] - known
        while self.bytes > self.most_bytes:
            self._drop_oldest()

    def complete(self, connection: Connection) -> None:
        """Nothing more of a request is missing."""
        self.bytes -= self.unfinished.pop(connection, 0)

    def _drop_oldest(self) -> None:
        """Of those that a request is expected of; at least the newest is one when this is called."""
        oldest = next(iter(self.unfinished))
        self.closed(oldest)
        oldest.abort()


class Connection(H11Protocol):
    """uvicorn's protocol with limits of its own. Only its methods without an underscore are extended."""

    all: ClassVar[Connections]
    keep_alive: ClassVar[int]  # seconds
    _due: asyncio.TimerHandle | None = None  # when the next header must be there
    _stalled: asyncio.TimerHandle | None = None  # until when the client must take something
    _is_idle = False  # between two requests
    _unsent = 0  # bytes of the answer when that began

    def abort(self) -> None:
        """Close without waiting for a client that takes nothing."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.all.opened(self)
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.closed(self)
        self._set_due(False)
        self._set_stalled(False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._settle(len(data))

    def on_response_complete(self) -> None:
        if self in self.all.open:
            self.all.expect(self)
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
            self.all.received(self, size)
        elif is_answering:
            self.all.complete(self)
        self._set_due(not is_answering, size > 0)

    def _set_due(self, expected: bool, begun: bool = False) -> None:
        """A header is expected, of which something has come if it has `begun`."""
        if self._due is not None and (not expected or (begun and self._is_idle)):
            self._due.cancel()
            self._due = None
        if self._due is None and expected:
            self._is_idle = self.cycle is not None and not begun
            self._due = self.loop.call_later(self.keep_alive if self._is_idle else HEADER_SECONDS, self._check_due)

    def _check_due(self) -> None:
        self._due = None
        if self.transport.get_write_buffer_size():  # it is still at the last answer
            self._set_stalled(True)
        else:
            self.abort()

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
            self.abort()
        elif unsent:
            self._set_stalled(True)
        else:
            self._settle()


class RateLimit(logging.Filter):
    """Lets a kind of line through once in LOG_SECONDS, then with how many were left out before it.

    Of one kind are lines that come from the same place in the same words or, where they say it, of the same `kind`,
    with the same type of error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[object, tuple[float, int]] = {}  # kind -> when it was last let through, left out since

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[0] if record.exc_info else None
        said = getattr(record, "kind", None) or str(record.msg).partition("\n")[0]
        kind = record.pathname, record.lineno, said, error
        now = time.monotonic()
        since, left_out = self._seen.get(kind, (None, 0))
        if since is not None and now < since + LOG_SECONDS:
            self._seen[kind] = since, left_out + 1
            return False
        if len(self._seen) >= LOG_KINDS:
            self._seen.clear()
        self._seen[kind] = now, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out} more like this in the meantime)"
        return True


@contextmanager
def limited_logs() -> Iterator[None]:
    """While this lasts, what clients can cause is logged seldom."""
    limit = RateLimit()
    with ExitStack() as stack:
        for name in CLIENTS_CAUSE:
            logging.getLogger(name).addFilter(limit)
            stack.callback(logging.getLogger(name).removeFilter, limit)
        yield


def serve(app: FastAPI, bound: socket.socket, *, grace: float, say: Callable[[str], None], ready: str) -> None:
    """Serve `app` on `bound` until a signal ends it; call from the main thread.

    Args:
        grace: seconds that requests under way have to finish.
        say: shows a message to the user.
        ready: said once requests are taken.
    """
    with limited_logs():
        asyncio.run(Server(app, grace=grace, say=say, ready=ready).serve([bound]))


class Server(uvicorn.Server):
    """uvicorn with our limits and our end. Arguments as in `serve`."""

    def __init__(
        self, app: FastAPI, *, grace: float = 0, say: Callable[[str], None] = lambda _: None, ready: str = ""
    ) -> None:
        self._service: Service = app.state.service
        self._grace, self._say, self._ready = grace, say, ready
        self._ending: Future[None] | None = None
        settings, body = self._service.settings, self._service.settings.max_body
        most = 2 * settings.max_connections + SPARE_CONNECTIONS

        class ServersConnection(Connection):
            all = Connections(most, body, UNFINISHED_BODIES * body)
            keep_alive = settings.keep_alive

        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                http=ServersConnection,
                ws="none",
                lifespan="off",
                backlog=ACCEPTED,  # asyncio accepts so many at once as well; `startup` has the system hold more
                timeout_keep_alive=settings.keep_alive,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(BACKLOG)
        self._say(self._ready)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's handler of signals. It raises again those that its own notes: ours notes none, and ends well."""
        if self._service.closing:
            self._say("ended at once")
            os._exit(128 + sig)
        self._service.closing = True
        self._ending = asyncio.run_coroutine_threadsafe(self._end(), asyncio.get_running_loop())

    async def _end(self) -> None:
        service, now = self._service, asyncio.get_running_loop().time
        if service.active:
            noun = "request" if service.active == 1 else "requests"
            self._say(f"closing: {service.active} {noun} may finish within {self._grace:g} s; once more ends at once")
        until = now() + self._grace
        while service.active and now() < until:
            await asyncio.sleep(POLL_SECONDS)
        if service.active:
            self._say(f"closing: {service.active} cancelled")
        await asyncio.to_thread(service.engine.close, drain=False)
        self.should_exit = True
