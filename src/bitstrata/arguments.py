"""Arguments of Python callers, which no command line has parsed: a wrong type is a UsageError that names it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from .errors import UsageError
from .planes.weights import MAX_BITS, whole_number

UNITS = {"h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}
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


def duration(name: str, value: object) -> float:
    """Seconds of a text such as "30min", "2h", "90s" or "1h30min"."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|min|m|s)", value) if isinstance(value, str) else []
    seconds = sum(float(count) * UNITS[unit] for count, unit in parts)
    if "".join(map("".join, parts)) != value or not 0 < seconds < 1e9:
        raise UsageError(f"{name} {shown(value)} is not a time", hint="such as 30min, 2h, 90s or 1h30min")
    return seconds


def path(name: str, value: object, *, hint: str) -> str:
    """The name of a file or folder, as a str."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise UsageError(f"{name} must be a path, got {shown(value)}", hint=hint)
    return os.fspath(value)


def parse_bits(text: str | int | Iterable[int | str]) -> tuple[int, ...]:
    """Bits from what a user types: `3`, `2,4`, `2-4` or a mix; ascending, distinct, within 1..8.

    Raises UsageError for anything else.
    """
    values: list[int] = []
    whole = whole_number(text)
    try:
        parts = [whole] if whole is not None else text.split(",") if isinstance(text, str) else text
        for given in parts:  # type: ignore[union-attr]  # TypeError for what is no number, text or several
            whole = whole_number(given)
            part = str(given if whole is None else whole)
            low, dash, high = part.strip().partition("-")
            first, last = int(low), int(high if dash else low)
            if not 1 <= first <= last <= MAX_BITS:
                raise ValueError(part)
            values.extend(range(first, last + 1))
    except (TypeError, ValueError):
        values = []
    if not values:
        raise UsageError(
            f"bits {text!r} cannot be used", hint=f"give whole numbers from 1 to {MAX_BITS}: 3, 2,4 or 2-4"
        )
    return tuple(sorted(set(values)))
