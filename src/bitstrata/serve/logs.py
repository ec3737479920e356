"""What a server logs because of its clients, so that they cannot fill a disk with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

SOURCES = ("uvicorn.error", "asyncio", "bitstrata.serve.failures")
SECONDS = 60
KINDS = 256  # of lines that are told apart


class Seldom(logging.Filter):
    """Lets a kind of line through once in SECONDS, then with how many were left out before it.

    Of one kind are lines that come from the same place in the same words, or with the same type of error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[object, tuple[float, int]] = {}  # kind -> when it was last let through, left out since

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[0] if record.exc_info else None
        kind = record.pathname, record.lineno, str(record.msg).partition("\n")[0], error
        now = time.monotonic()
        since, left_out = self._seen.get(kind, (None, 0))
        if since is not None and now < since + SECONDS:
            self._seen[kind] = since, left_out + 1
            return False
        if len(self._seen) >= KINDS:
            self._seen.clear()
        self._seen[kind] = now, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out} more like this in the meantime)"
        return True


@contextmanager
def limited_logs() -> Iterator[None]:
    """While this lasts, what clients can cause is logged seldom."""
    seldom = Seldom()
    loggers = [logging.getLogger(name) for name in SOURCES]
    for logger in loggers:
        logger.addFilter(seldom)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(seldom)
