"""The values of fields, as clients send them, and what a body notices about itself while it is read.

Clients are not strict: they send whole numbers as `5.0` or "5", `-1` for no limit, an empty text for no stop text, and
whole objects of other APIs. So values are read generously, but never silently: what was not understood, or understood
as something else than it says, becomes a `Notice`, which goes into the reply. A field that asks for something that
this server does not do is refused unless it has a value that changes nothing (`Only`).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

UNKNOWN = "unknown_parameter"  # the code of a notice or refusal of an unknown field
MOST_FIELDS = 200  # of one object, nulls included
MOST_NOTICES = 20  # that one body keeps
NAME_LENGTH = 60  # characters of a name or value in a notice
AS_TEXT, AS_TURNS = "as text", "as turns"  # kinds of one body, which pydantic puts before a field's name
REFUSED = "refused"  # the type of an error that names its field; see `refused`
_NUMBER = re.compile(r"\s*[+-]?(\d{1,18}(\.\d{0,18})?|\.\d{1,18})([eE][+-]?\d{1,3})?\s*")


@dataclass(frozen=True)
class Notice:
    """Something in a request that was not done as it says.

    param: the field's name. message: what was done instead. refusal: what a strict server says.
    """

    param: str
    message: str
    refusal: str
    code: str | None = None

    @classmethod
    def unknown(cls, name: str) -> Notice:
        shown = name[:NAME_LENGTH]
        return cls(shown, f"the unknown field {shown!r} was ignored", f"unknown field {shown!r}", UNKNOWN)

    def within(self, name: str) -> Notice:
        """The same of an object in the field `name`."""
        if self.code == UNKNOWN:
            return self.unknown(f"{name}.{self.param}")
        return replace(
            self, param=f"{name}.{self.param}", message=f"{name}.{self.message}", refusal=f"{name}.{self.refusal}"
        )


def encodable(text: str) -> str:
    """JSON can spell half a surrogate pair; it is no text, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("this is not Unicode text: it holds half a surrogate pair") from None
    return text


def refused(param: str, message: str) -> PydanticCustomError:
    """An error about the field `param`, to be raised by a validator that looks at several."""
    return PydanticCustomError(REFUSED, "{said}", {"param": param, "said": message})


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


def _as_number(value: Any) -> Any:
    """A number that came as a text."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _as_whole(value: Any) -> Any:
    """A whole number that came as a float or a text; others stay what they are, and are refused as such."""
    number = _as_number(value)
    return int(number) if isinstance(number, float) and math.isfinite(number) and number.is_integer() else value


def _as_flag(value: Any) -> Any:
    """A truth value that came as a text, or as 0 or 1."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    return bool(value) if type(value) is int and value in (0, 1) else value


def unlimited(value: Any) -> Any:
    """-1, with which some clients say that there is no limit, as null."""
    return None if _as_whole(value) == -1 and not isinstance(value, bool) else value


Whole = Annotated[int, BeforeValidator(_as_whole)]
Number = Annotated[float, BeforeValidator(_as_number)]
Flag = Annotated[bool, BeforeValidator(_as_flag)]
Text = Annotated[str, AfterValidator(encodable)]
Ignored = Annotated[Any, Field(description="accepted; changes nothing here")]


class Body(BaseModel):
    """A JSON object from a client, and the notices of what in it was ignored or read as something else.

    What may be wrong a thousand times in one body is refused where it is met first, or counted and not kept: pydantic
    would make an error for each, on the event loop.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    _notices: tuple[Notice, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, data: Any, handler: ModelWrapValidatorHandler[Body]) -> Body:
        """Clients dump whole objects, with null for whatever they know and do not use: an unknown null is nothing."""
        if not isinstance(data, dict):
            return handler(data)
        if len(data) > MOST_FIELDS:
            raise ValueError(f"{len(data)} fields are more than anything here has; at most {MOST_FIELDS} are read")
        found: list[Notice] = []
        for key, value in data.items():
            if value is not None and key not in cls.model_fields and len(found) < MOST_NOTICES:
                found.append(Notice.unknown(encodable(key)))
        body = handler(data)
        for key, value in data.items():
            if isinstance(value, str) and isinstance(read := getattr(body, key, None), int | float):
                said = f"{key}: the text {value[:NAME_LENGTH]!r}"
                found.append(Notice(key, f"{said} was read as {read}", f"{said} is no number and no truth value"))
        body._notices = tuple(found)
        return body

    @property
    def notices(self) -> tuple[Notice, ...]:
        """Its own, and those of the objects in it under the names of their fields; each once."""
        found = dict.fromkeys(self._notices)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for inner in value if isinstance(value, list) else [value]:
                if not isinstance(inner, Body):
                    break  # lists hold objects of one kind
                for notice in inner._notices:
                    found[notice.within(name)] = None
            if len(found) >= MOST_NOTICES:
                break
        return tuple(found)[:MOST_NOTICES]
