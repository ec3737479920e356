"""What goes into a chat template beside texts, and replies that begin with what was there before."""

from __future__ import annotations

import copy
import json

import pytest
from http_calls import CHAT, COMPLETIONS, events, served

from bitstrata.models import encode_turns
from bitstrata.serve.app import create_app
from bitstrata.serve.settings import Settings

KNOWING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    "{% if m.role == 'tool' %}#{{ m.tool_call_id }}{% endif %}{% if not loop.last %}|{% endif %}{% endfor %}"
    "{% if reasoning_effort %}!{{ reasoning_effort }}{% endif %}{% if enable_thinking is false %}?{% endif %}"
    "{% if add_generation_prompt %}|<reply>{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x<|endoftext|>y"}'}}
TURNS = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "sum"},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]


@pytest.fixture(scope="module")
def knowing(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = KNOWING
    return made


@pytest.fixture(scope="module")
def other(engine, knowing):
    with served(create_app(engine, knowing, Settings("small")), engine) as server:
        yield server


def rendered(server, **body) -> str:
    """The prompt of a chat as the model reads it."""
    tokens = server.post("/tokenize", body).json["tokens"]
    return server.post("/detokenize", {"tokens": tokens}).json["prompt"]


def test_tool_calls_and_their_results_reach_a_template_that_knows_them(other, knowing):
    text = '<user>add|<assistant>(sum)[add {"a": 1, "b": "x<|endoftext|>y"}]|<tool>3#c1|<reply>'
    assert rendered(other, messages=TURNS) == text
    tokens = other.post("/tokenize", {"messages": TURNS}).json["tokens"]
    assert knowing.eos_token_id not in tokens, "arguments cannot end a turn"
    assert knowing.eos_token_id in knowing(text).input_ids
    assert other.post(CHAT, {"messages": TURNS, "max_tokens": 1}).status == 200


def test_variables_reach_the_template_and_unknown_ones_are_told(other):
    user = [{"role": "user", "content": "x"}]
    given = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    assert rendered(other, messages=user, **given) == "<user>x!low?|<reply>"
    answer = other.post(CHAT, {"messages": user, "max_tokens": 1, "chat_template_kwargs": {"colour": "red"}})
    assert answer.json["warnings"] == ["colour was ignored: this model's chat template does not know it"]
    forged = other.post("/tokenize", {"messages": user, "reasoning_effort": "<|endoftext|>"}).json["tokens"]
    assert other.app.state.service.tokenizer.eos_token_id not in forged


@pytest.mark.parametrize("way", [{"continue_final_message": True}, {"prefix": True}], ids=str)
def test_a_reply_can_go_on_where_the_last_message_ends(other, tokenizer, way):
    begun = {"role": "assistant", "content": "def area(width,", **({"prefix": True} if "prefix" in way else {})}
    settings = {key: value for key, value in way.items() if key != "prefix"}
    messages = [{"role": "user", "content": "x"}, begun]
    text = "<user>x|<assistant>def area(width,"
    assert rendered(other, messages=messages, **settings) == text
    body = {"max_tokens": 8, "temperature": 0}
    reply = other.post(CHAT, {"messages": messages, **settings, **body}).json
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = other.post(COMPLETIONS, {"prompt": ids, **body}).json
    assert reply["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
    assert rendered(other, messages=messages[:1], add_generation_prompt=False) == "<user>x"


def test_turns_nested_without_end_are_refused(other):
    deep: dict = {}
    for _ in range(400):
        deep = {"a": deep}
    function = {"name": "f", "arguments": deep}
    turns = [{"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]
    other.post(CHAT, {"messages": turns}).refused(400, "deep", param="messages")


def test_an_echoed_prompt_has_its_log_probabilities_at_the_requests_bits(server, tokenizer):
    prompt = "def area(width, height):\n    return width"
    ids = tokenizer(prompt).input_ids
    body = {"prompt": [ids, ids], "temperature": 0, "echo": True, "logprobs": 2}
    for bits in (2, 4):
        reply = server.post(COMPLETIONS, {**body, "max_tokens": 3, "bits": bits}).json
        plain = server.post(COMPLETIONS, {"prompt": prompt, "temperature": 0, "max_tokens": 3, "bits": bits}).json
        for choice in reply["choices"]:
            shown = choice["logprobs"]
            assert choice["text"] == prompt + plain["choices"][0]["text"]
            assert len(shown["tokens"]) == len(ids) + 3
            assert shown["token_logprobs"][0] is shown["top_logprobs"][0] is None
            for token, logprob, top, offset in list(zip(*shown.values(), strict=True))[1:]:
                assert choice["text"][offset:].startswith(token)
                assert logprob <= max(top.values())
            assert shown["token_logprobs"][-1] == max(shown["top_logprobs"][-1].values())
        scores = [choice["logprobs"]["token_logprobs"][1 : len(ids)] for choice in reply["choices"]]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)
        only = server.post(COMPLETIONS, {**body, "max_tokens": 0, "bits": bits}).json
        assert only["usage"]["completion_tokens"] == 0
        for choice, whole in zip(only["choices"], reply["choices"], strict=True):
            assert choice["finish_reason"] == "length"
            assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
                whole["logprobs"]["token_logprobs"][1 : len(ids)], abs=1e-3
            )


def test_an_echo_without_log_probabilities_and_in_a_stream(server):
    body = {"prompt": "import os\n", "temperature": 0, "max_tokens": 4, "echo": True}
    whole = server.post(COMPLETIONS, body).json["choices"][0]["text"]
    assert whole.startswith("import os\n")
    assert len(whole) > len("import os\n")
    for logprobs in (None, 1):
        answer = server.post(COMPLETIONS, {**body, "stream": True, "logprobs": logprobs})
        chunks = [json.loads(data) for data in events(answer.body)[:-1]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    server.post(COMPLETIONS, {**body, "echo": False, "max_tokens": 0}).refused(400, "max_tokens")


def test_requests_sample_as_the_models_makers_advise(engine, tokenizer, monkeypatch):
    monkeypatch.setattr(engine.model.generation_config, "do_sample", False)
    body = {"prompt": "def area(width, height):", "max_tokens": 12}
    with served(create_app(engine, tokenizer, Settings("small")), engine) as server:
        greedy = server.post(COMPLETIONS, {**body, "temperature": 0}).json["choices"][0]["text"]
        assert server.post(COMPLETIONS, body).json["choices"][0]["text"] == greedy
        others = {
            server.post(COMPLETIONS, {**body, "temperature": 1, "seed": i}).json["choices"][0]["text"] for i in range(3)
        }
        assert len(others) > 1
    with served(create_app(engine, tokenizer, Settings("small", generation_config="none")), engine) as server:
        found = {server.post(COMPLETIONS, {**body, "seed": i}).json["choices"][0]["text"] for i in range(3)}
        assert found == others, "temperature 1 where nobody says it"


def test_a_conversation_is_what_it_was_before(knowing):
    turns = [{"role": "user", "content": "x"}]
    assert encode_turns(knowing, turns) == knowing.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
