"""Replies of APIs that list what a reply is made of, in order: texts, and calls of functions."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel

from ..runtime.tools import CallDelta
from .notices import Notices
from .replies import Delta, Formatter, Usage
from .requests import GenerationBody
from .spelling import NamedEvents
from .text import TokenNames


@dataclass
class Part:
    """index: its place in the reply. call: of the reply, if it is one of a function. text: or a call's arguments."""

    index: int
    id: str
    call: int | None = None
    name: str = ""
    text: str = ""


class PartFormatter(Formatter):
    """A stream opens a part, adds to it and closes it before the next. A reply has one part at least."""

    spelling: ClassVar[NamedEvents] = NamedEvents()
    text_prefix: ClassVar[str]  # of the id of a text
    call_prefix: ClassVar[str]

    def __init__(self, body: GenerationBody, name: str, names: TokenNames, notices: Notices) -> None:
        super().__init__(body, name, names, notices)
        self._parts: list[Part] = []

    @abstractmethod
    def _opened(self, part: Part) -> list[BaseModel]:
        """The events with which `part`, still empty, begins."""

    @abstractmethod
    def _added(self, part: Part, text: str) -> list[BaseModel]:
        """Those that say `text` of it."""

    @abstractmethod
    def _closed(self, part: Part) -> list[BaseModel]:
        """Those with which it ends."""

    @abstractmethod
    def _note(self, delta: Delta) -> None:
        """Remember how the reply ended."""

    def next_chunks(self, delta: Delta, bits: int | None, usage: Usage) -> list[BaseModel]:
        return list(self._events(delta))

    def _last_closed(self) -> list[BaseModel]:
        """The events that end the last part."""
        opened = [] if self._parts else self._opened(self._begin())
        return [*opened, *self._closed(self._parts[-1])]

    def _read(self, deltas: Sequence[Delta]) -> None:
        """A whole reply."""
        for delta in deltas:
            list(self._events(delta))
        if not self._parts:
            self._begin()

    def _events(self, delta: Delta) -> Iterator[BaseModel]:
        if delta.text:
            yield from self._go_on(None, delta.text)
        for call in delta.calls:
            yield from self._go_on(call, call.arguments)
        self._note(delta)  # last: parts that end before the latest are whole

    def _go_on(self, call: CallDelta | None, text: str) -> Iterator[BaseModel]:
        number = None if call is None else call.index
        if not self._parts or self._parts[-1].call != number:
            if self._parts:
                yield from self._closed(self._parts[-1])
            yield from self._opened(self._begin(call))
        if text:
            self._parts[-1].text += text
            yield from self._added(self._parts[-1], text)

    def _begin(self, call: CallDelta | None = None) -> Part:
        prefix = self.text_prefix if call is None else self.call_prefix
        found: dict[str, Any] = {} if call is None else {"call": call.index, "name": call.name}
        self._parts.append(Part(len(self._parts), f"{prefix}_{uuid.uuid4().hex[:24]}", **found))
        return self._parts[-1]
