"""What verbs share: stdout and stderr that take any text, and printing a result as text or as one JSON object."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import typer

from ..errors import ResourceError
from .terminal import printable


class Result(Protocol):
    """A result that prints well and converts to JSON."""

    def to_json(self) -> dict[str, Any]: ...


def open_streams() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is escaped, what is closed swallows it."""
    closed = sys.stdout is None
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as after `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if closed:
        typer.echo("note: stdout is closed, so results are not shown", err=True)


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Around what writes to stdout. A reader that has seen enough, as in `| head`, ends the program: its work is done.

    Raises ResourceError if stdout takes no more for another reason.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        if isinstance(error, BrokenPipeError):
            raise typer.Exit from None
        raise ResourceError(
            f"stdout cannot be written: {error.strerror}", hint="free some space, or send the result elsewhere"
        ) from error


def show(result: Result, *, as_json: bool) -> None:
    """Print `result` on stdout."""
    text = json.dumps(_plain(result.to_json()), indent=2, allow_nan=False) if as_json else printable(str(result))
    with writing_stdout():
        sys.stdout.write(text + "\n")  # typer.echo would write UTF-8 to a stream that is ASCII


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
