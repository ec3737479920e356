"""What clients send: bodies of /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, WithJsonSchema, model_validator

from .fields import Body, Ignored, Only, Text, encodable

MOST_MESSAGES = 4096
MOST_PROMPTS = 1024
MOST_STOPS = 16
MOST_LOGPROBS = 20


def _stop(value: Any) -> list[str]:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"must be a text or a list of at most {MOST_STOPS} texts")
    if "" in texts:
        raise ValueError("an empty stop text would end every reply at once")
    return [encodable(text) for text in texts]


def _prompt(value: Any) -> list[str] | list[list[int]]:
    """A text or tokens, or a list of either -> a list."""
    if isinstance(value, str):
        return [encodable(value)]
    if isinstance(value, list) and value:
        if len(value) > MOST_PROMPTS and not isinstance(value[0], int):
            raise ValueError(f"{len(value)} prompts are too many for one request; it may have {MOST_PROMPTS}")
        if all(isinstance(item, str) for item in value):
            return [encodable(item) for item in value]
        if _tokens(value):
            return [value]
        if all(_tokens(item) for item in value):
            return value
    raise ValueError("must be a text, a list of texts, a list of tokens (ints) or a list of such lists, and not empty")


def _bits(value: Any) -> int | str | None:
    if value is None or type(value) is int or (isinstance(value, str) and value and not value.isdigit()):
        return value
    raise ValueError("must be a whole number, or the name of a plan")


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _content(value: Any) -> str:
    """The text of a message: given as such, or in parts of the type text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return encodable(value)
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'parts must be {{"type": "text", "text": ...}}; this model reads text only, not {kind!r}')
        texts.append(encodable(part["text"]))
    return "".join(texts)


_TEXTS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}
Stop = Annotated[
    list[str],
    PlainValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MOST_STOPS},
                {"type": "null"},
            ]
        }
    ),
]
Bits = Annotated[
    int | str | None,
    PlainValidator(_bits),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "[^0-9]"}, {"type": "null"}]}),
]
Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {**_TEXTS, "minItems": 1},
                {**_IDS, "minItems": 1},
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}),
]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationBody(Body):
    """What both kinds of requests have in common."""

    model: Text | None = Field(None, description="NAME, or NAME:BITS for a precision; the only model if left out")
    bits: Bits = Field(None, description="planes to use, or a plan's name; only where `model` does not say")
    min_bits: int | None = Field(None, description="the least that a policy may lower this request to; `bits` if null")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, description="0 is greedy; 1 if left out")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, max_length=MOST_STOPS, description="tokens that end the reply"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="go on after an end-of-sequence token")
    return_token_ids: bool | None = Field(None, description="add `token_ids` to every choice")

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    presence_penalty: Annotated[Any, Only(0)] = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    repetition_penalty: Annotated[Any, Only(1)] = None
    logit_bias: Annotated[Any, Only({})] = None
    top_k: Annotated[Any, Only(0, -1)] = None
    min_p: Annotated[Any, Only(0)] = None
    best_of: Annotated[Any, Only(1)] = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = ""
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    reasoning_content: Ignored = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only([])] = None


def _messages(value: Any) -> Any:
    """Before any of them is looked at."""
    if isinstance(value, list) and len(value) > MOST_MESSAGES:
        raise ValueError(f"{len(value)} messages are too many for one request; it may have {MOST_MESSAGES}")
    return value


class ChatBody(GenerationBody):
    """/v1/chat/completions"""

    messages: Annotated[
        list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES), BeforeValidator(_messages)
    ]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    parallel_tool_calls: Ignored = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None
    chat_template_kwargs: Annotated[Any, Only({})] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class CompletionBody(GenerationBody):
    """/v1/completions"""

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="this many likeliest tokens at each place")
    echo: Annotated[Any, Only(False)] = None
    suffix: Annotated[Any, Only("")] = None
    add_special_tokens: bool | None = Field(
        None, description="false: a text's prompt is not begun as the tokenizer begins a text (BOS); true if left out"
    )
