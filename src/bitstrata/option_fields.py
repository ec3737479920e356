"""What is known of a field of options (options.py) beside its type, and how texts become its value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from .errors import UsageError


@dataclass(frozen=True)
class Argument:
    """What is known of a field beside its type and default.

    Args:
        help: a sentence for people.
        flag: on the command line, where it is not --the-field's-name; "" for a word without a flag.
        short: a second flag.
        least, most: bounds of a number, which the command line checks.
        each: of a flag that may be repeated: makes the field's value from the texts. Raises UsageError.
        environment: a variable that gives it too.
        is_command: whether the command line has it.
    """

    help: str
    flag: str | None = None
    short: str | None = None
    least: int | None = None
    most: int | None = None
    each: Callable[[str, Sequence[str]], Any] | None = None
    environment: str | None = None
    is_command: bool = True


def arguments_of(options: type) -> dict[str, tuple[Any, Argument]]:
    """Name of every field -> its type and its Argument."""
    hints = get_type_hints(options, include_extras=True)
    return {one.name: (hints[one.name].__origin__, hints[one.name].__metadata__[0]) for one in fields(options)}


def texts(flag: str, given: Sequence[str]) -> tuple[str, ...]:
    return tuple(given)


def named_values(flag: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, by name."""
    for item in given:
        if "=" not in item:
            raise UsageError(f"{flag} {item!r} must look like NAME=VALUE", hint=f"for example {flag} steps=500")
    return dict(item.split("=", 1) for item in given)


def bounds(flag: str, given: Sequence[str]) -> dict[str, int]:
    """`PATTERN=BITS` or `BITS` for all layers, as a mapping."""
    found: dict[str, int] = {}
    for text in given:
        pattern, _, bits = text.rpartition("=")
        if not bits.isdigit():
            raise UsageError(f"{flag} {text!r} cannot be used", hint=f"{flag} 3, or {flag} '*.down_proj=3'")
        found.pop(pattern or "*", None)  # a key that is there keeps its place, but the last that matches holds
        found[pattern or "*"] = int(bits)
    return found
