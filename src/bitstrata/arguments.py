"""Arguments of Python callers, which no command line has parsed: a wrong type is a UsageError that names it."""

from __future__ import annotations

import os

from .errors import UsageError
from .planes import whole_number

SHOWN = 60  # characters of a value in a message


def shown(value: object, most: int = SHOWN) -> str:
    """`value` as a message shows it: not a whole text, list or model."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}... ({type(value).__name__})"


def number(name: str, value: object, least: int, *, hint: str | None = None) -> int:
    """A whole number of Python, NumPy or torch from `least` to 2^63 - 1, as an int."""
    found = whole_number(value)
    if found is None:
        raise UsageError(f"{name} must be a whole number, got {shown(value)}", hint=hint)
    if not least <= found < 2**63:
        bound = f"at least {least}" if found < least else "below 2^63"
        raise UsageError(f"{name} must be {bound}, got {shown(value)}", hint=hint)
    return found


def path(name: str, value: object, *, hint: str) -> str:
    """The name of a file or folder, as a str."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise UsageError(f"{name} must be a path, got {shown(value)}", hint=hint)
    return os.fspath(value)
