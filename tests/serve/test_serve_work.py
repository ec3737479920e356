"""What a body can make the server do is bounded before it is done, and none of it is done on the event loop."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from http_calls import CHAT, COMPLETIONS, served
from pydantic_core import ValidationError

from bitstrata.serve import fields, requests, text, turns
from bitstrata.serve.app import create_app
from bitstrata.serve.errors import ApiError
from bitstrata.serve.settings import Settings
from bitstrata.serve.text import JOINED, LONG, LONG_AT_ONCE, PromptEncoder


class Watch:
    """Stands in for a function that encodes: notes its calls, their threads, and how many there are at a time."""

    def __init__(self, function):
        self._function, self._lock = function, threading.Lock()
        self.calls, self.now, self.most, self.threads = 0, 0, 0, set()
        self.both = threading.Event()  # LONG_AT_ONCE are at it

    def __call__(self, *arguments, **settings):
        with self._lock:
            self.calls += 1
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.add(threading.current_thread().name)
            if self.now == LONG_AT_ONCE:
                self.both.set()
        try:
            return self._function(*arguments, **settings)
        finally:
            with self._lock:
                self.now -= 1


@pytest.fixture
def encoding(monkeypatch):
    """encoding(name) -> a Watch of text.NAME"""

    def watch(name):
        watched = Watch(getattr(text, name))
        monkeypatch.setattr(text, name, watched)
        return watched

    return watch


def test_texts_that_cannot_fit_are_refused_before_the_tokenizer_sees_them(server, chat_server, encoding):
    texts, turns = encoding("encode_prompt"), encoding("encode_turns")
    most = server.app.state.service.prompts.most
    huge = "a" * 4_100_000
    bodies = [(COMPLETIONS, {"prompt": huge, "max_tokens": 1})] * 6
    bodies += [(COMPLETIONS, {"prompt": ["x", "a" * (most + 1)]})]
    with ThreadPoolExecutor(6) as pool:
        for answer in pool.map(lambda ask: server.post(*ask), bodies):
            answer.refused(400, f"at most {most}", param="prompt", code="context_length_exceeded")
    halves = [{"role": "user", "content": "a" * (most // 2 + 1)}] * 2
    for asked in (server, chat_server):
        asked.post(CHAT, {"messages": halves}).refused(400, param="messages", code="context_length_exceeded")
    assert (texts.calls, turns.calls) == (0, 0)


def test_the_bound_lets_through_what_fits_of_the_longest_tokens(server, tokenizer):
    room = server.engine.limits.longest - 2  # of a prompt without its BOS; one new token is left
    for token in ("\n" + " " * 36, "\N{POLICE CARS REVOLVING LIGHT}" * 32):
        assert len(tokenizer.encode(token * room, add_special_tokens=False)) == room
        assert server.post(COMPLETIONS, {"prompt": token * room, "max_tokens": 1}).status == 200


def test_the_bound_counts_the_longest_token_and_what_normalisation_joins(tokenizer):
    longest = max(map(len, tokenizer.get_vocab()))
    assert PromptEncoder(tokenizer, 10).most == 10 * longest

    class Normalising:
        backend_tokenizer = type("Backend", (), {"normalizer": object()})
        get_vocab = staticmethod(lambda: {"a": 0, "abcde": 1})

    encoder = PromptEncoder(Normalising(), 10)
    assert encoder.most == 10 * 5 * JOINED
    encoder.check(encoder.most, "prompt")
    with pytest.raises(ApiError, match="201 characters; this server reads at most 200"):
        encoder.check(encoder.most + 1, "prompt")


def test_of_long_texts_a_few_are_encoded_at_a_time_and_short_ones_go_past_them(server, encoding, monkeypatch):
    plain = text.encode_prompt
    watched = encoding("encode_prompt")
    gate = threading.Event()

    def slow(tokenizer, prompt, **settings):
        if len(prompt) > LONG:
            gate.wait(60)
        return plain(tokenizer, prompt, **settings)

    watched._function = slow
    body = {"prompt": "import os\n" * 300, "max_tokens": 1}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, COMPLETIONS, body) for _ in range(6)]
        assert watched.both.wait(60)
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200
        assert server.get("/health").status == 200
        gate.set()
        assert {answer.result().status for answer in asked} == {200}
    assert watched.most <= LONG_AT_ONCE + 1
    assert watched.calls == 7


@pytest.mark.parametrize("count", [1, 300])
def test_templates_are_never_rendered_on_the_event_loop(chat_server, encoding, count):
    """A template is a program that came with the model; messages may be many and short."""
    watched = encoding("encode_turns")
    messages = [{"role": "user", "content": ""}] * count
    chat_server.post(CHAT, {"messages": messages, "max_tokens": 1})
    loop = chat_server.post(CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
    assert loop.status == 200
    assert watched.calls == 2
    assert all("asyncio" in name or "tokenizer" in name for name in watched.threads), watched.threads


def test_a_template_that_takes_long_keeps_nobody_waiting(engine, templated, encoding):
    """While it runs, others are answered."""
    gate, started = threading.Event(), threading.Event()
    watched = encoding("encode_turns")
    plain = watched._function

    def slow(*arguments, **settings):
        started.set()
        gate.wait(60)
        return plain(*arguments, **settings)

    watched._function = slow
    with served(create_app(engine, templated, Settings("small")), engine) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
        assert started.wait(60)
        assert server.get("/health").status == 200
        gate.set()
        assert asked.result().status == 200


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (CHAT, {"messages": [{"role": "user"}] * (turns.MOST_MESSAGES + 1)}, "messages are too many"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 85_000}, "85000 messages are too many"),
        (COMPLETIONS, {"prompt": ["a"] * (requests.MOST_PROMPTS + 1)}, "prompts are too many"),
        (COMPLETIONS, {"prompt": [[1]] * 200_000}, "200000 prompts are too many"),
        (COMPLETIONS, {"prompt": "x", **{f"k{index}": 1 for index in range(200_000)}}, "200001 fields"),
        (COMPLETIONS, {"prompt": "x", **dict.fromkeys(map(str, range(fields.MOST_FIELDS)))}, "fields"),
        (CHAT, {"messages": [{"role": "user", **{f"k{i}": 1 for i in range(200_000)}}]}, "messages.0: 200001 fields"),
    ],
    ids=["messages", "85000 messages", "prompts", "token prompts", "fields", "nulls", "fields of a message"],
)
def test_bodies_of_too_many_parts_are_refused(server, path, body, said):
    server.post(path, body).refused(400, said)


def test_what_is_wrong_many_times_is_one_error():
    """pydantic's errors are made on the event loop, one by one."""
    wrong = [
        (requests.ChatBody, {"messages": [{}] * 5000}),
        (requests.CompletionBody, {"prompt": [True] * 5000}),
    ]
    for body, given in wrong:
        with pytest.raises(ValidationError) as refused:
            body.model_validate(given)
        assert refused.value.error_count() == 1, given


