"""What a request may ask of vLLM with the plugin, and at what bits it starts: the parts that need no vLLM."""

from __future__ import annotations

import asyncio
import json

import pytest

from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.integrations.vllm import offered as module
from bitstrata.integrations.vllm.admission import Admission
from bitstrata.integrations.vllm.names import ModelNames, with_arguments
from bitstrata.integrations.vllm.offered import Asked, Offered, serve
from bitstrata.integrations.vllm.words import with_hints
from bitstrata.runtime import LoadPolicy, Policy

OFFERED = Offered((2, 3, 4), 3, {"small": {"up": 2}, "large": {"up": 4}})


@pytest.fixture
def server():
    before = list(module._served)
    serve(OFFERED)
    yield
    module._served[:] = before


def test_a_request_gets_what_it_asks_for_or_the_default():
    asked = [
        None,
        {},
        {"other": 1},
        {"bits": 2},
        {"bits": "small"},
        {"plan": "large"},
        {"bits": "small", "plan": "small"},
    ]
    assert [OFFERED.of_request(extra).choice for extra in asked] == [3, 3, 3, 2, "small", "large", "small"]
    assert OFFERED.choices == (2, 3, 4, "small", "large")
    assert [OFFERED.place(choice) for choice in (2, 4, "large")] == [0, 2, 4]


@pytest.mark.parametrize("bits", [0, 5, -2, "3", 3.0, True, [2], [2, 3], {}, "none", ""], ids=repr)
def test_other_bits_are_refused_with_all_that_there_is(bits):
    with pytest.raises(UsageError) as refused, with_hints():
        OFFERED.of_request({"bits": bits})
    assert "supported bits: 2, 3, 4; plans: small, large" in str(refused.value)


@pytest.mark.parametrize("plan", [2, "4", "none", ["small", "large"], True], ids=repr)
def test_other_plans_are_refused_with_all_that_there_is(plan):
    with pytest.raises(UsageError) as refused, with_hints():
        OFFERED.of_request({"plan": plan})
    assert "plans: small, large" in str(refused.value)


def test_bits_and_a_plan_that_differ_are_refused():
    with pytest.raises(UsageError, match="bits says 2 and plan says small"):
        OFFERED.of_request({"bits": 2, "plan": "small"})


def test_a_default_must_be_offered():
    with pytest.raises(UnsupportedBitsError, match="bits=5"):
        Offered((2, 3), 5)
    with pytest.raises(UsageError, match="there is no plan 'small'"):
        Offered((2, 3), "small")
    with pytest.raises(UsageError, match="min_bits=4"):
        Offered((2, 3), 3, min_bits=4)


def test_how_far_a_request_may_be_lowered():
    assert OFFERED.of_request({"bits": 4, "min_bits": 2}) == Asked(4, 2)
    assert OFFERED.of_request({"min_bits": 3}) == Asked(3, 3)
    low = Offered((2, 3, 4), 4, {"small": {}}, min_bits=3)
    assert [low.of_request({"bits": bits}) for bits in (4, 2, "small")] == [Asked(4, 3), Asked(2, 2), Asked("small")]
    for wrong in ({"min_bits": 4}, {"min_bits": 1}, {"min_bits": "2"}, {"min_bits": True}):
        with pytest.raises(UsageError, match="min_bits="):
            OFFERED.of_request(wrong)
    with pytest.raises(UsageError, match="cannot go with a plan"):
        OFFERED.of_request({"plan": "small", "min_bits": 2})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_start_lower_while_others_queue_and_high_again_when_there_is_room():
    clock = Clock()
    admission = Admission(OFFERED, LoadPolicy(target_ms=50, queue=4, dwell_ms=1000), clock)
    asked, fixed = Asked(4, 2), Asked(4)
    assert (admission.steps(asked), admission.steps(fixed), admission.steps(Asked("small"))) == (2, 0, 0)
    started = []
    for waiting in (0, 4, 4, 9, 9, 0):
        clock.now += 1
        admission.observe(waiting, 2)
        started.append(admission.choice(asked))
    assert started == [4, 3, 2, 2, 2, 4]  # nothing is known of the time per token, so room is enough
    assert (admission.choice(fixed), admission.choice(Asked("small"))) == (4, "small")


