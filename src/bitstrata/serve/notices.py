"""What of one request was not done as it says: told to its client, and once a name to those who run the server."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable

from .errors import ApiError
from .fields import Notice

log = logging.getLogger(__name__)
HEADER = "X-Bitstrata-Warnings"
HEADER_LENGTH = 1000  # characters; proxies limit headers, and the body has all of it
MOST_TOLD = 1000  # names that are logged once; clients choose them


class Told:
    """The names that were logged already."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def log(self, notice: Notice) -> None:
        if notice.param not in self._names and len(self._names) < MOST_TOLD:
            self._names.add(notice.param)
            log.info("a client's request: %s; said once", notice.message)


class Notices:
    """The notices of one request, in the order they came up.

    strict: each is a refusal instead, an ApiError with 400.
    """

    def __init__(self, strict: bool, told: Told) -> None:
        self._strict, self._told = strict, told
        self._found: dict[str, None] = {}

    def add(self, notice: Notice) -> None:
        """Raises ApiError if the server is strict."""
        if self._strict:
            raise ApiError(400, notice.refusal, param=notice.param, code=notice.code)
        self._told.log(notice)
        self._found[notice.message] = None

    def extend(self, notices: Iterable[Notice]) -> None:
        for notice in notices:
            self.add(notice)

    @property
    def messages(self) -> list[str] | None:
        """For the reply; None if there is nothing to say."""
        return list(self._found) or None

    @property
    def headers(self) -> dict[str, str]:
        """For the response: a list in JSON, cut where it gets long."""
        if not self._found:
            return {}
        said = list(self._found)
        while len(text := json.dumps(said)) > HEADER_LENGTH and len(said) > 1:
            said.pop()
        return {HEADER: text}