def test_many_unknown_fields_are_counted_and_not_kept():
    """Every one costs work on the event loop, and room in the reply."""
    given = {"prompt": "x", **{f"k{index}": 1 for index in range(fields.MOST_FIELDS - 1)}}
    notices = requests.CompletionBody.model_validate(given).notices
    assert [notice.param for notice in notices] == [f"k{index}" for index in range(fields.MOST_NOTICES)]
    messages = [{"role": "user", **{f"k{index}": 1 for index in range(100)}}] * 1000
    notices = requests.ChatBody.model_validate({"messages": messages}).notices
    assert len(notices) == fields.MOST_NOTICES
    assert all(notice.param.startswith("messages.k") for notice in notices)


def test_a_strict_server_names_the_first_unknown_field(serving):
    body = {"prompt": "x", "max_tokens": 1, "colour": None, "bit": 1, "other": 2}
    with serving(strict=True) as server:
        server.post(COMPLETIONS, body).refused(400, "unknown field 'bit'", param="bit", code="unknown_parameter")
        named = "messages.colour"
        messages = [{"role": "user"}, {"role": "user", "colour": 1}]
        server.post(CHAT, {"messages": messages}).refused(400, named, param=named, code="unknown_parameter")
        del body["bit"], body["other"]
        assert server.post(COMPLETIONS, json.dumps(body).encode()).status == 200
