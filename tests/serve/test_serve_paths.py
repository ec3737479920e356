"""Paths as clients and proxies call them."""

from __future__ import annotations

import pytest
from http_calls import CHAT, COMPLETIONS, JSON, events, eventually, read_all

from bitstrata.serve import stream
from bitstrata.serve.paths import METHODS, ordered

ASKED = {"prompt": "x", "max_tokens": 1}


@pytest.mark.parametrize("path", ["/completions", "//v1//completions", "/v1/completions/", "/v1/v1/completions"])
def test_other_spellings_of_a_path_are_served(server, path):
    assert server.post(path, ASKED).status == 200


def test_every_path_stays_what_it_is():
    for path in METHODS:
        assert ordered(path, "") == path
        assert ordered("/llm" + path, "/llm") == path
    assert ordered("/llmx/health", "/llm") == "/llmx/health"
    assert ordered("/llm", "/llm") == "/"
    assert ordered("/v1", "") == "/v1"


def test_head_and_options_answer_as_proxies_expect(server, serving):
    head = server.call("HEAD", "/health")
    assert (head.status, head.body) == (200, b"")
    assert server.call("HEAD", "/v1/models").status == 200
    asked = server.call("OPTIONS", CHAT)
    assert (asked.status, asked.headers["allow"], asked.body) == (204, "POST, OPTIONS", b"")
    assert server.call("OPTIONS", "/health").headers["allow"] == "GET, HEAD, OPTIONS"
    server.call("OPTIONS", "/nothing").refused(404)
    with serving(api_key="k") as closed:
        assert closed.call("HEAD", "/v1/models").status == 401
        assert closed.call("HEAD", "/health").status == 200
        assert closed.post(COMPLETIONS, ASKED, X_API_Key="k").status == 200
        closed.post(COMPLETIONS, ASKED, X_API_Key="j").refused(401)
        closed.post("/completions", ASKED).refused(401)
        closed.post("//health/../v1/completions", ASKED).refused(401)


def test_a_wrong_path_or_method_is_told_the_right_one(server):
    server.post("/v1/chat/completion", {}).refused(404, "did you mean /v1/chat/completions?")
    server.post("/v1/chat", {}).refused(404, "/v1/chat/completions")
    server.post("/api/generate", {}).refused(404, "nothing at this path")
    server.get(CHAT).refused(405, "GET", "takes POST")


def test_everything_is_served_below_a_prefix(serving):
    with serving(root_path="/llm") as server:
        assert server.post("/llm/v1/completions", ASKED).status == 200  # a proxy that leaves the prefix there
        assert server.post("/v1/completions", ASKED).status == 200  # one that takes it off
        assert server.get("/llm/health").status == 200
        assert server.get("/llm").headers["content-type"].startswith("text/html")
        assert server.get("/openapi.json").json["servers"] == [{"url": "/llm"}]


def test_an_idle_connection_is_kept_as_long_as_is_said(serving):
    with serving(keep_alive=33) as server:
        assert server.get("/health").headers["keep-alive"] == "timeout=33"
        assert server.post(COMPLETIONS, ASKED, **{"Content-Type": JSON["Content-Type"]}).status == 200


def test_one_model_by_its_name(server):
    assert server.get("/v1/models/small:3").json["bits"] == 3
    assert server.get("/models/small").json["id"] == "small"


def test_tokens_of_texts_and_turns_and_back(server, chat_server, tokenizer):
    text = "def area(width, height):"
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert found["tokens"] == tokenizer(text).input_ids
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == server.engine.limits.longest
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": text}
    messages = [{"role": "user", "content": text}]
    turns = chat_server.post("/tokenize", {"messages": messages}).json
    whole = chat_server.post(CHAT, {"messages": messages, "max_tokens": 1}).json
    assert turns["count"] == whole["usage"]["prompt_tokens"]
    assert server.post("/tokenize", {"prompt": text}).json["token_strs"] is None
    server.post("/tokenize", {}).refused(400)
    server.post("/tokenize", {"prompt": text, "model": "other"}).refused(404)
    server.post("/detokenize", {"tokens": [10**9]}).refused(400, "is not a token")
    server.post("/detokenize", {"tokens": "x"}).refused(400, "tokens")


def test_a_stream_that_waits_says_that_it_is_alive(with_engine, monkeypatch):
    monkeypatch.setattr(stream, "PING_SECONDS", 0.02)
    with with_engine(max_requests=1) as server:
        busy = server.connect(COMPLETIONS, {"prompt": "x", "max_tokens": 900, "ignore_eos": True})
        eventually(lambda: server.engine.stats().running == 1, "a running request")
        waiting = server.connect(COMPLETIONS, {"prompt": "x", "max_tokens": 2, "stream": True})
        received = b""
        while received.count(b": ping\n\n") < 3:
            piece = waiting.recv(65536)
            assert piece, received
            received += piece
        assert b"data:" not in received
        busy.close()
        received += read_all(waiting)
        waiting.close()
    assert events(received)[-1] == "[DONE]"
