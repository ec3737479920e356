"""What clients send: the bodies of /v1/chat/completions and /v1/completions.

A field that would change the answer and that this server does not have is refused by name unless it has the value that
changes nothing (`Only`); one that changes nothing here is accepted (`Ignored`). Unknown fields, and values of another
type than the field's that can only mean one thing, are taken with a notice (fields.py).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from ..runtime import Constraint
from .fields import Body, Flag, Ignored, Number, Only, Text, Whole, encodable, refused, unlimited
from .structure import FIELDS, Choice, Grammar, Pattern, ResponseFormat, Schema, StructuredOutputs
from .turns import ConversationBody

MOST_PROMPTS = 1024
MOST_STOPS = 16
MOST_LOGPROBS = 20
MOST_BIASES = 1024
MOST_BIAS = 100.0


def _stop(value: Any) -> list[str]:
    """Stop texts; an empty one, as forms send it that were left empty, is none."""
    if value is None or value == "":
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"must be a text or a list of at most {MOST_STOPS} texts")
    return [encodable(text) for text in texts if text]


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
    if value is None or type(value) is int:
        return value
    if isinstance(value, str) and value:
        if not value.isdigit():
            return value
        if value.isascii() and len(value) <= 3:
            return int(value)
    raise ValueError("must be a whole number, or the name of a plan")


def _biases(value: Any) -> dict[int, float]:
    """Token -> what is added to its logit; JSON's keys are texts."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise ValueError(f"must be an object of at most {MOST_BIASES} tokens")
    found = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 18):
            raise ValueError(f"{key[:20]!r} is not a token; tokens are whole numbers")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MOST_BIAS <= bias <= MOST_BIAS:
            raise ValueError(f"the bias of token {key} must be a number from {-MOST_BIAS:g} to {MOST_BIAS:g}")
        if bias:
            found[int(key)] = float(bias)
    return found


_Filled = Field(min_length=1)
_Stop = Annotated[str, Field()]
_Stops = Annotated[list[_Stop], Field(max_length=MOST_STOPS)]
_PlanName = Annotated[str, Field(pattern="[^0-9]")]
_Prompts = str | Annotated[list[str], _Filled] | Annotated[list[int], _Filled] | Annotated[list[list[int]], _Filled]
_BIASES = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,18}$"},
            "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
        },
        {"type": "null"},
    ]
}
Stop = Annotated[list[str], PlainValidator(_stop, json_schema_input_type=_Stop | _Stops | None)]
Bits = Annotated[int | str | None, PlainValidator(_bits, json_schema_input_type=int | _PlanName | None)]
Prompt = Annotated[list[str] | list[list[int]], PlainValidator(_prompt, json_schema_input_type=_Prompts)]
Biases = Annotated[dict[int, float], PlainValidator(_biases), WithJsonSchema(_BIASES)]
NewTokens = Annotated[Annotated[Whole, Field(ge=0)] | None, BeforeValidator(unlimited)]


class StreamOptions(Body):
    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Ignored = None


class SamplingFields(Body):
    """How a reply's tokens are picked. What is left out is the model's own, or changes nothing."""

    temperature: Number | None = Field(None, ge=0, description="0 is greedy; the model's own, or 1, if left out")
    top_p: Number | None = Field(None, ge=0, le=1, description="0 is the likeliest token")
    top_k: Annotated[Whole, Field(ge=-1)] | None = Field(None, description="0 and -1 are all tokens")
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, gt=0, le=100)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: Biases = Field(default_factory=dict)
    min_tokens: Whole | None = Field(None, ge=0, description="new tokens before one may end the reply")


class GenerationBody(SamplingFields):
    """What both kinds of requests have in common."""

    model: Text | None = Field(None, description="NAME, or NAME:BITS for a precision; the only model if left out")
    bits: Bits = Field(None, description="planes to use, or a plan's name; only where `model` does not say")
    min_bits: Whole | None = Field(None, description="the least that a policy may lower this to; `bits` if null")
    max_tokens: NewTokens = Field(None, description="-1 and null are no limit but the context's")
    seed: Annotated[Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None, BeforeValidator(unlimited)] = None
    n: Whole | None = Field(None, ge=1)
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[Annotated[Whole, Field(ge=0)]] | None = Field(
        None, max_length=MOST_STOPS, description="tokens that end the reply"
    )
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: Flag | None = Field(None, description="go on after an end-of-sequence token")
    return_token_ids: Flag | None = Field(None, description="add `token_ids` to every choice")

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    request_id: Ignored = None
    priority: Ignored = None
    cache_prompt: Ignored = None
    id_slot: Ignored = None
    prediction: Ignored = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    skip_special_tokens: Annotated[Any, Only(True)] = None
    spaces_between_special_tokens: Ignored = None

    best_of: Annotated[Any, Only(1)] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    typical_p: Annotated[Any, Only(1, 0)] = None
    tfs_z: Annotated[Any, Only(1, 0)] = None
    top_a: Annotated[Any, Only(0)] = None
    mirostat: Annotated[Any, Only(0)] = None
    dry_multiplier: Annotated[Any, Only(0)] = None
    xtc_probability: Annotated[Any, Only(0)] = None
    no_repeat_ngram_size: Annotated[Any, Only(0)] = None
    bad_words: Annotated[Any, Only([])] = None

    response_format: ResponseFormat = Field(None, description="what the reply must be; one of these fields at a time")
    structured_outputs: StructuredOutputs = Field(None, description="vLLM's: json, regex, choice, grammar, json_object")
    guided_json: Schema = None
    guided_regex: Pattern = None
    guided_choice: Choice = None
    guided_grammar: Grammar = None
    guided_whitespace_pattern: Annotated[Any, Only()] = None
    guided_decoding_backend: Ignored = None
    grammar: Grammar = Field(None, description="llama.cpp's: in Lark or GBNF")
    json_schema: Schema = Field(None, description="llama.cpp's")

    @model_validator(mode="after")
    def _one_constraint(self) -> GenerationBody:
        if len(given := [name for name in FIELDS if getattr(self, name) is not None]) > 1:
            raise refused(given[1], f"cannot go with {given[0]}: a reply is held to one of them")
        return self

    @property
    def constraint(self) -> tuple[str, Constraint] | None:
        """What a reply must be, and the field that says so."""
        return next(((name, value) for name in FIELDS if (value := getattr(self, name)) is not None), None)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def repeats_usage(self) -> bool:
        """Whether every chunk of a stream is to have the usage so far."""
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatBody(GenerationBody, ConversationBody):
    """/v1/chat/completions"""

    max_completion_tokens: NewTokens = None
    logprobs: Flag | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=MOST_LOGPROBS)

    parallel_tool_calls: Flag | None = Field(None, description="false: one call a reply")
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise refused(name, "must be at least 1")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(GenerationBody):
    """/v1/completions"""

    prompt: Prompt
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(
        None, description="this many likeliest tokens at each place"
    )
    echo: Flag | None = Field(None, description="begin the reply with the prompt, and its log-probabilities")
    suffix: Text | None = Field(None, description="what comes after the reply, for models that fill in the middle")
    add_special_tokens: Flag | None = Field(
        None, description="false: a text's prompt is not begun as the tokenizer begins a text (BOS); true if left out"
    )

    @model_validator(mode="after")
    def _some_tokens(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1; 0 goes with echo: true only")
        if self.suffix and self.echo:
            raise refused("suffix", "cannot go with echo: the prompt is not where the reply begins")
        return self
