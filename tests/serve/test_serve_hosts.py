"""Whose requests these are: names that are not the server's, and bodies with two ends."""

from __future__ import annotations

import socket

import pytest
from http_calls import CHAT, COMPLETIONS, WAIT, read_all

from bitstrata.errors import UsageError
from bitstrata.serve.guard import is_served
from bitstrata.serve.process import is_loopback
from bitstrata.serve.settings import Settings, is_name

OURS = ["localhost", "LOCALHOST:80", "localhost.", "a.localhost:8000", "127.0.0.1", "127.0.0.1:1", "192.168.1.7:8000"]
OURS += ["[::1]", "[::1]:8000", "[fe80::1]:1"]
OTHERS = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost"]
OTHERS += ["127.0.0.1@evil.example", "[::1].evil.example", "", ":8000", "a b", "[::1", "::1", "127.0.0.1:1:2"]


def test_addresses_and_localhost_are_nobody_elses():
    assert [host for host in OURS if not is_served(host, ())] == []
    assert [host for host in OTHERS if is_served(host, ())] == []
    assert is_served("models.example:443", {"models.example"})
    assert is_served("MODELS.example.", {"models.example"})
    assert not is_served("a.models.example", {"models.example"})
    assert all(is_served(host, {"*"}) for host in OTHERS)
    assert [is_loopback(address) for address in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "10.0.0.1")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_a_page_that_took_our_address_gets_nothing(serving):
    """By any path or method, with the Origin that goes with its name or without."""
    body = {"prompt": "x", "max_tokens": 1}
    asks = [("GET", "/", None), ("GET", "/health", None), ("GET", "/v1/models", None), ("GET", "/metrics", None)]
    with serving(allowed_hosts=("models.example",)) as server:
        for method, path, sent in [*asks, ("POST", COMPLETIONS, body), ("POST", CHAT, {}), ("OPTIONS", CHAT, None)]:
            for origin in ({}, {"Origin": "http://evil.example:8000"}):
                answer = server.call(method, path, sent, {"Host": "evil.example:8000", **origin})
                answer.refused(403, "evil.example", "--allowed-host", code="host_not_allowed")
        for host in ("127.0.0.1:9", "a.localhost", "models.example", "Models.Example:443"):
            assert server.get("/health", Host=host).status == 200
            assert server.post(COMPLETIONS, body, Host=host).status == 200


def test_names_that_no_client_sends_are_refused_at_the_start():
    for wrong in ("http://a.example", "a.example:80", "a.example/", "", "A.example", "a b", "caf\udce9"):
        assert not is_name(wrong)
        with pytest.raises(UsageError, match="allowed-host"):
            Settings("small", allowed_hosts=(wrong,))
    assert is_name("a-b.example")


@pytest.mark.parametrize("path", ["/health", "/", COMPLETIONS, "/nothing"])
@pytest.mark.parametrize("old", [False, True])
def test_a_body_with_two_ends_is_refused_and_what_follows_is_not_read(server, path, old):
    """A proxy that goes by the other end would take the answer to what follows for another client's."""
    follows = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    length = b"" if old else b"Content-Length: %d\r\n" % (5 + len(follows))
    method = b"POST" if path == COMPLETIONS else b"GET"
    first = b"%s %s HTTP/1.%d\r\nHost: localhost\r\n%s" % (method, path.encode(), not old, length)
    first += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
    connection.sendall(first + follows)
    received = read_all(connection)  # up to where the server closes
    connection.close()
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"given twice" in received
