"""JSON that is still being written: where an object ends, and what its fields are so far."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

_PIECE = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\],:]', re.DOTALL)


@dataclass
class ScannedObject:
    """fields: name -> raw value so far. whole: names of those that are. end: where the object ends, if it does."""

    fields: dict[str, str] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    end: int | None = None


def scan_object(text: str, start: int) -> ScannedObject | None:
    """The object that begins at `start` of `text`; None if what is there cannot become one."""
    found, depth = ScannedObject(), 0
    key: str | None = None
    begin = 0  # of the value
    last = ""  # the latest string at the object's own level
    for piece in _PIECE.finditer(text, start):
        what, at = piece.group(), piece.start()
        if depth == 0:
            if what != "{" or at != start:
                return None
            depth = 1
        elif what[0] == '"':
            last = what
        elif what in "{[":
            depth += 1
        elif what in "}]" and depth > 1:
            depth -= 1
        elif depth == 1 and what == ":" and key is None:
            try:
                key = str(json.loads(last))
            except ValueError:
                return None
            begin = piece.end()
        elif depth == 1 and what in ",}":
            if key is not None:
                found.fields[key] = text[begin:at].strip()
                found.whole.add(key)
            key = None
            if what == "}":
                found.end = piece.end()
                return found
        elif depth == 1 and what == "]":
            return None
    if key is not None:
        found.fields[key] = text[begin:].lstrip()
    return found if depth else None


class Brackets:
    """Finds where the bracket that a growing text begins with is closed. Those in strings do not count."""

    def __init__(self) -> None:
        self._at = self._depth = 0

    def end(self, text: str) -> int | None:
        """None while it is open. text: that of the last call, and what came since."""
        for piece in _PIECE.finditer(text, self._at):
            what = piece.group()
            if what[0] == '"' and piece.end() == len(text):  # the string may go on
                return None
            self._at = piece.end()
            self._depth += (what in "{[") - (what in "}]")
            if self._depth == 0:
                return self._at
        return None


def is_whole_value(raw: str) -> bool:
    """Whether `raw` is a whole JSON value: of one that is whole nothing more comes but spaces."""
    try:
        json.loads(raw)
    except ValueError:
        return False
    return True
