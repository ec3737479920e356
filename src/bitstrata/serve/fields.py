"""Kinds of fields that the bodies of requests are made of.

Nothing is ignored silently: a field that would change the answer and that this server does not have is
refused unless it has the value that changes nothing (`Only`); one that changes nothing here is accepted
(`Ignored`); an unknown one is refused unless it is null.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

UNKNOWN = "unknown_field"  # the type of the error; its context has the `field`
MOST_FIELDS = 200  # of one object, nulls included


def encodable(text: str) -> str:
    """JSON can spell half a surrogate pair; it is no text, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("this is not Unicode text: it holds half a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(encodable)]
Ignored = Annotated[Any, Field(description="accepted; changes nothing here")]


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

    What is wrong in a way that may be wrong a thousand times in one body is refused where it is met first: pydantic
    would make an error for each, on the event loop.
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
