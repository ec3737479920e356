"""What verbs share: printing a result as text or as one JSON object."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any, Protocol

import typer

JSON_OPTION = typer.Option(False, "--json", help="Print one JSON object on stdout.")
DEVICE_OPTION = typer.Option("auto", help="auto, cpu, cuda or cuda:N.")


class Result(Protocol):
    """A result that prints well and converts to JSON."""

    def to_json(self) -> dict[str, Any]: ...


def show(result: Result, *, as_json: bool) -> None:
    """Print `result` on stdout."""
    text = json.dumps(_plain(result.to_json()), indent=2, allow_nan=False) if as_json else str(result)
    try:
        typer.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `| head`; the work itself is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
