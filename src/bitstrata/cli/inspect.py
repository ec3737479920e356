"""`bitstrata inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..runtime import inspect
from .output import JSON_OPTION, show


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every byte.")] = False,
    json: bool = JSON_OPTION,
) -> None:
    """Show bits, bits per weight and bytes for each precision, the layers, and the kernel that will run."""
    show(inspect(model, verify=verify), as_json=json)
