"""vLLM prints the text of an error and nothing else of it: hints have to be in the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import BitstrataError


@contextmanager
def with_hints() -> Iterator[None]:
    """Inside, or in a function that it decorates, errors of ours have their hint in their text."""
    try:
        yield
    except BitstrataError as error:
        error.args = (error.sentence,)
        raise
