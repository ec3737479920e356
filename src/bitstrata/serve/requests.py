"""What clients send: the bodies of /v1/chat/completions and /v1/completions.

Nothing is ignored silently: a field that would change the answer and that this server does not have is refused unless
it has the value that changes nothing (`Only`); one that changes nothing here is accepted (`Ignored`); an unknown one is
refused unless it is null.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

UNKNOWN = "unknown_field"  # the type of the error; its context has the `field`
MOST_FIELDS = 200  # of one object, nulls included
MOST_MESSAGES = 4096
MOST_PROMPTS = 1024
MOST_STOPS = 16
MOST_LOGPROBS = 20


def encodable(text: str) -> str:
    """JSON can spell half a surrogate pair; it is no text, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("this is not Unicode text: it holds half a surrogate pair") from None
    return text


class Only:
    """A field that this server takes at these values or null only: they ask for nothing that it does not do."""

    def __init__(self, *values: Any) -> None:
        self.values = (None, *values)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self.values)}

    def _check(self, value: Any) -> Any:
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.values):
            known = ", ".join(json.dumps(item) for item in self.values)
            raise ValueError(f"this server does not do that; it takes {known} only")
        return value


class Body(BaseModel):
    """A JSON object from a client. Numbers are numbers and texts texts; nothing is converted.

    What may be wrong a thousand times in one body is refused where it is met first: pydantic would make an error for
    each, on the event loop.
    """

    model_config = ConfigDict(
        strict=True, allow_inf_nan=False, json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        """Clients dump whole objects, with null for whatever they know and do not use: an unknown null is ignored."""
        if not isinstance(data, dict):
            return data
        if len(data) > MOST_FIELDS:
            raise ValueError(f"{len(data)} fields are more than anything here has; at most {MOST_FIELDS} are read")
        for key, value in data.items():
            if value is not None and key not in cls.model_fields:
                raise PydanticCustomError(UNKNOWN, "unknown field", {"field": encodable(key)})
        return data


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
        if _is_tokens(value):
            return [value]
        if all(map(_is_tokens, value)):
            return value
    raise ValueError("must be a text, a list of texts, a list of tokens (ints) or a list of such lists, and not empty")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _bits(value: Any) -> int | str | None:
    if value is None or type(value) is int or (isinstance(value, str) and value and not value.isdigit()):
        return value
    raise ValueError("must be a whole number, or the name of a plan")


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


def _few_messages(value: Any) -> Any:
    """Before any of them is looked at."""
    if isinstance(value, list) and len(value) > MOST_MESSAGES:
        raise ValueError(f"{len(value)} messages are too many for one request; it may have {MOST_MESSAGES}")
    return value


_Filled = Field(min_length=1)
_Stop = Annotated[str, _Filled]
_Stops = Annotated[list[_Stop], Field(max_length=MOST_STOPS)]
_PlanName = Annotated[str, Field(pattern="[^0-9]")]
_Prompts = str | Annotated[list[str], _Filled] | Annotated[list[int], _Filled] | Annotated[list[list[int]], _Filled]
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_Part = Annotated[dict[str, str], WithJsonSchema(_PART)]
Text = Annotated[str, AfterValidator(encodable)]
Ignored = Annotated[Any, Field(description="accepted; changes nothing here")]
Stop = Annotated[list[str], PlainValidator(_stop, json_schema_input_type=_Stop | _Stops | None)]
Bits = Annotated[int | str | None, PlainValidator(_bits, json_schema_input_type=int | _PlanName | None)]
Prompt = Annotated[list[str] | list[list[int]], PlainValidator(_prompt, json_schema_input_type=_Prompts)]
Content = Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[_Part] | None)]


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


class ChatBody(GenerationBody):
    """/v1/chat/completions"""

    messages: Annotated[
        list[Message], FailFast(), Field(min_length=1, max_length=MOST_MESSAGES), BeforeValidator(_few_messages)
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
