"""Requests made up from the server's own OpenAPI schema: none is a server error, all answers are as described."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = 200
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
READ = ["/v1/models", "/v1/models/{model}", "/health", "/metrics"]
TOKENS = ["/tokenize", "/detokenize", "/v1/messages/count_tokens"]
WORK = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


@pytest.fixture(scope="module")
def described(chat_server):
    return schemathesis.openapi.from_url(f"{chat_server.url}/openapi.json")


def statuses(operation, mode, change=lambda body: None) -> set[int]:
    """What the server answered to EXAMPLES requests made up for `operation`; each is checked."""
    seen = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
    def check(case):
        if isinstance(case.body, dict):
            change(case.body)
        seen.add(case.call_and_validate(checks=CHECKS).status_code)

    check()
    return seen


@pytest.mark.fuzz
@pytest.mark.parametrize("path", READ)
def test_reading_is_never_a_server_error(described, path):
    assert 200 in statuses(described[path]["GET"], GenerationMode.POSITIVE) or path == "/v1/models/{model}"


@pytest.mark.fuzz
@pytest.mark.parametrize("path", WORK + TOKENS)
def test_right_requests_are_answered_or_refused_as_described(described, path):
    def change(body):
        body["max_tokens"] = body["max_output_tokens"] = 2  # how long replies are is not what this is about
        body.pop("max_completion_tokens", None)
        body.pop("n", None)
        for name in ("model", "bits", "min_bits"):  # the schema does not know which there are
            body.pop(name, None)

    assert {200, 400} >= statuses(described[path]["POST"], GenerationMode.POSITIVE, change) >= {200}


@pytest.mark.fuzz
@pytest.mark.parametrize("path", WORK + TOKENS)
def test_wrong_requests_are_refused_as_described(described, path):
    def change(body):
        body.setdefault("max_tokens", 2)

    seen = statuses(described[path]["POST"], GenerationMode.NEGATIVE, change)
    assert 400 in seen
    assert max(seen) < 500


def test_the_schema_describes_what_there_is(server):
    schema = server.get("/openapi.json").json
    assert set(schema["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/metrics",
    }
    for path in WORK:
        responses = schema["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "415", "429", "503"} <= responses.keys()
        assert "422" not in responses
    for kind in ("ChatBody", "CompletionBody"):
        assert {"bits", "min_bits"} <= schema["components"]["schemas"][kind]["properties"].keys()
