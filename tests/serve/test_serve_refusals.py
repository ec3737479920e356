"""Wrong requests are refused in OpenAI's form, by name, and disturb nobody."""

from __future__ import annotations

import json

import pytest
from http_calls import CHAT, COMPLETIONS, Served

USER = [{"role": "user", "content": "x"}]


@pytest.fixture(autouse=True)
def _still_serves(server: Served):
    """Whatever was refused, the server is idle afterwards and takes the next request."""
    yield
    assert server.is_idle()
    assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "prompt|object|body"),
        (b"{", "not JSON"),
        (b'{"prompt": "x",}', "not JSON"),
        (b"\xff\xfe", "body"),
        (b"[1, 2]", "must be a JSON object"),
        (b'"prompt"', "must be a JSON object"),
        (b"null", "body|prompt|required"),
        (b"[" * 100_000, "body"),
        (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "prompt|body"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "x", "\\ud800": 1}', "surrogate|unicode"),
        (b'{"prompt": "x", "model": "\\udfff"}', "surrogate"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": Infinity}', "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "body|seed"),
    ],
)
def test_what_is_not_a_json_object(server, body, said):
    answer = server.post(COMPLETIONS, body)
    answer.refused(400)
    assert any(part in answer.json["error"]["message"] for part in said.split("|")), answer.body


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["x", 3]}, "prompt"),
        ({"prompt": [[1], "x"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [-1]}, "-1 is not a token"),
        ({"prompt": [10**30]}, "is not a token"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"model": 3}, "model"),
        ({"bits": True}, "bits"),
        ({"bits": 2.5}, "bits"),
        ({"bits": 0}, "supported bits: 2, 3, 4"),
        ({"bits": -(10**30)}, "supported bits: 2, 3, 4"),
        ({"min_bits": 9}, "supported bits: 2, 3, 4"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "at most 128"),
        ({"prompt": ["x"] * 65, "n": 2}, "at most 128"),
        ({"n": 10**30}, "at most 128"),
        ({"stop": 3}, "stop"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"stop": [3]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"suffix": "end"}, "this model's vocabulary has no marks for a text between two others"),
        ({"suffix": "end", "echo": True}, "cannot go with echo"),
        ({"suffix": 5}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"presence_penalty": "much"}, "presence_penalty"),
        ({"logit_bias": {"five": 1}}, "'five' is not a token"),
        ({"logit_bias": {"5": 101}}, "bias of token 5"),
        ({"logit_bias": {"5": None}}, "bias of token 5"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "999999 is not a token"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 0.5}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"guided_json": {"type": "odd"}}, "guided_json"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"mirostat": 2}, "mirostat"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ],
    ids=str,
)
def test_wrong_fields_of_a_completion(server, changes, said):
    answer = server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, **changes})
    answer.refused(400, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": ["x"]}, "messages.0"),
        ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "need a chat template"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "parts must be"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}]},
            "need a chat template",
        ),
        ({"messages": [*USER, {"role": "user", "content": "x", "prefix": True}]}, "continue_final_message"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "'chat_template' is not a variable"),
        ({"chat_template_kwargs": {"tokenize": False}}, "'tokenize' is not a variable"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "differ"),
    ],
    ids=str,
)
def test_wrong_fields_of_a_chat(server, changes, said):
    server.post(CHAT, {"messages": USER, **changes}).refused(400, said)


def test_what_asks_for_nothing_special_is_accepted(server):
    harmless = {
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "top_k": -1,
        "stop": None,
        "seed": None,
        "something_new": None,
        "max_tokens": 2,
    }
    messages = [{"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "audio": None}, *USER]
    chat = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    assert server.post(CHAT, {"messages": messages, **harmless, **chat}).status == 200
    completion = {"echo": False, "suffix": None, "best_of": 1}
    assert server.post(COMPLETIONS, {"prompt": "x", **harmless, **completion}).status == 200


def test_paths_and_methods(server):
    server.get("/v2/nothing").refused(404, "nothing at this path")
    server.get("/docs").refused(404)
    wrong = server.get(COMPLETIONS)
    wrong.refused(405, "method")
    assert wrong.headers["allow"] == "POST"
    server.post("/v1/models", {}).refused(405)
    server.get("/v1/models/other").refused(404, "there are small, small:2, small:3, small:4", code="model_not_found")
    server.get("/v1/models/small:03").refused(404)
    server.post(COMPLETIONS, {"prompt": "x", "model": "small:"}).refused(404, code="model_not_found")
    server.post(COMPLETIONS, {"prompt": "x", "model": "small:x"}).refused(404)


def test_only_json_is_read(server):
    """What a web page may send to a server that does not expect it is not JSON."""
    body = json.dumps({"prompt": "x"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        server.post(COMPLETIONS, body, Content_Type=kind).refused(415, "application/json")
    assert server.post(COMPLETIONS, body, Content_Type="application/json; charset=utf-8").status == 200


def test_other_sites_may_not_call_unless_they_are_named(server, serving):
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.call("OPTIONS", COMPLETIONS, headers=asks).headers
    with serving(allowed_origins=("https://a.example",), api_key="k") as open_server:
        answer = open_server.call("OPTIONS", COMPLETIONS, headers=asks)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
        other = open_server.call("OPTIONS", COMPLETIONS, headers={**asks, "Origin": "https://b.example"})
        assert other.headers.get("access-control-allow-origin") != "https://b.example"
