"""Errors as OpenAI clients know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ..errors import BitstrataError, ClosedError, InputError, ResourceError, UnsupportedBitsError, UsageError
from .requests import UNKNOWN

log = logging.getLogger(__name__)
RETRY_SECONDS = 1
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

    def response(self) -> Response:
        # ASCII only: what the client sent may hold half a surrogate pair, which no encoding takes
        return Response(json.dumps(self.body()), self.status_code, self.headers, media_type="application/json")


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
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}")
    if first["type"] == UNKNOWN:
        name = ".".join([*where, first["ctx"]["field"]])
        return ApiError(400, f"unknown field {name!r}", param=name, code="unknown_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    if where:
        name = ".".join(where)
        return ApiError(400, f"{name}: {message}", param=name)
    whole = first["type"] == "value_error"  # fields that contradict each other
    return ApiError(400, message if whole else f"the body must be a JSON object: {message}")


def install(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):  # Starlette's own
            said = {404: "there is nothing at this path", 405: "this path does not take this method"}
            message = said.get(error.status_code, str(error.detail))
            error = ApiError(error.status_code, message, headers=error.headers)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _validation(error).response()

    @app.exception_handler(BitstrataError)
    async def known(_: Request, error: BitstrataError) -> Response:
        return translate(error).response()

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Response:  # the server logs it
        return internal(error).response()