def test_time_between_tokens_counts_while_requests_run():
    clock = Clock()
    admission = Admission(OFFERED, LoadPolicy(target_ms=50, dwell_ms=0), clock)

    def step(seconds: float, makes_tokens: bool = True, running: int = 1) -> int:
        if not running:
            admission.idle()
        admission.observe(0, 2)
        clock.now += seconds
        admission.step_ended(makes_tokens)
        return admission.level

    assert step(9, running=0) == 0  # the first step of a request that nobody saw running: no token came late
    assert step(0.2, makes_tokens=False) == 0  # a prompt alone
    assert step(0.2) == 0
    assert step(0.2) == 1
    assert step(0.2) == 2
    for _ in range(200):
        step(0.01)
    assert admission.level == 0
    step(2.0)
    step(2.0)
    assert admission.level > 0
    assert step(9, running=0) == 0  # without work in between, it starts at the top again


def test_without_a_policy_nothing_is_lowered():
    admission = Admission(OFFERED, Policy())
    admission.observe(99, 2)
    assert (admission.level, admission.choice(Asked(4, 2))) == (0, 4)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"model": "m:3"}, {"bits": 3}),
        ({"model": "some/m:small"}, {"bits": "small"}),
        ({"bits": 2, "min_bits": 2}, {"bits": 2, "min_bits": 2}),
        ({"model": "m:3", "vllm_xargs": {"session_id": "a", "bits": 3}}, {"session_id": "a", "bits": 3}),
        ({"model": "m:3", "bits": 2, "vllm_xargs": {"bits": 4}}, {"bits": [2, 4, 3]}),
        ({"min_bits": 2, "vllm_xargs": {"min_bits": 3}}, {"min_bits": [2, 3]}),
    ],
    ids=str,
)
def test_names_and_fields_become_arguments(server, fields, arguments):
    made = json.loads(with_arguments(json.dumps({"stream": True, **fields}).encode()))
    kept = {key: value for key, value in fields.items() if key == "model"}
    assert made == {"stream": True, **kept, "vllm_xargs": arguments}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":  "m", "prompt": 1.50}',
        b'{"model": "qwen:large-v2", "n": 1}',
        b'{"model": "m:3", "vllm_xargs": 3}',
        b'{"model": "m:1234"}',
        b'{"model": 3}',
        b'[{"model": "m:3"}]',
        b"no json",
        b"",
        b"[" * 100_000,
    ],
    ids=lambda body: body[:24].decode(),
)
def test_other_bodies_stay_as_they_are(server, body):
    assert with_arguments(body) == body


async def received(path: str, messages: list[dict], method: str = "POST", root: str = ""):
    """What an application behind the middleware sees of a request: its headers, and all that it receives."""
    seen = []
    left = iter(messages)

    async def receive():
        return next(left)

    async def application(scope, receive, send):
        seen.append([name for name, _ in scope["headers"]])
        seen.extend([await receive() for _ in range(2)])

    headers = [(b"host", b"a"), (b"Content-Length", b"9")]
    scope = {"type": "http", "method": method, "path": root + path, "root_path": root, "headers": headers}
    await ModelNames(application)(scope, receive, None)
    return seen


def test_a_body_is_read_when_it_is_asked_for_and_what_follows_is_passed_on(server):
    text = json.dumps({"model": "m:2", "prompt": "é"}).encode()
    parts = [
        {"type": "http.request", "body": text[:9], "more_body": True},
        {"type": "http.request", "body": text[9:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    headers, first, second = asyncio.run(received("/v1/completions", parts, root="/api"))
    assert headers == [b"host"]
    assert json.loads(first["body"]) == {"model": "m:2", "prompt": "é", "vllm_xargs": {"bits": 2}}
    assert not first["more_body"]
    assert second == parts[2]
    for path, method in (("/v1/completions", "GET"), ("/tokenize", "POST")):
        assert asyncio.run(received(path, parts, method))[1:] == parts[:2]


def test_a_client_that_goes_away_is_noticed(server):
    gone = {"type": "http.disconnect"}
    parts = [{"type": "http.request", "body": b"{", "more_body": True}, gone, gone]
    assert asyncio.run(received("/v1/responses", parts))[1:] == [gone, gone]


def test_names_are_of_no_use_to_other_models(server):
    module._served.clear()
    with pytest.raises(UsageError, match="no bitstrata checkpoint"):
        ModelNames(lambda *_: None)
