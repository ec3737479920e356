"""The server as a process: its socket, its signals, its end.

The socket is bound before the model is loaded, so that a port in use is told at once, and the port is
known even if it was asked for as 0. It does not listen before the model is there.

The first SIGINT or SIGTERM closes the door: /health and new requests get 503, those under way have `grace`
seconds to finish; then they are cancelled, which ends their streams with an error event. The second
signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import UsageError
from .connections import ACCEPTED, connection_class
from .logs import limited_logs
from .service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG = 2048  # connections that the system holds until they are accepted
LAST_SECONDS = 5  # for answers that are finished to reach slow clients
POLL_SECONDS = 0.02


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


def serve(app: FastAPI, bound: socket.socket, *, grace: float, say: Callable[[str], None], ready: str) -> None:
    """Serve `app` on `bound` until a signal ends it; call from the main thread.

    Args:
        grace: seconds that requests under way have to finish.
        say: shows a message to whoever started the server.
        ready: said once requests are taken.
    """
    with limited_logs():
        asyncio.run(_Server(server_config(app), app.state.service, grace, say, ready).serve([bound]))


def server_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves `app`."""
    settings = app.state.service.settings
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        http=connection_class(settings.max_connections, settings.max_body),
        ws="none",
        lifespan="off",
        backlog=ACCEPTED,  # asyncio accepts so many at once as well; `Listening` has the system hold more
        timeout_graceful_shutdown=LAST_SECONDS,
    )


class Listening(uvicorn.Server):
    """uvicorn's server with our backlog."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(BACKLOG)


class _Server(Listening):
    def __init__(
        self, config: uvicorn.Config, service: Service, grace: float, say: Callable[[str], None], ready: str
    ) -> None:
        super().__init__(config)
        self._service, self._grace, self._say, self._ready = service, grace, say, ready
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say(self._ready)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signals again at the end: a process that was asked to end ends well."""
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.closing:
            self._say("ended at once")
            os._exit(128 + sig)
        self._service.closing = True
        self._loop.call_soon_threadsafe(self._start_ending)

    def _start_ending(self) -> None:
        self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        service = self._service
        if service.active:
            noun = "request" if service.active == 1 else "requests"
            self._say(f"closing: {service.active} {noun} may finish within {self._grace:g} s; once more ends at once")
        until = self._loop.time() + self._grace
        while service.active and self._loop.time() < until:
            await asyncio.sleep(POLL_SECONDS)
        if service.active:
            self._say(f"closing: {service.active} cancelled")
        await asyncio.to_thread(service.engine.close, drain=False)
        self.should_exit = True
