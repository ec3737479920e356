"""A server whose policy reads replies: calls at the bits of the request, prose lowered, and counted."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from arithmetic import exact_arithmetic
from http_calls import CHAT, events, served

import bitstrata
from bitstrata.runtime import Engine, parse_policy
from bitstrata.serve.app import create_app
from bitstrata.serve.settings import Settings

USER = [{"role": "user", "content": "what is the weather in Rome?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "x",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def lowering_server(checkpoint, templated):
    with exact_arithmetic():
        own = bitstrata.load(checkpoint, dtype=torch.float32)
    policy = parse_policy("structure:prose=2,structured=3")
    with (
        Engine(own, templated, policy=policy) as engine,
        served(create_app(engine, templated, Settings("small", min_bits=2)), engine) as running,
    ):
        yield running


def test_calls_and_prose_in_one_batch_are_counted_by_their_bits(lowering_server):
    call = {
        "messages": USER, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120
    }  # fmt: skip
    prose = {"messages": USER, "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    bodies = {"call": call, "prose": prose, "firm": {**prose, "min_bits": 4}, "plain": {**prose, "bits": 2}}
    replies = {}

    def ask(name):
        replies[name] = lowering_server.post(CHAT, bodies[name]).json

    threads = [threading.Thread(target=ask, args=(name,)) for name in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = {name: reply["usage"].get("bits") or {str(reply["bits"]): 1} for name, reply in replies.items()}
    assert used["firm"].keys() == {"4"}
    assert used["plain"].keys() == {"2"}
    assert used["call"]["4"] == used["prose"]["4"] == 1, "the first token's are the prompt's"
    assert used["call"].keys() == used["prose"].keys() == {"2", "3", "4"}
    (made,) = replies["call"]["choices"][0]["message"]["tool_calls"]
    assert json.loads(made["function"]["arguments"])["city"] in ("Rome", "Oslo")
    metrics = lowering_server.get("/metrics").body.decode()
    counted = {
        line.split('"')[1]: float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("bitstrata_tokens_by_bits_total{")
    }
    assert counted["3"] == used["call"]["3"] + used["prose"]["3"]
    chunks = [json.loads(data) for data in events(lowering_server.post(CHAT, {**call, "stream": True}).body)[:-1]]
    assert {chunk["bits"] for chunk in chunks if "bits" in chunk} >= {2, 3}
