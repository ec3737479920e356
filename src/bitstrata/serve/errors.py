"""Errors as OpenAI clients know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from ..errors import BitstrataError, ClosedError, InputError, ResourceError, UnsupportedBitsError, UsageError
from . import paths
from .fields import AS_TEXT, AS_TURNS, REFUSED
from .requests import ChatBody

log = logging.getLogger(__name__)
RETRY_SECONDS = 1
_PLACES = {"body", "query", "path", AS_TEXT, AS_TURNS}  # of fields
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refusal. An HTTPException, because FastAPI hands on no other error that comes up while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if status in (429, 503):
            headers = {"Retry-After": str(RETRY_SECONDS), **(headers or {})}
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, scope: Scope) -> Response:
        """To the request of `scope`; those who run the server see why, too."""
        path, status, where = str(scope["path"]), self.status_code, paths.route(scope["path"])
        kind = (where, status, self.code, self.param if self.param in ChatBody.model_fields else None)
        log.info("refused %s %s: %d, %s", scope["method"], path[:100], status, self.message, extra={"kind": kind})
        body = {"type": "error", **self.body()} if where in paths.ANTHROPIC else self.body()
        # ASCII only: what the client sent may hold half a surrogate pair, which no encoding takes
        return Response(json.dumps(body), status, self.headers, media_type="application/json")


def closing() -> ApiError:
    return ApiError(503, "the server is closing", code="closing")


def busy(message: str) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded")


def internal(error: Exception) -> ApiError:
    return ApiError(500, f"the request failed: {type(error).__name__}", code="internal_error")


def translate(error: Exception) -> ApiError:
    """What the engine, the tokenizer or the model raised, for a client."""
    match error:
        case ApiError():
            return error
        case ClosedError():
            return ApiError(503, error.sentence, code="closing")
        case ResourceError():
            return busy(error.sentence)
        case UnsupportedBitsError():
            return ApiError(400, error.sentence, param="bits", code="unsupported_bits")
        case UsageError() | InputError():
            return ApiError(400, error.sentence)
        case BitstrataError():
            return ApiError(500, error.sentence, code="internal_error")
    log.error("a request failed", exc_info=error)
    return internal(error)


def _validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by the field's name."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in _PLACES]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}")
    if first["type"] == REFUSED:
        name = ".".join([*where, first["ctx"]["param"]])
        return ApiError(400, f"{name}: {first['msg']}", param=name)
    message = str(first["msg"]).removeprefix("Value error, ")
    if where:
        name = ".".join(where)
        return ApiError(400, f"{name}: {message}", param=name)
    whole = first["type"] == "value_error"  # fields that contradict each other
    return ApiError(400, message if whole else f"the body must be a JSON object: {message}")


def install(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def refused(http: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):  # Starlette's own
            path, message = http.scope["path"], str(error.detail)
            if error.status_code == 404:
                message = paths.nothing_at(path)
            elif error.status_code == 405:
                message = f"this path does not take the method {http.method}; it takes {paths.method(path)}"
            error = ApiError(error.status_code, message, headers=error.headers)
        return error.response(http.scope)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        return _validation(error).response(http.scope)

    @app.exception_handler(BitstrataError)
    async def known(http: Request, error: BitstrataError) -> Response:
        return translate(error).response(http.scope)

    @app.exception_handler(Exception)
    async def unknown(http: Request, error: Exception) -> Response:  # the server logs it
        return internal(error).response(http.scope)
