"""`--middleware bitstrata.integrations.vllm.names.ModelNames`: bits by the model's name, `OUT:3`, as in our own server.

vLLM serves one model under several names (`--served-model-name OUT OUT:2 OUT:3`), and does not tell anybody by which
name a request came. This looks at the body of a request before vLLM does, and puts into its `vllm_xargs` what follows
the last colon of `model`, if that is a number or the name of a plan. The fields `bits` and `min_bits` of a body, which
vLLM would ignore, go there as well. Nothing else of a body is changed, replies are not looked at, and all checks are
vLLM's: names that are not served get its 404, bits that are not offered its 400.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .offered import BITS, MIN_BITS, served

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
ARGUMENTS = "vllm_xargs"
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ModelNames:
    """An ASGI application in front of another one.

    Raises UsageError where the model is none of ours.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        served()
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and scope["method"] == "POST" and path in PATHS:
            # a body is read when the application asks for it, which it does after it has checked who asks; how long
            # it will be is not known before
            headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
            scope, receive = {**scope, "headers": headers}, _Body(receive)
        await self.app(scope, receive, send)


class _Body:
    """What an application receives: the whole body, as it should have come, and then what else comes."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._given = receive, False

    async def __call__(self) -> Message:
        if self._given:
            return await self._receive()
        parts = []
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                return message  # the client has gone
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        self._given = True
        return {"type": "http.request", "body": with_arguments(b"".join(parts)), "more_body": False}


def with_arguments(body: bytes) -> bytes:
    """A body of JSON, with what its name of a model and its own fields ask for in `vllm_xargs`.

    What is given twice and differs becomes a list, which is refused like any other bits that are not there. Bodies
    that are no JSON, or that vLLM will refuse for their types, stay as they are.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(fields, dict):
        return body
    arguments = fields.get(ARGUMENTS)
    if arguments is not None and not isinstance(arguments, dict):
        return body
    changed = dict(arguments or {})
    for key in (BITS, MIN_BITS):
        values = [fields.pop(key, None), changed.get(key), _named(fields.get("model")) if key == BITS else None]
        given = [value for place, value in enumerate(values) if value is not None and value not in values[:place]]
        if given:
            changed[key] = given[0] if len(given) == 1 else given
    return body if changed == (arguments or {}) else json.dumps({**fields, ARGUMENTS: changed}).encode()


def _named(model: Any) -> int | str | None:
    """What a model's name asks for."""
    tail = model.rpartition(":")[2] if isinstance(model, str) and ":" in model else ""
    if tail.isascii() and tail.isdigit() and len(tail) <= 3:
        return int(tail)
    return tail if tail in served().plans else None
