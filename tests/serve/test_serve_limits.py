"""Keys, sizes, queues: who is let in, and with what."""

from __future__ import annotations

import time

import pytest
from http_calls import CHAT, COMPLETIONS, events, eventually, head, read_all

from bitstrata.serve import guard

LONG = {"prompt": "import os\n", "max_tokens": 900, "ignore_eos": True}


def test_only_health_is_open_without_the_key(serving):
    with serving(api_key="a secret") as server:
        assert server.get("/health").status == 200
        paths = [("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("POST", COMPLETIONS)]
        for method, path in [*paths, ("GET", "/nothing")]:
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a secret"}):
                answer = server.call(method, path, {"prompt": "x"} if method == "POST" else None, given)
                answer.refused(401, "Bearer KEY", code="invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        key = {"Authorization": "bearer a secret"}
        assert server.call("GET", "/v1/models", headers=key).status == 200
        assert server.call("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}, key).status == 200
        assert server.call("GET", "/v1/models", headers={"Authorization": "Bearer \xe9"}).status == 401


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ten_megabytes_is_refused(server, chunked):
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    sent = (body[start : start + 65536] for start in range(0, len(body), 65536)) if chunked else body
    server.post(CHAT, sent).refused(413, "4194304 bytes", code="body_too_large")
    assert server.get("/health").status == 200


def test_a_body_may_be_as_large_as_the_limit(serving):
    body = b'{"prompt": "x", "max_tokens": 1, "user": "%s"}'
    size = 1000
    with serving(max_body=size) as server:
        filled = body % (b"u" * (size - len(body) + 2))
        assert len(filled) == size
        assert server.post(COMPLETIONS, filled).status == 200
        server.post(COMPLETIONS, filled + b" ").refused(413)


def test_a_body_that_does_not_come_is_not_waited_for(serving, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with serving() as server:
        connection = server.connect(COMPLETIONS, {})
        connection.sendall(head(COMPLETIONS, 90) + b"{")
        received = b""
        while b"408" not in received:
            piece = connection.recv(65536)
            assert piece
            received += piece
        connection.close()


def test_prompts_can_be_limited(serving):
    with serving(max_prompt_tokens=10) as server:
        assert server.post(COMPLETIONS, {"prompt": [5] * 10, "max_tokens": 1}).status == 200
        server.post(COMPLETIONS, {"prompt": [5] * 11}).refused(
            400, "11 tokens, this server takes at most 10", code="context_length_exceeded"
        )


def test_a_full_queue_gives_429_and_serves_again_later(with_engine):
    with with_engine(max_requests=1, max_waiting=2) as server:
        connections = [server.connect(COMPLETIONS, {**LONG, "stream": True})]
        eventually(lambda: server.engine.stats().running == 1, "a running request")
        connections += [server.connect(COMPLETIONS, {**LONG, "stream": True}) for _ in range(2)]
        eventually(lambda: server.engine.stats().waiting == 2, "a full queue")
        refused = server.post(COMPLETIONS, LONG)
        refused.refused(429, "2 requests are waiting already", code="rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) > 0
        server.post(COMPLETIONS, {**LONG, "stream": True}).refused(429)
        # more choices than ever fit are no matter of trying again
        server.post(COMPLETIONS, {**LONG, "n": 3}).refused(400, "at most 2")
        for connection in connections:
            connection.close()
        eventually(server.is_idle, "the end of what nobody waits for")
        # all or none: the first of the two is not left behind
        blocking = [server.connect(COMPLETIONS, LONG)]
        eventually(lambda: server.engine.stats().running == 1, "a running request")
        blocking.append(server.connect(COMPLETIONS, LONG))
        eventually(lambda: server.engine.stats().waiting == 1, "a queue with one place")
        server.post(COMPLETIONS, {**LONG, "n": 2}).refused(429)
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, "bits": 9}).status == 400
        for connection in blocking:
            connection.close()
        eventually(server.is_idle, "an idle engine")
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200


def test_too_many_requests_under_way_give_429(serving):
    with serving(max_connections=2) as server:
        connections = [server.connect(COMPLETIONS, LONG) for _ in range(2)]
        eventually(lambda: server.engine.stats().running == 2, "two requests")
        server.post(COMPLETIONS, LONG).refused(429, "2 requests are under way")
        assert server.get("/health").status == server.get("/metrics").status == 200
        for connection in connections:
            connection.close()
        eventually(lambda: server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200, "room")


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_free_their_place(server, stream):
    before = server.engine.stats().finished["cancelled"]
    connections = [server.connect(COMPLETIONS, {**LONG, "stream": stream, "n": 2}) for _ in range(3)]
    if stream:
        for connection in connections:
            received = b""
            while received.count(b"data: ") < 4:  # in the middle of it
                received += connection.recv(65536)
    else:
        eventually(lambda: server.engine.stats().running == 6, "six running requests")
    for connection in connections:
        connection.close()
    eventually(server.is_idle, "an idle engine")
    assert server.engine.stats().finished["cancelled"] == before + 6
    assert server.app.state.service.active == 0


def test_a_client_that_reads_slowly_gets_everything(server):
    connection = server.connect(COMPLETIONS, {**LONG, "stream": True, "max_tokens": 300})
    eventually(lambda: server.engine.stats().running == 1, "its start")
    eventually(server.is_idle, "its end")  # the engine does not wait for readers
    time.sleep(0.1)
    data = events(read_all(connection))
    connection.close()
    assert data[-1] == "[DONE]"
    assert '"finish_reason":"length"' in data[-2]


def test_a_closed_engine_is_said_and_health_tells_it(with_engine):
    with with_engine() as server:
        assert server.get("/health").json == {"status": "ok"}
        server.engine.close()
        answer = server.get("/health")
        assert (answer.status, answer.json) == (503, {"status": "failed"})
        server.post(COMPLETIONS, {"prompt": "x"}).refused(503, "closed")


def test_what_goes_wrong_inside_is_a_server_error(with_engine, monkeypatch):
    with with_engine() as server:

        def fail(*_):
            raise RuntimeError("out of everything")

        monkeypatch.setattr(server.engine._forward, "run", fail)
        server.post(COMPLETIONS, {"prompt": "x"}).refused(500, "RuntimeError")
        connection = server.connect(CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True})
        data = events(read_all(connection))
        connection.close()
        assert '"type": "server_error"' in data[-2]
        assert data[-1] == "[DONE]"
        monkeypatch.undo()
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200


def test_metrics_count_what_was_done(with_engine):
    def value(name: str) -> float:
        lines = server.get("/metrics").body.decode().splitlines()
        found = [line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")]
        assert len(found) == 1, name
        return float(found[0])

    with with_engine(cache_tokens=2048) as server:
        assert server.get("/metrics").headers["content-type"].startswith("text/plain")
        server.post(COMPLETIONS, {"prompt": [5] * 7, "max_tokens": 4, "bits": 2, "ignore_eos": True})
        server.post(COMPLETIONS, {"prompt": [5] * 7, "max_tokens": 6, "bits": 3, "ignore_eos": True, "n": 2})
        server.post(COMPLETIONS, {"prompt": "x", "bits": 9})
        server.get("/what/ever")
        assert value('bitstrata_requests_total{outcome="length"}') == 3
        assert value("bitstrata_prompt_tokens_total") == 21
        assert value("bitstrata_new_tokens_total") == 16
        assert value('bitstrata_tokens_by_bits_total{bits="2"}') == 4
        assert value('bitstrata_tokens_by_bits_total{bits="3"}') == 12
        assert value("bitstrata_time_to_first_token_seconds_count") == 3
        assert value("bitstrata_time_per_output_token_seconds_count") == 3
        assert value("bitstrata_time_to_first_token_seconds_sum") > 0
        assert value("bitstrata_requests_running") == value("bitstrata_requests_waiting") == 0
        assert value("bitstrata_cache_used_tokens") == value("bitstrata_preemptions_total") == 0
        assert value("bitstrata_cache_tokens") == 2048
        assert value('bitstrata_http_responses_total{path="/v1/completions",status="200"}') == 2
        assert value('bitstrata_http_responses_total{path="/v1/completions",status="400"}') == 1
        assert value('bitstrata_http_responses_total{path="other",status="404"}') == 1
        connection = server.connect(COMPLETIONS, LONG)
        eventually(lambda: value("bitstrata_requests_running") == 1, "a running request")
        assert 256 <= value("bitstrata_cache_used_tokens") < 900, "as it goes, not for all that it may make"
        connection.close()
        eventually(lambda: value('bitstrata_requests_total{outcome="cancelled"}') == 1, "its cancellation")
