"""What every request passes before it is read: its host, the key, the number of requests, the size of the body.

Plain ASGI, so that streams and disconnects pass through untouched.

A web page can give its own name this machine's address (DNS rebinding); to the browser our answers are then that page's
own, and no rule about origins holds. What gives it away is its name in the Host header. Addresses and `localhost` are
safe: no page can have them for a name.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import paths
from .errors import ApiError, busy, closing
from .service import Service
from .settings import ANY

BODY_SECONDS = 60  # for a client to send its whole body
CLOSE = {"Connection": "close"}  # with an answer after which nothing more is read
# A client that is still sending when the connection closes may never see the answer, so a body that is too
# large is read to its end, within reason.
DISCARD_BYTES = 64 * 1024 * 1024
DISCARD_SECONDS = 10
_HOST = re.compile(r"(?P<name>\[[^]]*\]|[^:\[\]]*)(:\d*)?")


class Guard:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self._service = app, service
        key = service.settings.api_key
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, settings = self._service, self._service.settings
        path = paths.ordered(scope["path"], settings.root_path)
        # uvicorn leaves the body of an answer to HEAD away
        scope = {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                service.metrics.responses.labels(paths.route(path), str(message["status"])).inc()
                message["headers"] = [*message.get("headers", ()), (b"keep-alive", b"timeout=%d" % settings.keep_alive)]
            await send(message)

        headers = Headers(scope=scope)
        is_work = scope["method"] == "POST"  # the rest is cheap, and wanted when there is much to do
        counted = False

        def admit() -> None:
            """Only once its body is there a request takes a place: half a body must not keep others out."""
            nonlocal counted
            if is_work:
                if (full := self._full()) is not None:
                    raise full
                counted = True
                service.active += 1

        body = _Body(receive, headers, settings.max_body, admit)
        is_open = path in paths.OPEN
        refusal = self._misled(scope, headers)
        if refusal is None and scope["method"] == "OPTIONS" and (takes := paths.method(path)) is not None:
            allowed = {"Allow": f"{takes}, HEAD, OPTIONS" if takes == "GET" else f"{takes}, OPTIONS"}
            await Response(status_code=204, headers=allowed)(scope, receive, counting)  # a proxy asks, without a key
            return
        if refusal is None and not is_open:
            refusal = self._refusal(headers, is_work)
        if refusal is None and not is_open and body.announces_too_much:
            refusal = await body.too_large()
        if refusal is not None:
            await refusal.response(scope)(scope, receive, counting)
            return
        try:
            await self.app(scope, receive if is_open else body.receive, counting)
        finally:
            service.active -= counted

    def _misled(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why this request is not one that a client meant for this server."""
        if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
            # a proxy in front of us may see another end of it, and what comes after that is not its client's
            return ApiError(400, "the body's length is given twice, in ways that may differ", headers=CLOSE)
        host = headers.get("host")
        if host is not None and not is_served(host, self._service.settings.allowed_hosts):
            message = f"this server is not {host!r}; if that is a name of it, start it with --allowed-host NAME"
            return ApiError(403, message, code="host_not_allowed")
        return None

    def _refusal(self, headers: Headers, is_work: bool) -> ApiError | None:
        """Why this request is not let in."""
        if self._key is not None and not _has_key(headers, self._key):
            return ApiError(
                401,
                "this server needs its API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not is_work:
            return None
        # Web pages may send plain text to any server, this one included, but JSON only to one that allows it.
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return ApiError(415, "the body must be JSON, sent with Content-Type: application/json")
        return self._full()

    def _full(self) -> ApiError | None:
        """Why no request is taken now."""
        service = self._service
        if service.closing:
            return closing()
        if service.active >= service.settings.max_connections:
            return busy(f"{service.active} requests are under way already")
        return None


class _Body:
    """The request's body on its way in, counted and timed.

    whole: called when all of it is there; may raise ApiError.
    """

    def __init__(self, receive: Receive, headers: Headers, limit: int, whole: Callable[[], None]) -> None:
        self._receive, self._limit, self._whole = receive, limit, whole
        self._expects = "expect" in headers  # the client waits for our word before it sends: nothing to discard
        length = headers.get("content-length", "")
        self.announces_too_much = length.isdigit() and int(length) > limit
        self._size = 0
        self._is_read = False
        self._until: float | None = None

    async def receive(self) -> Message:
        """Raises ApiError: 413 once the body is too large, 408 if it does not come, and what `whole` raises."""
        if self._is_read:
            return await self._receive()
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + BODY_SECONDS
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._next()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS} s", headers=CLOSE) from None
        if self._size > self._limit:
            raise await self.too_large()
        if self._is_read and message["type"] == "http.request":
            self._whole()
        return message

    async def too_large(self) -> ApiError:
        """The refusal, once the client has stopped sending or sent far too much."""

        async def discard() -> None:
            while not self._is_read and self._size < DISCARD_BYTES:
                await self._next()

        if not self._expects:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(discard(), DISCARD_SECONDS)
        return ApiError(413, f"the body is larger than {self._limit} bytes", code="body_too_large")

    async def _next(self) -> Message:
        message = await self._receive()
        self._is_read = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        return message


def is_served(host: str, names: Collection[str]) -> bool:
    """Whether a request for `host`, NAME or NAME:PORT, is meant for a server that goes by `names` as well."""
    if ANY in names:
        return True
    found = _HOST.fullmatch(host.strip().lower())
    if found is None:
        return False
    name = found["name"].removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or name in names or is_address(name.strip("[]"))


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _has_key(headers: Headers, key: bytes) -> bool:
    """Whether the key is there: as a bearer, or where Anthropic's clients put it."""
    if hmac.compare_digest(headers.get("x-api-key", "").encode(), key):
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return hmac.compare_digest(given.strip().encode(), key) and scheme.lower() == "bearer"
