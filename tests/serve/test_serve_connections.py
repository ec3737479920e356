"""Connections that do not come to a request: they take no place from those that do, and not for ever."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import sys
from collections.abc import Iterator

import pytest
from http_calls import COMPLETIONS, WAIT, Served, eventually, head, read_all, send

from bitstrata.serve import guard, process
from bitstrata.serve.process import Connections, limited_logs, most_requests

SHORT = {"prompt": "x", "max_tokens": 1}
HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-"


def connect(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)


def is_closed(connection: socket.socket) -> bool:
    """Wait until the server has closed a connection on which nothing else comes."""
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


@contextlib.contextmanager
def many(server: Served, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    opened = []
    try:
        for _ in range(count):
            opened.append(connect(server))
            opened[-1].sendall(sent)
        yield opened
    finally:
        for connection in opened:
            connection.close()


@pytest.mark.parametrize("sent", [b"", HALF, head(COMPLETIONS, 90) + b"{"])
def test_connections_without_a_whole_request_are_bounded_and_the_oldest_goes(serving, sent):
    most = 2 * 4 + process.SPARE_CONNECTIONS
    with serving(max_connections=4) as server, many(server, 3 * most, sent) as opened:
        assert all(is_closed(connection) for connection in opened[: 2 * most])
        assert server.get("/health").status == 200
        assert server.post(COMPLETIONS, SHORT).status == 200
        opened[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            opened[-1].recv(1)


def test_what_is_being_answered_is_never_closed_for_others(serving):
    with serving(max_connections=4) as server:
        answered = [
            send(server.port, COMPLETIONS, {"prompt": "import os\n", "max_tokens": 300, "ignore_eos": True})
            for _ in range(4)
        ]
        eventually(lambda: server.engine.stats().running == 4, "four running requests")
        with many(server, 100):
            for connection in answered:
                assert read_response(connection) == 200
                connection.close()


def read_response(connection: socket.socket) -> int:
    received = b""
    while b"}]" not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return int(received.split()[1])


@pytest.mark.parametrize("sent", [b"", HALF])
@pytest.mark.parametrize("answered", [False, True])
def test_a_header_that_does_not_come_is_not_waited_for(serving, monkeypatch, sent, answered):
    """Neither from the beginning nor after a request, however many bytes drip in."""
    monkeypatch.setattr(process, "HEADER_SECONDS", 0.3)
    with serving(keep_alive=1 if answered and not sent else 3600) as server:
        connection = connect(server)
        if answered:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not connection.recv(65536).endswith(b'{"status":"ok"}'):
                pass
        connection.sendall(sent)
        connection.settimeout(0.05)

        def ends() -> bool:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(b"a" if sent else b"")
            try:
                return is_closed(connection)
            except TimeoutError:
                return False

        eventually(ends, "the end of a connection that asks for nothing")
        connection.close()


def test_a_body_that_drips_in_has_the_time_of_one_body(serving, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with serving() as server:
        connection = connect(server)
        connection.sendall(head(COMPLETIONS, 1_000_000) + b"{")
        connection.settimeout(0.1)  # each piece comes well within the time
        received = b""

        def is_told() -> bool:
            nonlocal received
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                received += connection.recv(65536)
            return b"408" in received

        eventually(is_told, "the end of a body that takes too long")
        connection.close()


def test_half_bodies_take_no_place(serving):
    with serving(max_connections=3) as server, many(server, 10, head(COMPLETIONS, 90) + b"{") as opened:
        assert server.post(COMPLETIONS, SHORT).status == 200
        whole = b'{"prompt": "x", "max_tokens": 1}'
        opened[-1].sendall(whole[1:].ljust(89))  # and may become whole
        assert read_response(opened[-1]) == 200


def send_without_end(connection: socket.socket, data: bytes) -> None:
    while True:
        connection.sendall(data)


def test_a_client_that_reads_nothing_is_cut_off(serving, monkeypatch):
    monkeypatch.setattr(process, "SEND_SECONDS", 0.3)
    with serving() as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(WAIT)
        connection.connect(("127.0.0.1", server.port))
        # a page of schemas, again and again, of which nothing is read
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # TimeoutError where it is not cut off
            send_without_end(connection, ask * 100)
        connection.close()


def test_half_bodies_hold_so_much_memory_and_not_more():
    class Held:
        cut_off = False

        def abort(self):
            self.cut_off = True

    connections = Connections(most=100, most_body=50, most_bytes=100)
    _, second, third = held = [Held(), Held(), Held()]
    for connection in held:
        connections.opened(connection)
        connections.received(connection, 40)
    assert [connection.cut_off for connection in held] == [True, False, False]
    connections.received(second, 1000)  # of a body that is too large no more than this is kept
    assert [connection.cut_off for connection in held] == [True, False, False]
    assert connections.bytes == 90
    connections.complete(second)
    assert connections.bytes == 40
    connections.closed(third)
    assert (connections.bytes, connections.open, connections.unfinished) == (0, {second}, {})


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_there_are_never_more_connections_than_files(monkeypatch):
    import resource

    limits = [(256, 256)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: limits.append(given))
    gc.collect()
    possible = most_requests(512)
    assert possible >= 1
    assert 2 * possible + process.SPARE_CONNECTIONS + process.SPARE_FILES < 256
    limits.append((256, 100_000))  # may be raised
    assert most_requests(512) == 512
    assert 1024 < limits[-1][0] < 2048
    assert limits[-1][1] == 100_000
    limits.append((8, 8))
    assert most_requests(512) == 1


def test_what_bad_clients_send_is_logged_once(server, caplog):
    with limited_logs(), caplog.at_level(logging.WARNING):
        for _ in range(30):
            connection = connect(server)
            connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            assert b"400" in read_all(connection)
            connection.close()
    assert [record.getMessage() for record in caplog.records] == ["Invalid HTTP request received."]


def test_errors_of_each_kind_are_logged_and_counted(caplog, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("bitstrata.serve.process.time.monotonic", lambda: clock[0])
    log = logging.getLogger("uvicorn.error")
    with limited_logs():
        for number in range(10):
            for kind in (ValueError, KeyError):
                log.error("Exception in ASGI application\n", exc_info=kind(number))
        clock[0] = 61
        log.error("Exception in ASGI application\n", exc_info=None)
        for _ in range(2):
            log.error("once more: %d", 5)
    log.error("after that all are")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["Exception in ASGI application\n"] * 3 + ["once more: 5", "after that all are"]
    with limited_logs():
        for second in (100, 101, 161):
            clock[0] = second
            log.error("%d%% full", 99)
    assert caplog.records[-1].getMessage() == "99% full (1 more like this in the meantime)"
