"""A server in a thread, and plain HTTP to talk to it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bitstrata.runtime import Engine
from bitstrata.serve.process import Server, bind

WAIT = 60  # seconds before a test gives up; no test measures time
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def refused(self, status: int, *said: str, param: str | None = None, code: str | None = None) -> None:
        """Assert a refusal in OpenAI's form, with these words."""
        assert self.status == status, self.body
        assert self.headers["content-type"] == "application/json"
        assert self.json.keys() == {"error"}
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        for part in said:
            assert part in error["message"]
        assert param is None or error["param"] == param
        assert code is None or error["code"] == code


@dataclass(frozen=True)
class Served:
    """A running server."""

    port: int
    engine: Engine
    app: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        try:
            sent = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, sent, {**JSON, **(headers or {})})
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, named, answer.read())
        finally:
            connection.close()

    def post(self, path: str, body: bytes | dict[str, Any], **headers: str) -> Answer:
        return self.call("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def get(self, path: str, **headers: str) -> Answer:
        return self.call("GET", path, headers=headers)

    def connect(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A connection on which a request was sent and nothing read."""
        return send(self.port, path, body)

    def is_idle(self) -> bool:
        stats = self.engine.stats()
        return (stats.running, stats.waiting, stats.cache_used_tokens) == (0, 0, 0)


def head(path: str, length: int) -> bytes:
    """The header of a request with so many bytes of JSON."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


def send(port: int, path: str, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
    connection.sendall(head(path, len(data)) + data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end of a response, or of the connection."""
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        piece = connection.recv(65536)
        if not piece:
            break
        received += piece
    return received


def events(stream: bytes) -> list[str]:
    """The data of server-sent events."""
    lines = stream.decode().splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def eventually(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until, f"never came: {what}"
        time.sleep(0.01)


@contextmanager
def served(app: Any, engine: Engine) -> Iterator[Served]:
    """`app` on a free port of this machine, in a thread."""
    bound = bind("127.0.0.1", 0)
    server = Server(app)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    eventually(lambda: server.started, "the server's start")
    try:
        yield Served(bound.getsockname()[1], engine, app)
    finally:
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()
