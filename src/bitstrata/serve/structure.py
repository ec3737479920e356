"""What a reply must be, as clients say it -> a Constraint.

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`, llama.cpp's `grammar` and
`json_schema`. One of them at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from ..errors import UsageError
from ..runtime import Constraint
from ..runtime.constraints import WHITESPACE

FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "grammar",
    "json_schema",
)
_OFF: tuple[Any, ...] = (None, False, "", [], {})


def _schema(value: Any) -> Any:
    """A JSON schema, or the text of one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the JSON schema is no JSON: {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object")
    return value


def response_format(value: Any) -> Constraint | None:
    """OpenAI's. Keywords of a schema that cannot be enforced are an error only where `strict` is true."""
    if value is None:
        return None
    given = _object(value, "response_format")
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint.json_object() if given.get("schema") is None else Constraint.json_schema(given["schema"])
        case "json_schema":
            inner = _object(given.get("json_schema", given), "json_schema")  # /v1/responses has it all in one object
            if inner.get("schema") is None:
                raise ValueError("json_schema needs a schema")
            return Constraint.json_schema(_schema(inner["schema"]), strict=inner.get("strict") is True)
        case "regex":
            return Constraint.regex(_text(given.get("regex", given.get("pattern"))))
        case "grammar":
            return Constraint.grammar(_text(given.get("grammar")))
    raise ValueError("type must be text, json_object or json_schema")


def _structured_outputs(value: Any) -> Constraint | None:
    if value is None:
        return None
    given = {key: item for key, item in _object(value, "structured_outputs").items() if item not in _OFF}
    if given.keys() - {*_KINDS, "json_object", "whitespace_pattern", "disable_any_whitespace"}:
        unknown = ", ".join(sorted(given.keys() - _KINDS.keys()))[:60]
        raise ValueError(f"this server knows {', '.join(_KINDS)} and json_object, not {unknown}")
    kinds = [key for key in (*_KINDS, "json_object") if key in given]
    if len(kinds) != 1:
        raise ValueError(f"give one of {', '.join(_KINDS)} and json_object")
    whitespace = None if given.get("disable_any_whitespace") else _text(given.get("whitespace_pattern", WHITESPACE))
    if kinds == ["json_object"]:
        return Constraint.json_schema({"type": "object"}, whitespace=whitespace)
    if kinds == ["json"]:
        return Constraint.json_schema(_schema(given["json"]), whitespace=whitespace)
    return _KINDS[kinds[0]](given[kinds[0]])


def _choice(value: Any) -> Constraint:
    if not isinstance(value, list):
        raise ValueError("must be a list of texts")
    return Constraint.choice(value)


_KINDS: dict[str, Callable[[Any], Constraint]] = {
    "json": lambda value: Constraint.json_schema(_schema(value)),
    "regex": lambda value: Constraint.regex(_text(value)),
    "choice": _choice,
    "grammar": lambda value: Constraint.grammar(_text(value)),
}


def _field(read: Callable[[Any], Constraint | None]) -> PlainValidator:
    """A field that `read` reads; null, or an empty value, is none."""

    def check(value: Any) -> Constraint | None:
        try:
            return None if value in _OFF else read(value)
        except UsageError as error:
            raise ValueError(error.sentence) from None

    return PlainValidator(check)


def _described(*kinds: str, **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*({"type": kind, **more} for kind in kinds), {"type": "null"}]})


_KNOWN = {"properties": {"type": {"enum": ["text", "json_object", "json_schema"]}}, "required": ["type"]}
ResponseFormat = Annotated[Constraint | None, _field(response_format), _described("object", **_KNOWN)]
StructuredOutputs = Annotated[Constraint | None, _field(_structured_outputs), _described("object")]
Schema = Annotated[Constraint | None, _field(_KINDS["json"]), _described("object", "string")]
Pattern = Annotated[Constraint | None, _field(_KINDS["regex"]), _described("string")]
Choice = Annotated[Constraint | None, _field(_choice), _described("array", items={"type": "string"})]
Grammar = Annotated[Constraint | None, _field(_KINDS["grammar"]), _described("string")]
