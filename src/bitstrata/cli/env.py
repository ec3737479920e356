"""`bitstrata env`."""

from __future__ import annotations

from ..runtime import env
from .output import JSON_OPTION, show


def command(json: bool = JSON_OPTION) -> None:
    """Show versions, the machine, and which kernels can run."""
    show(env(), as_json=json)
