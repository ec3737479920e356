"""`bitstrata demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demonstration import demo
from .output import JSON_OPTION, show


def command(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the quantized model here.")] = None,
    json: bool = JSON_OPTION,
) -> None:
    """Quantize the bundled model once and run it at 2, 3 and 4 bits, offline, in under two minutes."""
    show(demo(output), as_json=json)
