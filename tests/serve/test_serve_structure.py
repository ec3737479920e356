"""Replies held to what a request says they must be, over HTTP and in every API."""

from __future__ import annotations

import json
import re

import openai
import pytest
from http_calls import CHAT, COMPLETIONS, WAIT, events
from pydantic import BaseModel

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
USER = [{"role": "user", "content": "write a loop"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
STRICT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


class Thing(BaseModel):
    name: str
    kind: bool


def fits(text: str) -> bool:
    read = json.loads(text)
    return set(read) == {"name", "count"} and len(read["name"]) <= 8 and 0 <= read["count"] <= 9


FIELDS = {
    "response_format": (STRICT, fits),
    "json_object": (
        {"type": "json_object", "schema": {"type": "object", "maxProperties": 0}},
        lambda text: json.loads(text) == {},
    ),
    "structured_outputs json": ({"json": SCHEMA}, fits),
    "structured_outputs regex": ({"regex": "[ab]{3}"}, lambda text: re.fullmatch("[ab]{3}", text)),
    "guided_json": (json.dumps(SCHEMA), fits),
    "guided_regex": ("[ab]{3}", lambda text: re.fullmatch("[ab]{3}", text)),
    "guided_choice": (["yes", "no"], lambda text: text in ("yes", "no")),
    "guided_grammar": ('start: "a" | "b"', lambda text: text in "ab"),
    "grammar": ('root ::= "xy" | "z"', lambda text: text in ("xy", "z")),
    "json_schema": (SCHEMA, fits),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_field_that_says_it(chat_server, name, path):
    value, check = FIELDS[name]
    field = "response_format" if name == "json_object" else name.split()[0]
    asked = {"messages": USER} if path == CHAT else {"prompt": "write a loop"}
    body = {
        **asked,
        "max_tokens": 60,
        "temperature": 0,
        "bits": 3,
        "logprobs": True if path == CHAT else 1,
        field: value,
    }
    whole = chat_server.post(path, body).json["choices"][0]
    text = whole["message"]["content"] if path == CHAT else whole["text"]
    assert check(text), text
    assert whole["finish_reason"] == "stop"
    assert whole["logprobs"]
    chunks = [
        json.loads(data)["choices"][0] for data in events(chat_server.post(path, {**body, "stream": True}).body)[:-1]
    ]
    pieces = [(chunk["delta"].get("content") if path == CHAT else chunk["text"]) or "" for chunk in chunks]
    assert "".join(pieces) == text
    assert chunks[-1]["finish_reason"] == "stop"


def test_a_reply_that_is_cut_says_so(chat_server):
    choice = chat_server.post(CHAT, {"messages": USER, "max_tokens": 3, "response_format": STRICT}).json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")
    assert "}" not in choice["message"]["content"]


def test_the_official_client_parses(chat_server):
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="-", max_retries=0, timeout=WAIT) as client:
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(model="small", messages=USER, response_format=Thing, max_tokens=2)
        found = 0
        for seed in range(6):
            try:
                reply = client.chat.completions.parse(
                    model="small:4", messages=USER, response_format=Thing, max_tokens=300, seed=seed
                )
            except openai.LengthFinishReasonError:  # a string without end
                continue
            assert isinstance(reply.choices[0].message.parsed, Thing)
            found += 1
        assert found


def test_the_other_apis(chat_server):
    flat = {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}
    reply = chat_server.post(RESPONSES, {"input": "x", "max_output_tokens": 60, "text": {"format": flat}}).json
    assert fits(reply["output"][0]["content"][0]["text"])
    assert reply["status"] == "completed"
    assert reply["text"]["format"] == flat
    body = {"messages": USER, "max_tokens": 60, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    reply = chat_server.post(MESSAGES, body).json
    assert fits(reply["content"][0]["text"])
    assert reply["stop_reason"] == "end_turn"


def test_what_cannot_be_enforced_is_told_unless_it_must_be(chat_server):
    odd = {"type": "array", "items": {"enum": [1]}, "maxItems": 2, "uniqueItems": True}
    lenient = {"type": "json_schema", "json_schema": {"name": "x", "schema": odd}}
    reply = chat_server.post(CHAT, {"messages": USER, "max_tokens": 20, "response_format": lenient}).json
    assert json.loads(reply["choices"][0]["message"]["content"]) in ([], [1], [1, 1])
    assert reply["warnings"] == ['response_format is not enforced in full: Unimplemented keys: ["uniqueItems"]']
    lenient["json_schema"]["strict"] = True
    chat_server.post(CHAT, {"messages": USER, "response_format": lenient}).refused(
        400, "uniqueItems", param="response_format"
    )


def nested(levels: int) -> dict:
    made: dict = {}
    for _ in range(levels):
        made = {"items": made}
    return made


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": "foo"}}}, "response_format", "foo"),
        ({"response_format": 3}, "response_format", "object"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_choice": "ab"}, "guided_choice", "list"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": nested(100)}, "guided_json", "deep"),
        ({"grammar": "root ::= ("}, "grammar", "cannot be used"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "structural_tag"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, None, "ignore_eos"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_by_name(chat_server, body, param, said):
    chat_server.post(CHAT, {"messages": USER, "max_tokens": 4, **body}).refused(400, said, param=param)
