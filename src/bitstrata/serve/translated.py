"""A body of one API, made of one of another."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from .fields import Body

B = TypeVar("B", bound=Body)


def translated(kind: type[B], fields: dict[str, Any]) -> B:
    """A body with these fields. Raises RequestValidationError, as of one that a client sent."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
