"""Messages, notes and progress through `logging.getLogger("bitstrata")`: a library call shows nothing unless asked.

    logging.basicConfig(level=logging.INFO)

shows notes (WARNING), messages and a line a step of long work (INFO). The record of a step has an attribute `progress`,
from which a bar can be drawn; between those lines come more of them at DEBUG. The command line shows all of this
on stderr (cli/terminal.py).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

log = logging.getLogger("bitstrata")
log.addHandler(logging.NullHandler())

MAX_LINES = 100  # lines a piece of work logs at INFO; its other steps are logged at DEBUG
TOLD_SECONDS = 120.0  # from which what is left is also said in words, once the first step is done
_keys = itertools.count()
_notes: ContextVar[tuple[str, ...] | None] = ContextVar("notes", default=None)


def note(message: str) -> None:
    """Log what a user did not ask for but must know; it also goes into the report of the verb that is running."""
    collected = _notes.get()
    if collected is not None:
        _notes.set((*collected, message))
    log.warning(message)


def notes() -> tuple[str, ...]:
    """The notes of the verb that is running in this thread, whether or not logging shows them."""
    return _notes.get() or ()


@contextlib.contextmanager
def own_notes() -> Iterator[None]:
    """Around a verb whose report has its notes, those of no other: also a decorator."""
    before = _notes.set(())
    try:
        yield
    finally:
        _notes.reset(before)


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is: `done` of `total` steps, which are `unit`s. `key` tells pieces of work apart."""

    key: int
    what: str
    unit: str
    total: int
    done: int = 0
    detail: str = ""
    seconds_left: float | None = None
    ended: bool = False

    def __str__(self) -> str:
        left = self.seconds_left
        eta = "" if left is None else f"eta {int(left // 60)}:{int(left % 60):02d}"
        return f"{self.what}: {self.unit} {self.done}/{self.total} {self.detail} {eta}".rstrip()


def in_words(seconds: float) -> str:
    """About how long that is: "41 s", "22 min", "3.5 h", "4 days"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{round(hours)} h" if hours < 72 else f"{round(hours / 24)} days"


class Steps:
    """A running count that logs each step. Use as `with Steps(...) as steps`, and call `steps.step` after each."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._key = next(_keys)
        self._done = self._measured = 0
        self._start = time.monotonic()

    def __enter__(self) -> Steps:
        self._log(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        self._log(logging.DEBUG, ended=True)

    def step(self, detail: str = "", *, skipped: bool = False) -> None:
        """One step is done; `skipped` steps took no time and do not enter the estimate."""
        self._done += 1
        self._measured += not skipped
        is_line = self._done % -(-self._total // MAX_LINES) == 0 or self._done == self._total
        self._log(logging.INFO if is_line else logging.DEBUG, detail)
        if self._measured == 1 and not skipped and self._done < self._total:
            took = time.monotonic() - self._start
            left = took * (self._total - self._done)
            if left > TOLD_SECONDS:
                which = f"{self._what}: {self._unit} {self._done} of {self._total}"
                log.info(f"{which} took {in_words(took)}; about {in_words(left)} to go")

    def _log(self, level: int, detail: str = "", *, ended: bool = False) -> None:
        left = None
        if self._measured and self._done < self._total:
            left = (time.monotonic() - self._start) / self._measured * (self._total - self._done)
        state = Progress(self._key, self._what, self._unit, self._total, self._done, detail, left, ended)
        log.log(level, state, extra={"progress": state})
