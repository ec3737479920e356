"""What every request passes before it is read: its host, the key, the number of requests, the size of the body.

Plain ASGI, so that streams and disconnects pass through untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import ApiError, busy, closing
from .hosts import is_served
from .service import Service

OPEN = {"/", "/health"}  # paths that need no key and are served however much there is to do
BODY_SECONDS = 60  # for a client to send its whole body
CLOSE = {"Connection": "close"}  # with an answer after which nothing more is read
# A client that is still sending when the connection closes may never see the answer, so a body that is too
# large is read to its end, within reason.
DISCARD_BYTES = 64 * 1024 * 1024
DISCARD_SECONDS = 10


class Guard:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self._service = app, service
        key = service.settings.api_key
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service = self._service

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                service.metrics.responses.labels(_route(scope["path"]), str(message["status"])).inc()
            await send(message)

        headers = Headers(scope=scope)
        misled = self._misled(scope, headers)
        if misled is not None:
            await misled.response()(scope, receive, counting)
            return
        if scope["path"] in OPEN:
            await self.app(scope, receive, counting)
            return
        is_work = scope["method"] == "POST"  # the rest is cheap, and wanted when there is much to do
        counted = False

        def admit() -> None:
            """Only once its body is there a request takes a place: half a body must not keep others out."""
            nonlocal counted
            refusal = self._full()
            if refusal is not None:
                raise refusal
            counted = True
            service.active += 1

        body = _Body(
            receive, service.settings.max_body, admit if is_work else lambda: None, expects="expect" in headers
        )
        refusal = self._refusal(headers, is_work)
        if refusal is None and body.announces_too_much(headers):
            refusal = await body.too_large()
        if refusal is not None:
            await refusal.response()(scope, receive, counting)
            return
        try:
            await self.app(scope, body.receive, counting)
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

    def __init__(self, receive: Receive, limit: int, whole: Callable[[], None], *, expects: bool) -> None:
        self._receive, self._limit, self._whole = receive, limit, whole
        self._expects = expects  # the client waits for our word before it sends: nothing needs to be discarded
        self._size = 0
        self._read = False
        self._until: float | None = None

    def announces_too_much(self, headers: Headers) -> bool:
        length = headers.get("content-length", "")
        return length.isdigit() and int(length) > self._limit

    async def receive(self) -> Message:
        """Raises ApiError: 413 once the body is too large, 408 if it does not come, and what `whole` raises."""
        if self._read:
            return await self._receive()
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + BODY_SECONDS
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS} s", headers=CLOSE) from None
        self._read = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise await self.too_large()
        if self._read and message["type"] == "http.request":
            self._whole()
        return message

    async def too_large(self) -> ApiError:
        """The refusal, once the client has stopped sending or sent far too much."""

        async def discard() -> None:
            while not self._read and self._size < DISCARD_BYTES:
                message = await self._receive()
                self._read = not message.get("more_body", False)
                self._size += len(message.get("body", b""))

        if not self._expects:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(discard(), DISCARD_SECONDS)
        return ApiError(413, f"the body is larger than {self._limit} bytes", code="body_too_large")


def _has_key(headers: Headers, key: bytes) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return hmac.compare_digest(given.strip().encode(), key) and scheme.lower() == "bearer"


def _route(path: str) -> str:
    """A label of which there are few, whatever clients ask for."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    known = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health", "/openapi.json", "/"}
    return path if path in known else "other"
